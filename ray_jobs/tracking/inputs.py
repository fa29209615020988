"""The shard sets of a run as inputs in MLflow: by name, fingerprint and place.

Who starts the training keeps in ``inputs.json`` what MLflow shall know of them; whoever sends the journal needs the run
folder alone.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ca2st.checked_json import encoded, read_json
from ca2st.durable import write_bytes
from ray_jobs.redaction import without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.data.dataset_source import DatasetSource
    from mlflow.entities import Dataset

    from ray_jobs.runs.data import TrainingData
    from sharding.format.shard_set import ShardSet

INPUTS_NAME = "inputs.json"
DIGEST_CHARACTERS = 36
"""MLflow takes no more; the whole fingerprint is in the profile."""
_MOST_INDEXES = 2000
"""Of a set with more shards the duration is not added up: each index is a file to open."""
_NOT_IN_PROFILE = frozenset({"role", "source", "dataset", "split", "audio_policy"})


def keep_inputs(run_dir: Path, data: "TrainingData") -> None:
    """Write what `log_inputs` needs, anew for each attempt: the sets must be the same, but may have moved."""
    sets: dict[str, ShardSet] = {f"train_{number}": one for number, one in enumerate(data.train_sets, start=1)}
    if data.validation is not None:
        sets["validation"] = data.validation
    document = [
        {
            "role": role,
            "source": without_credentials(str(one.origin)) if one.origin else str(one.root.resolve()),
            "dataset": one.manifest.dataset,
            "split": one.manifest.split,
            "fingerprint": one.manifest.fingerprint,
            "num_samples": one.manifest.num_samples,
            "num_shards": one.manifest.num_shards,
            "num_rejected": sum(one.manifest.rejected.values()),
            "targets": data.targets,
            "num_classes": {space.name: len(space.classes) for space in one.manifest.label_spaces},
            "video": one.manifest.video.as_json(),
            "audio_policy": one.manifest.audio.policy,
            "audio_sample_rate_hz": one.manifest.audio.sample_rate_hz,
        }
        for role, one in sets.items()
    ]
    write_bytes(run_dir / INPUTS_NAME, encoded(json.dumps(document, indent=1, ensure_ascii=False) + "\n"))


def read_inputs(run_dir: Path) -> list[dict[str, Any]]:
    """Return what `keep_inputs` wrote, an entry per set; none in a folder of a version that kept nothing."""
    path = run_dir / INPUTS_NAME
    return read_json(path, list[dict[str, Any]]) if path.exists() else []


def log_inputs(client: "MlflowClient", run_id: str, run_dir: Path) -> None:
    """Give MLflow a dataset input per shard set, in context ``training`` or ``validation``; repeating adds none.

    MLflow drops the second of two with the same name and digest, so their contexts are joined.

    Raises:
        MlflowException: the store cannot be reached, or has no such run.
    """
    from mlflow.entities import DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    alike: dict[str, list[dict[str, Any]]] = {}
    for facts in read_inputs(run_dir):
        alike.setdefault(facts["fingerprint"], []).append(facts)
    found = []
    for sets in alike.values():
        contexts = dict.fromkeys("validation" if one["role"] == "validation" else "training" for one in sets)
        found.append(DatasetInput(_dataset(sets[0]), tags=[InputTag(MLFLOW_DATASET_CONTEXT, ", ".join(contexts))]))
    if found:
        client.log_inputs(run_id, datasets=found)


def dataset_name(facts: Mapping[str, Any]) -> str:
    """Return what MLflow calls a shard set."""
    return f"{facts['dataset']}/{facts['split']}"


def _dataset(facts: Mapping[str, Any]) -> "Dataset":
    """Return a set with name, digest, source and schema as `mlflow.data` writes them."""
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import Dataset
    from mlflow.types import ColSpec, Schema

    profile = {name: value for name, value in facts.items() if name not in _NOT_IN_PROFILE}
    if "://" not in facts["source"] and (seconds := _duration_seconds(Path(facts["source"]), facts)) is not None:
        profile["duration_seconds"] = round(seconds, 3)
    sound = [] if facts["audio_policy"] == "none" else [ColSpec("binary", "spectrogram", required=False)]
    labels = [ColSpec("long", f"label:{name}") for name in facts["num_classes"]]
    described = MetaDataset(  # type: ignore[abstract]  # MLflow forgot its profile
        _source(facts["source"]),
        name=dataset_name(facts),
        digest=facts["fingerprint"][:DIGEST_CHARACTERS],
        schema=Schema([ColSpec("string", "key"), ColSpec("binary", "video"), *sound, *labels]),
    )
    return Dataset(**described.to_dict(), profile=json.dumps(profile))


def _source(place: str) -> "DatasetSource":
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.exceptions import MlflowException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # MLflow lists its class for folders twice, and says so
            return resolve_dataset_source(place)
    except MlflowException:  # a kind of URL that MLflow does not know
        return CodeDatasetSource(tags={"url": place})


def _duration_seconds(folder: Path, facts: Mapping[str, Any]) -> float | None:
    """Add up all samples of a set on a disk; None where this process does not see that very set."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from ca2st.errors import CA2STError
    from sharding.format.index import read_parquet
    from sharding.format.shard_set import read_shard_set

    if facts["num_shards"] > _MOST_INDEXES:
        return None
    try:
        shard_set = read_shard_set(folder)
        if shard_set.manifest.fingerprint != facts["fingerprint"]:
            return None
        indexes = [read_parquet(folder / shard.index_name, columns=["duration_seconds"]) for shard in shard_set.shards]
    except (CA2STError, OSError, ValueError, pa.ArrowException):
        return None
    return float(sum(pc.sum(index.column(0)).as_py() for index in indexes))
