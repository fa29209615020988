"""Artefacts of a run.

What a model answered instead of what, counted from the predictions of a test.

The card of a run: what was trained on what, what it reached, how to use it; one HTML file that asks no network.

What a run has in MLflow beside its numbers: inputs, artefacts, the registered model; each fails alone.

The small files of a finished run, for MLflow: recipe, journal, card, plots, class names, predictions.

Checkpoints are never among them, nor is any file of 10 MB or more: those stay in the run folder,
named in a note.
"""

import csv
import io
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ca2st import __version__
from ca2st.training.journal import JOURNAL_NAME, flatten
from ray_jobs.errors import TrackingUnavailableError
from ray_jobs.pages.charts import Chart, metric_charts, page_environment
from ray_jobs.redaction import redacted
from ray_jobs.tracking.run_record import RECIPE_NAME, RunFacts, Say, read_run, registered_name
from sharding.format.index import parquet_batches, parquet_columns

if TYPE_CHECKING:
    from jinja2 import Environment
    from mlflow import MlflowClient


_BATCH_ROWS = 4096


def confusion_tables(predictions: Path, classes: Mapping[str, list[str]]) -> dict[str, str]:
    """A CSV table ``true,predicted,count`` for each target of `classes` that `predictions` has, commonest first.

    Pairs that never occurred are left out. Of two classes that are equally likely the lower one was answered.
    """
    columns = parquet_columns(predictions)
    return {
        target: _table(_counts(predictions, target), names)
        for target, names in classes.items()
        if f"{target}_probabilities" in columns
    }


def _counts(predictions: Path, target: str) -> Counter[tuple[int, int]]:
    """Samples by (true, answered) class."""
    found: Counter[tuple[int, int]] = Counter()
    columns = [f"{target}_label", f"{target}_probabilities"]
    for batch in parquet_batches(predictions, columns=columns, batch_rows=_BATCH_ROWS):
        values = np.asarray(batch.column(1).flatten()).reshape(batch.num_rows, -1)
        found.update(zip(batch.column(0).to_pylist(), values.argmax(axis=1).tolist(), strict=True))
    return found


def _table(counts: Counter[tuple[int, int]], names: list[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("true", "predicted", "count"))
    for (true, answered), count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        writer.writerow((names[true], names[answered], count))
    return text.getvalue()


_MOST_CLASSES = 60
_SHOWN_SETTINGS = (
    "model.kind",
    "model.fusion",
    "model.dim",
    "model.depth",
    "clip.num_frames",
    "clip.crop_size",
    "trainable",
    "start.checkpoint",
    "training.epochs",
    "training.global_batch_size",
    "training.precision",
    "training.seed",
    "optim.base_lr",
    "optim.weight_decay",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LargeFile:
    """A file of the run that is too large for MLflow and stays where it is."""

    path: str
    megabytes: float


def chart_svg(chart: Chart) -> str:
    """One drawing as a file of its own."""
    return _environment().get_template("chart_file.svg").render(chart=chart)


def render_run_card(run: RunFacts, *, charts: Sequence[Chart], large: Sequence[LargeFile]) -> str:
    """The whole page."""
    settings = flatten(run.recipe)
    page = _environment().get_template("run_card.html")
    return page.render(
        version=__version__,
        run=run,
        charts=charts,
        large=large,
        settings={name: _shown(settings[name]) for name in _SHOWN_SETTINGS if settings.get(name) is not None},
        classes={name: (len(names), names[:_MOST_CLASSES]) for name, names in run.classes.items()},
        model=registered_name(run.recipe),
        environment=_surroundings(run),
    )


def _environment() -> "Environment":
    environment = page_environment()
    environment.filters["number"] = lambda value: f"{value:.4g}"
    environment.filters["duration"] = duration_in_words
    return environment


def duration_in_words(seconds: float) -> str:
    """``2 h 5 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def _shown(value: object) -> str:
    return redacted(str(value))


def _surroundings(run: RunFacts) -> Mapping[str, str]:
    """Where it was trained: topology, hardware, commit and versions."""
    found = {name: str(value) for name, value in run.start.get("topology", {}).items()}
    found |= {name: value for name, value in run.tags.items() if name.startswith(("hardware.", "git."))}
    return found | {name: str(value) for name, value in run.start.get("versions", {}).items()}


AT_BEGIN = ("inputs",)
"""Sent with the journal's first line."""
AT_END = ("artefacts", "registered_model")
"""Sent when the training is done."""


def send_extra(name: str, *, client: "MlflowClient", run_id: str, run_dir: Path, say: Say) -> bool:
    """Send the extra `name`; returns whether it was sent, after telling why not."""
    try:
        EXTRAS[name](client, run_id, run_dir)
    except Exception as error:  # noqa: BLE001  # whatever it is, it must not cost the run its metrics
        say(f"{name}: not sent ({type(error).__name__}: {redacted(str(error))}); `ca2st track sync` tries again")
        return False
    return True


def _inputs(client: "MlflowClient", run_id: str, run_dir: Path) -> None:
    from ray_jobs.tracking.inputs import log_inputs

    log_inputs(client, run_id, run_dir)


def _artefacts(client: "MlflowClient", run_id: str, run_dir: Path) -> None:

    log_artefacts(client, run_id, run_dir)


def _registered_model(client: "MlflowClient", run_id: str, run_dir: Path) -> None:
    from ray_jobs.tracking.registered_model import register

    register(client, run_id, run_dir)


EXTRAS: dict[str, Callable[["MlflowClient", str, Path], None]] = {
    "inputs": _inputs,
    "artefacts": _artefacts,
    "registered_model": _registered_model,
}


MAX_BYTES = 10_000_000
"""From this size on a file is no artefact."""
LARGE_FILES_NAME = "too_large.txt"
_PREDICTIONS = "predictions.*.parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class Artefacts:
    """What goes to MLflow and what does not."""

    files: Mapping[str, bytes]
    """By path below the run's artefacts; each smaller than `MAX_BYTES`."""
    large: tuple[LargeFile, ...]
    """What stays in the run folder."""


def log_artefacts(client: "MlflowClient", run_id: str, run_dir: Path) -> None:
    """Send the small files of a run; repeating replaces them.

    Raises:
        TrackingUnavailableError: the store took one of them not; sending all again later loses nothing.
    """
    artefacts = collect(run_dir)
    with tempfile.TemporaryDirectory(prefix="ca2st-artefacts-") as folder:
        for name, data in artefacts.files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            parent = path.parent.relative_to(folder).as_posix()
            try:
                client.log_artifact(run_id, str(path), None if parent == "." else parent)
            except Exception as error:  # each kind of artefact store has errors of its own
                raise TrackingUnavailableError(
                    f"{name} of {run_dir}: MLflow's artefact store did not take it ({type(error).__name__}: "
                    f"{redacted(str(error))}); run `ca2st track sync {run_dir}` when it does"
                ) from error


def collect(run_dir: Path) -> Artefacts:
    """The files of a run folder that go to MLflow, in the order in which they are sent.

    Raises:
        FileNotFoundError: no training was started there.
    """
    run = read_run(run_dir)
    predictions = newest_predictions(run_dir)
    kept = [path for path in (run_dir / JOURNAL_NAME, predictions) if path is not None and path.exists()]
    files: dict[str, bytes] = {}
    large: list[LargeFile] = []
    for name, data in [*_made(run, predictions), *((path.name, None) for path in kept)]:
        path = run_dir / name
        size = path.stat().st_size if data is None else len(data)
        if size >= MAX_BYTES:
            large.append(LargeFile(path=str(path), megabytes=size / 1e6))
        else:
            files[name] = _cleaned(path) if data is None else data
    charts = metric_charts([run.curves])
    plots = {f"plots/{chart.title.replace('/', '.')}.svg": chart_svg(chart).encode() for chart in charts}
    card = render_run_card(run, charts=charts, large=large).encode()
    note = {LARGE_FILES_NAME: _note(large)} if large else {}
    return Artefacts(files={"run_card.html": card, **note, **plots, **files}, large=tuple(large))


def newest_predictions(run_dir: Path) -> Path | None:
    """The file that the last test of the run wrote; None before the first."""
    found = sorted(run_dir.glob(_PREDICTIONS), key=lambda path: (path.stat().st_mtime_ns, path.name))
    return found[-1] if found else None


def _made(run: RunFacts, predictions: Path | None) -> Iterator[tuple[str, bytes | None]]:
    yield RECIPE_NAME, redacted(json.dumps(run.recipe, indent=1, ensure_ascii=False)).encode()
    if run.classes:
        yield "classes.json", json.dumps(run.classes, indent=1, ensure_ascii=False).encode()
    if predictions is not None:
        for target, table in confusion_tables(predictions, run.classes).items():
            yield f"confusion.{target}.csv", table.encode()


def _cleaned(path: Path) -> bytes:
    """The bytes of a file; of a text without secrets."""
    data = path.read_bytes()
    return redacted(data.decode()).encode() if path.name == JOURNAL_NAME else data


def _note(large: Sequence[LargeFile]) -> bytes:
    lines = [f"{file.path}: {file.megabytes:.1f} MB, too large for MLflow; it stays there\n" for file in large]
    return "".join(lines).encode()
