"""A training as its folder describes it, read without torch, and its card: one HTML file that asks no network.

The card says what was trained on what, what it reached, and how to use it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

from ca2st import __version__
from ca2st.checked_json import read_json
from ca2st.training.checkpoint import CHECKPOINTS_NAME, list_checkpoints
from ca2st.training.journal import JOURNAL_NAME, flatten, read_events
from ray_jobs.config.recipe import model_name
from ray_jobs.pages.charts import Chart, page_environment
from ray_jobs.redaction import redacted
from ray_jobs.tracking.state import STATE_NAME

if TYPE_CHECKING:
    from jinja2 import Environment

INPUTS_NAME = "inputs.json"
RECIPE_NAME = "recipe.json"
_CLASSES_DOCUMENT = "run.json"
_CURVES = {"loss": "train/loss", "lr": "train/lr", "clips_per_second": "train/clips_per_second"}

Curve = tuple[tuple[int, float], ...]
"""(step, value), steps ascending."""
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
class RunFacts:
    """A training as its folder describes it."""

    folder: Path
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
    inputs: tuple[Mapping[str, Any], ...]
    """The shard sets, as `artefacts.keep_inputs` keeps them."""
    tags: Mapping[str, str]
    """Hardware, git, versions, as MLflow has them."""

    @property
    def name(self) -> str:
        """The recipe's."""
        return str(self.recipe["name"])

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
    recipe, checkpoint, state = read_recipe(folder), newest_checkpoint(folder), folder / STATE_NAME
    ends: dict[int, str] = {}
    start: Mapping[str, Any] = {}
    seconds: dict[int, float] = {}
    curves: dict[str, dict[int, float]] = {}
    for line in read_events(folder / JOURNAL_NAME):
        if line["event"] == "start":
            start = line
        elif line["event"] == "end":
            ends[line["attempt"]] = str(line["status"])
        elif line["event"] == "step":
            seconds[line["step"]] = float(line.get("step_seconds", 0.0))
        for name, value in _numbers(line).items():
            curves.setdefault(name, {})[line["step"]] = value
    return RunFacts(
        folder=folder,
        recipe=recipe,
        curves={name: tuple(sorted(values.items())) for name, values in curves.items()},
        step_seconds=sum(seconds.values()),
        start=start,
        attempts=int(start.get("attempt", 0)),
        status=ends.get(int(start.get("attempt", 0))),
        checkpoint=checkpoint,
        classes={} if checkpoint is None else class_names(checkpoint),
        inputs=tuple(read_inputs(folder)),
        tags=read_json(state, _Tags)["tags"] if state.exists() else {},
    )


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Return what of a line is drawn."""
    if line["event"] == "step":
        named = {name: line.get(key) for key, name in _CURVES.items()}
    elif line["event"] == "eval":
        named = {f"{line['split']}/{name}": value for name, value in line["metrics"].items()}
    else:
        return {}
    return {name: float(value) for name, value in named.items() if value is not None}


def read_recipe(folder: Path) -> dict[str, Any]:
    """Return the resolved recipe of a run folder; raises as `read_run`."""
    return read_json(folder / RECIPE_NAME, dict[str, Any])


def registered_name(recipe: Mapping[str, Any]) -> str | None:
    """Return the registry name that a resolved recipe asks for; None where its model is not to be registered."""
    tracking = recipe.get("tracking", {})
    if not tracking.get("register_model", True):
        return None
    return model_name(str(recipe["name"]), tracking.get("registered_model"))


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run folder."""
    return next(iter(list_checkpoints(folder / CHECKPOINTS_NAME)), None)


def class_names(checkpoint: Path) -> dict[str, list[str]]:
    """Return the class names of each target; empty where the checkpoint keeps none."""
    path = checkpoint / _CLASSES_DOCUMENT
    return read_json(path, _Classes)["classes"] if path.exists() else {}


def labelling_of(checkpoint: Path) -> Literal["one", "several", "none"]:
    """Return how many labels a sample of the training had."""
    path = checkpoint / _CLASSES_DOCUMENT
    return read_json(path, _Classes).get("labelling", "one") if path.exists() else "one"


def read_inputs(run_dir: Path) -> list[dict[str, Any]]:
    """Return what `artefacts.keep_inputs` wrote, an entry per set; none in a folder of a version that kept nothing."""
    path = run_dir / INPUTS_NAME
    return read_json(path, list[dict[str, Any]]) if path.exists() else []


@dataclass(frozen=True, kw_only=True, slots=True)
class LargeFile:
    """A file of the run that is too large for MLflow and stays where it is."""

    path: str
    megabytes: float


def chart_svg(chart: Chart) -> str:
    """Return one drawing as a file of its own."""
    return _environment().get_template("chart_file.svg").render(chart=chart)


def render_run_card(run: RunFacts, *, charts: Sequence[Chart], large: Sequence[LargeFile]) -> str:
    """Return the whole page."""
    settings = flatten(run.recipe)
    page = _environment().get_template("run_card.html")
    return page.render(
        version=__version__,
        run=run,
        charts=charts,
        large=large,
        settings={name: redacted(str(settings[name])) for name in _SHOWN_SETTINGS if settings.get(name) is not None},
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
    """Return a duration as ``2 h 5 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def _surroundings(run: RunFacts) -> Mapping[str, str]:
    """Return where it was trained: topology, hardware, commit and versions."""
    found = {name: str(value) for name, value in run.start.get("topology", {}).items()}
    found |= {name: value for name, value in run.tags.items() if name.startswith(("hardware.", "git."))}
    return found | {name: str(value) for name, value in run.start.get("versions", {}).items()}


class _Classes(TypedDict):
    classes: dict[str, list[str]]
    labelling: NotRequired[Literal["one", "several", "none"]]


class _Tags(TypedDict):
    tags: dict[str, str]
