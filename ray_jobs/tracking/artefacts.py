"""The small files of a finished run, for MLflow: recipe, journal, card, plots, class names, predictions.

Checkpoints are never among them, nor is any file of 10 MB or more: those stay in the run folder,
named in a note.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ca2st.training.journal import JOURNAL_NAME
from ray_jobs.errors import TrackingUnavailableError
from ray_jobs.redaction import redacted
from ray_jobs.tracking.confusion import confusion_tables
from ray_jobs.tracking.run_card import LargeFile, chart_svg, charts_of, render_run_card
from ray_jobs.tracking.run_facts import RECIPE_NAME, RunFacts, read_run

if TYPE_CHECKING:
    from mlflow import MlflowClient

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
    charts = charts_of(run)
    plots = {f"plots/{chart.metric.replace('/', '.')}.svg": chart_svg(chart).encode() for chart in charts}
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
