"""What a run has in MLflow beside its numbers: its shard sets as inputs, and its small files.

Who starts the training keeps in ``inputs.json`` what MLflow shall know of the shard sets; whoever sends the journal
needs the run folder alone. The files are recipe, journal, card, plots, class names and predictions. Checkpoints are
never among them, nor is any file of 10 MB or more: those stay in the run folder, named in a note.
"""

import csv
import io
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ca2st.checked_json import encoded
from ca2st.durable import write_bytes
from ca2st.training.journal import JOURNAL_NAME
from ray_jobs.errors import TrackingUnavailableError
from ray_jobs.pages.charts import metric_charts
from ray_jobs.redaction import redacted, without_credentials
from ray_jobs.tracking import run_card
from ray_jobs.tracking.state import sync_command
from sharding.format.index import parquet_batches, parquet_columns

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.data.dataset_source import DatasetSource
    from mlflow.entities import DatasetInput

    from ray_jobs.runs.data import TrainingData
    from sharding.format.shard_set import Manifest, ShardSet

MAX_BYTES = 10_000_000
"""From this size on a file is no artefact."""
LARGE_FILES_NAME = "too_large.txt"
_PREDICTIONS = "predictions.*.parquet"
_BATCH_ROWS = 4096
DIGEST_CHARACTERS = 36
"""MLflow takes no more; the whole fingerprint is in the profile."""
_MOST_INDEXES = 2000
"""Of a set with more shards the duration is not added up: each index is a file to open."""


def log_artefacts(client: "MlflowClient", run_id: str, run_dir: Path) -> None:
    """Send the small files of a run; repeating replaces them.

    Raises:
        TrackingUnavailableError: the store did not take one of them; sending all again later loses nothing.
    """
    with tempfile.TemporaryDirectory(prefix="ca2st-artefacts-") as folder:
        for name, data in collect(run_dir).items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            parent = path.parent.relative_to(folder).as_posix()
            try:
                client.log_artifact(run_id, str(path), None if parent == "." else parent)
            except Exception as error:  # each kind of artefact store has errors of its own
                raise TrackingUnavailableError(
                    f"{name} of {run_dir}: MLflow's artefact store did not take it ({type(error).__name__}: "
                    f"{redacted(str(error))}); run `{sync_command(run_dir)}` when it does"
                ) from error


def collect(run_dir: Path) -> dict[str, bytes]:
    """Return the files of a run that go to MLflow, by their path there, in the order in which they are sent.

    Raises:
        FileNotFoundError: no training was started there.
    """
    run, predictions = run_card.read_run(run_dir), newest_predictions(run_dir)
    files: dict[str, bytes] = {}
    large: list[run_card.LargeFile] = []
    tables = [] if predictions is None else sorted(run_dir.glob(f"{predictions.stem}.*"))
    kept = [path for path in (run_dir / JOURNAL_NAME, *tables) if path.is_file()]
    for name, data in [*_made(run, predictions), *((path.name, None) for path in kept)]:
        path = run_dir / name
        size = path.stat().st_size if data is None else len(data)
        if size >= MAX_BYTES:
            large.append(run_card.LargeFile(path=str(path), megabytes=size / 1e6))
        else:
            files[name] = _cleaned(path) if data is None else data
    charts = metric_charts([run.curves])
    plots = {f"plots/{chart.title.replace('/', '.')}.svg": run_card.chart_svg(chart).encode() for chart in charts}
    note = "".join(f"{one.path}: {one.megabytes:.1f} MB, too large for MLflow; it stays there\n" for one in large)
    return {
        "run_card.html": run_card.render_run_card(run, charts=charts, large=large).encode(),
        **({LARGE_FILES_NAME: note.encode()} if large else {}),
        **plots,
        **files,
    }


def newest_predictions(run_dir: Path) -> Path | None:
    """Return the file that the last test of the run wrote; None before the first."""
    found = sorted(run_dir.glob(_PREDICTIONS), key=lambda path: (path.stat().st_mtime_ns, path.name))
    return found[-1] if found else None


def keep_inputs(run_dir: Path, data: "TrainingData") -> None:
    """Write what `log_inputs` needs, anew for each attempt: the sets must be the same, but may have moved."""
    sets: dict[str, ShardSet] = {f"train_{number}": one for number, one in enumerate(data.train_sets, start=1)}
    if data.validation is not None:
        sets["validation"] = data.validation
    document = [
        {"role": role, "source": _place(one), **_facts(one.manifest, data.targets)} for role, one in sets.items()
    ]
    write_bytes(run_dir / run_card.INPUTS_NAME, encoded(json.dumps(document, indent=1, ensure_ascii=False) + "\n"))


def log_inputs(client: "MlflowClient", run_id: str, run_dir: Path) -> None:
    """Give MLflow a dataset input per shard set, in context ``training`` or ``validation``; repeating adds none.

    Raises:
        MlflowException: the store cannot be reached, or has no such run.
    """
    if found := list(_dataset_inputs(run_card.read_inputs(run_dir))):
        client.log_inputs(run_id, datasets=found)


def confusion_tables(predictions: Path, classes: Mapping[str, list[str]]) -> dict[str, str]:
    """Return a CSV table ``true,predicted,count`` for each target of `classes` that `predictions` has, commonest first.

    Pairs that never occurred are left out. Of two classes that are equally likely the lower one was answered.
    """
    columns = parquet_columns(predictions)
    return {
        target: _table(_counts(predictions, target), names)
        for target, names in classes.items()
        if {f"{target}_probabilities", f"{target}_label"} <= set(columns)
    }


def _made(run: run_card.RunFacts, predictions: Path | None) -> Iterator[tuple[str, bytes | None]]:
    yield run_card.RECIPE_NAME, redacted(json.dumps(run.recipe, indent=1, ensure_ascii=False)).encode()
    if run.classes:
        yield "classes.json", json.dumps(run.classes, indent=1, ensure_ascii=False).encode()
    if predictions is not None:
        for target, table in confusion_tables(predictions, run.classes).items():
            yield f"confusion.{target}.csv", table.encode()


def _cleaned(path: Path) -> bytes:
    """Return the bytes of a file; of a text without secrets, and with words for bytes that are damaged."""
    data = path.read_bytes()
    return redacted(data.decode(errors="backslashreplace")).encode() if path.name == JOURNAL_NAME else data


def _counts(predictions: Path, target: str) -> Counter[tuple[int, int]]:
    """Count samples by (true, answered) class."""
    found: Counter[tuple[int, int]] = Counter()
    columns = [f"{target}_label", f"{target}_probabilities"]
    for batch in parquet_batches(predictions, columns=columns, batch_rows=_BATCH_ROWS):
        answers = np.asarray(batch.column(1).flatten()).reshape(batch.num_rows, -1).argmax(axis=1).tolist()
        pairs = zip(batch.column(0).to_pylist(), answers, strict=True)
        found.update(pair for pair in pairs if isinstance(pair[0], int))  # neither without a label nor with several
    return found


def _table(counts: Counter[tuple[int, int]], names: list[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("true", "predicted", "count"))
    for (true, answered), count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        writer.writerow((names[true], names[answered], count))
    return text.getvalue()


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
    """Yield one per set: MLflow drops the second of two with the same name and digest, so their contexts are joined."""
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
    """Return name, digest, source and schema as `mlflow.data` writes them."""
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.types import ColSpec, Schema

    sound = [] if facts["audio_policy"] == "none" else [ColSpec("binary", "spectrogram", required=False)]
    labels = [ColSpec("long", f"label:{name}") for name in facts["num_classes"]]
    dataset = MetaDataset(  # type: ignore[abstract]  # MLflow forgot its profile
        _source(facts["source"]),
        name=dataset_name(facts),
        digest=facts["fingerprint"][:DIGEST_CHARACTERS],
        schema=Schema([ColSpec("string", "key"), ColSpec("binary", "video"), *sound, *labels]),
    )
    described: dict[str, str] = dataset.to_dict()
    return described


def dataset_name(facts: Mapping[str, Any]) -> str:
    """Return what MLflow calls a shard set."""
    return f"{facts['dataset']}/{facts['split']}"


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
        columns = [
            read_parquet(folder / shard.index_name, columns=["duration_seconds"]).column(0)
            for shard in shard_set.shards
        ]
    except (CA2STError, OSError, ValueError, pa.ArrowException):
        return None
    return float(sum(pc.sum(column).as_py() for column in columns))
