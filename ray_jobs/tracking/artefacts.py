"""The small files of a run in MLflow: recipe, journal, class names, plots, predictions, and a card.

The card is one HTML file that asks no network: what was trained on what, what it reached, and how to use it. All is
read from the run folder, without torch. Checkpoints are never among the files, nor is any file of 10 MB or more: those
stay in the run folder, named in a note.
"""

import csv
import io
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

import numpy as np

from ca2st import __version__
from ca2st.checked_json import read_json
from ca2st.training.checkpoint import CHECKPOINTS_NAME, list_checkpoints
from ca2st.training.journal import JOURNAL_NAME, flatten, read_events
from ray_jobs.config.recipe import model_name
from ray_jobs.errors import TrackingUnavailableError
from ray_jobs.pages.charts import Chart, Curve, chart_svg, metric_charts, page_environment
from ray_jobs.redaction import redacted
from ray_jobs.tracking.inputs import read_inputs
from ray_jobs.tracking.state import STATE_NAME, sync_command
from sharding.format.index import parquet_batches, parquet_columns

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_BYTES = 10_000_000
"""From this size on a file is no artefact."""
LARGE_FILES_NAME = "too_large.txt"
RECIPE_NAME = "recipe.json"
_CLASSES_DOCUMENT = "run.json"
_PREDICTIONS = "predictions.*.parquet"
_BATCH_ROWS = 4096
_CURVES = {"loss": "train/loss", "lr": "train/lr", "clips_per_second": "train/clips_per_second"}
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


class _Classes(TypedDict):
    classes: dict[str, list[str]]
    labelling: NotRequired[Literal["one", "several", "none"]]


class _Tags(TypedDict):
    tags: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """A training as its folder describes it."""

    recipe: Mapping[str, Any]
    """The resolved recipe."""
    curves: Mapping[str, Curve]
    """Of each step the last attempt's values: ``train/loss``, ``train/lr``, ``validation/top1``, ..."""
    step_seconds: float
    """All steps together, each once."""
    start: Mapping[str, Any]
    """The newest attempt's first line: topology, versions, steps to come."""
    attempts: int
    status: str | None
    """How the newest attempt ended: ``done``, ``stopped``, ...; None: it has not."""
    checkpoint: Path | None
    """The newest complete one."""
    classes: Mapping[str, list[str]]
    """Class names of each target; empty before the first checkpoint."""
    inputs: list[dict[str, Any]]
    """The shard sets, as `keep_inputs` keeps them."""
    tags: Mapping[str, str]
    """Hardware, git, versions, as MLflow has them."""

    @property
    def metrics(self) -> dict[str, float]:
        """The newest value of each metric that is no step's: ``validation/top1``, ..."""
        return {name: curve[-1][1] for name, curve in self.curves.items() if not name.startswith("train/")}

    @property
    def steps(self) -> int:
        """Updates made."""
        return max((curve[-1][0] for curve in self.curves.values()), default=0)


def read_run(folder: Path) -> RunFacts:
    """Return what `folder` says of its training.

    Raises:
        FileNotFoundError: it holds no recipe: no training was started there.
    """
    recipe, state = read_recipe(folder), folder / STATE_NAME
    checkpoint = next(iter(list_checkpoints(folder / CHECKPOINTS_NAME)), None)
    ends: dict[int, str] = {}
    start: Mapping[str, Any] = {}
    seconds: dict[int, float] = {}
    curves: dict[str, dict[int, float]] = {}
    for line in read_events(folder / JOURNAL_NAME):
        drawn: dict[str, float | None] = {}
        if line["event"] == "start":
            start = line
        elif line["event"] == "end":
            ends[line["attempt"]] = str(line["status"])
        elif line["event"] == "step":
            seconds[line["step"]] = float(line.get("step_seconds", 0.0))
            drawn = {name: line.get(key) for key, name in _CURVES.items()}
        elif line["event"] == "eval":
            drawn = {f"{line['split']}/{name}": value for name, value in line["metrics"].items()}
        for name, value in drawn.items():
            if value is not None:
                curves.setdefault(name, {})[line["step"]] = float(value)
    attempts = int(start.get("attempt", 0))
    return RunFacts(
        recipe=recipe,
        curves={name: tuple(sorted(values.items())) for name, values in curves.items()},
        step_seconds=sum(seconds.values()),
        start=start,
        attempts=attempts,
        status=ends.get(attempts),
        checkpoint=checkpoint,
        classes={} if checkpoint is None else class_names(checkpoint),
        inputs=read_inputs(folder),
        tags=read_json(state, _Tags)["tags"] if state.exists() else {},
    )


def read_recipe(folder: Path) -> dict[str, Any]:
    """Return the resolved recipe of a run folder; raises as `read_run`."""
    return read_json(folder / RECIPE_NAME, dict[str, Any])


def registered_name(recipe: Mapping[str, Any]) -> str | None:
    """Return the registry name that a resolved recipe asks for; None where its model is not to be registered."""
    tracking = recipe.get("tracking", {})
    if not tracking.get("register_model", True):
        return None
    return model_name(str(recipe["name"]), tracking.get("registered_model"))


def class_names(checkpoint: Path) -> dict[str, list[str]]:
    """Return the class names of each target; empty where the checkpoint keeps none."""
    path = checkpoint / _CLASSES_DOCUMENT
    return read_json(path, _Classes)["classes"] if path.exists() else {}


def labelling_of(checkpoint: Path) -> Literal["one", "several", "none"]:
    """Return how many labels a sample of the training had."""
    path = checkpoint / _CLASSES_DOCUMENT
    return read_json(path, _Classes).get("labelling", "one") if path.exists() else "one"


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

    Of predictions those of the last test are sent.

    Raises:
        FileNotFoundError: no training was started there.
    """
    run, kept = read_run(run_dir), [run_dir / JOURNAL_NAME]
    files = {RECIPE_NAME: redacted(json.dumps(run.recipe, indent=1, ensure_ascii=False)).encode()}
    if run.classes:
        files["classes.json"] = json.dumps(run.classes, indent=1, ensure_ascii=False).encode()
    if tests := sorted(run_dir.glob(_PREDICTIONS), key=lambda path: (path.stat().st_mtime_ns, path.name)):
        files |= _confusion_tables(tests[-1], run.classes)
        kept += sorted(run_dir.glob(f"{tests[-1].stem}.*"))
    sizes = {path: path.stat().st_size for path in kept if path.is_file()}
    files |= {path.name: _cleaned(path) for path, size in sizes.items() if size < MAX_BYTES}
    sizes |= {run_dir / name: len(data) for name, data in files.items()}
    large = [(path, size / 1e6) for path, size in sizes.items() if size >= MAX_BYTES]
    charts = metric_charts([run.curves])
    note = "".join(f"{path}: {megabytes:.1f} MB, too large for MLflow; it stays there\n" for path, megabytes in large)
    return {
        "run_card.html": _card(run, charts, large).encode(),
        **({LARGE_FILES_NAME: note.encode()} if large else {}),
        **{f"plots/{chart.title.replace('/', '.')}.svg": chart_svg(chart).encode() for chart in charts},
        **{name: data for name, data in files.items() if len(data) < MAX_BYTES},
    }


def _card(run: RunFacts, charts: Sequence[Chart], large: Sequence[tuple[Path, float]]) -> str:
    """Return the page; `large`: files that stay in the run folder, with their megabytes."""
    settings = flatten(run.recipe)
    page = page_environment().get_template("run_card.html")
    return page.render(
        version=__version__,
        run=run,
        charts=charts,
        large=large,
        settings={name: redacted(str(settings[name])) for name in _SHOWN_SETTINGS if settings.get(name) is not None},
        classes={name: (len(names), names[:_MOST_CLASSES]) for name, names in run.classes.items()},
        model=registered_name(run.recipe),
        environment={
            **run.start.get("topology", {}),
            **{name: value for name, value in run.tags.items() if name.startswith(("hardware.", "git."))},
            **run.start.get("versions", {}),
        },
    )


def _cleaned(path: Path) -> bytes:
    """Return the bytes of a file; of a text without secrets, and with words for bytes that are damaged."""
    data = path.read_bytes()
    return redacted(data.decode(errors="backslashreplace")).encode() if path.name == JOURNAL_NAME else data


def _confusion_tables(predictions: Path, classes: Mapping[str, list[str]]) -> dict[str, bytes]:
    """Return a CSV table ``true,predicted,count`` for each target of `classes` that `predictions` has, commonest first.

    Pairs that never occurred are left out. Of two classes that are equally likely the lower one was answered.
    """
    tables = {}
    for target, names in classes.items():
        columns = [f"{target}_label", f"{target}_probabilities"]
        if not set(columns) <= set(parquet_columns(predictions)):
            continue
        found: Counter[tuple[int, int]] = Counter()
        for batch in parquet_batches(predictions, columns=columns, batch_rows=_BATCH_ROWS):
            answers = np.asarray(batch.column(1).flatten()).reshape(batch.num_rows, -1).argmax(axis=1).tolist()
            pairs = zip(batch.column(0).to_pylist(), answers, strict=True)
            found.update(pair for pair in pairs if isinstance(pair[0], int))  # neither without a label nor with several
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("true", "predicted", "count"))
        for (true, answered), count in sorted(found.items(), key=lambda item: (-item[1], item[0])):
            writer.writerow((names[true], names[answered], count))
        tables[f"confusion.{target}.csv"] = text.getvalue().encode()
    return tables
