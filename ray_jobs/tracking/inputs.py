"""The shard sets of a run as MLflow's dataset inputs.

Who starts the training keeps in ``inputs.json`` what MLflow shall know of them; whoever sends the journal needs the run
folder alone.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ca2st.checked_json import encoded, read_json
from ca2st.durable import write_bytes
from ray_jobs.redaction import without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.data.dataset_source import DatasetSource
    from mlflow.entities import DatasetInput

    from ray_jobs.runs.data import TrainingData
    from sharding.format.shard_set import Manifest, ShardSet

INPUTS_NAME = "inputs.json"
_DIGEST_CHARACTERS = 36
"""MLflow takes no more; the whole fingerprint is in the profile."""
_MOST_INDEXES = 2000
"""Of a set with more shards the duration is not added up: each index is a file to open."""


def keep_inputs(run_dir: Path, data: "TrainingData") -> None:
    """Write what `log_inputs` needs, anew for each attempt: the sets must be the same, but may have moved."""
    sets: dict[str, ShardSet] = {f"train_{number}": one for number, one in enumerate(data.train_sets, start=1)}
    if data.validation is not None:
        sets["validation"] = data.validation
    document = [
        {"role": role, "source": _place(one), **_facts(one.manifest, data.targets)} for role, one in sets.items()
    ]
    write_bytes(run_dir / INPUTS_NAME, encoded(json.dumps(document, indent=1, ensure_ascii=False) + "\n"))


def read_inputs(run_dir: Path) -> list[dict[str, Any]]:
    """What `keep_inputs` wrote, a set an entry; none in a folder of a version that kept nothing."""
    path = run_dir / INPUTS_NAME
    return read_json(path, list[dict[str, Any]]) if path.exists() else []


def log_inputs(client: "MlflowClient", run_id: str, run_dir: Path) -> None:
    """Give MLflow a dataset input a shard set, in context ``training`` or ``validation``; repeating adds none.

    Raises:
        MlflowException: the store cannot be reached, or has no such run.
    """
    if found := list(_dataset_inputs(read_inputs(run_dir))):
        client.log_inputs(run_id, datasets=found)


def _place(shard_set: "ShardSet") -> str:
    return without_credentials(str(shard_set.origin)) if shard_set.origin else str(shard_set.root.resolve())


def _facts(manifest: "Manifest", targets: tuple[str, ...]) -> dict[str, Any]:
    return {
        "dataset": manifest.dataset,
        "split": manifest.split,
        "fingerprint": manifest.fingerprint,
        "num_samples": manifest.num_samples,
        "num_shards": manifest.num_shards,
        "num_rejected": sum(manifest.rejected.values()),
        "targets": list(targets),
        "num_classes": {space.name: len(space.classes) for space in manifest.label_spaces},
        "video": manifest.video.as_json(),
        "audio_policy": manifest.audio.policy,
        "audio_sample_rate_hz": manifest.audio.sample_rate_hz,
    }


def _dataset_inputs(kept: list[dict[str, Any]]) -> Iterator["DatasetInput"]:
    """One a set: MLflow drops the second of two with the same name and digest, so their contexts are joined."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    alike: dict[str, list[dict[str, Any]]] = {}
    for facts in kept:
        alike.setdefault(facts["fingerprint"], []).append(facts)
    for first, *others in alike.values():
        contexts = ["validation" if one["role"] == "validation" else "training" for one in (first, *others)]
        dataset = Dataset(**_described(first), profile=json.dumps(_profile(first)))
        yield DatasetInput(dataset, tags=[InputTag(MLFLOW_DATASET_CONTEXT, ", ".join(dict.fromkeys(contexts)))])


def _described(facts: Mapping[str, Any]) -> dict[str, str]:
    """Name, digest, source and schema as `mlflow.data` writes them."""
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.types import ColSpec, Schema

    sound = [] if facts["audio_policy"] == "none" else [ColSpec("binary", "spectrogram", required=False)]
    labels = [ColSpec("long", f"label:{name}") for name in facts["num_classes"]]
    dataset = MetaDataset(  # type: ignore[abstract]  # MLflow forgot its profile
        _source(facts["source"]),
        name=f"{facts['dataset']}/{facts['split']}",
        digest=facts["fingerprint"][:_DIGEST_CHARACTERS],
        schema=Schema([ColSpec("string", "key"), ColSpec("binary", "video"), *sound, *labels]),
    )
    described: dict[str, str] = dataset.to_dict()
    return described


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


def _profile(facts: Mapping[str, Any]) -> dict[str, Any]:
    names = ("num_samples", "num_shards", "num_rejected", "targets", "num_classes", "video", "audio_sample_rate_hz")
    profile = {name: facts[name] for name in names} | {"fingerprint": facts["fingerprint"]}
    seconds = _duration_seconds(Path(facts["source"]), facts) if "://" not in facts["source"] else None
    return profile if seconds is None else profile | {"duration_seconds": round(seconds, 3)}


def _duration_seconds(folder: Path, facts: Mapping[str, Any]) -> float | None:
    """All samples of a set on a disk together; None where this process does not see that very set."""
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
        columns = [
            read_parquet(folder / shard.index_name, columns=["duration_seconds"]).column(0)
            for shard in shard_set.shards
        ]
    except (CA2STError, OSError, ValueError, pa.ArrowException):
        return None
    return float(sum(pc.sum(column).as_py() for column in columns))
