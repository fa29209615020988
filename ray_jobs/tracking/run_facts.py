"""What a run folder tells of its training, read without torch: by whoever sends the run to MLflow."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from ca2st.checked_json import read_json
from ca2st.training.checkpoint import CHECKPOINTS_NAME, list_checkpoints
from ca2st.training.journal import JOURNAL_NAME, read_events
from ray_jobs.config.tracking import model_name
from ray_jobs.tracking.inputs import read_inputs
from ray_jobs.tracking.state import STATE_NAME

RECIPE_NAME = "recipe.json"
_CLASSES_DOCUMENT = "run.json"
_CURVES = {"loss": "train/loss", "lr": "train/lr", "clips_per_second": "train/clips_per_second"}

Curve = tuple[tuple[int, float], ...]
"""(step, value), steps ascending."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """A training as its folder tells it."""

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
    """The shard sets, as `ray_jobs.tracking.inputs` keeps them."""
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
    """What `folder` tells.

    Raises:
        FileNotFoundError: it holds no recipe: no training was started there.
    """
    recipe, checkpoint = read_recipe(folder), newest_checkpoint(folder)
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
        tags=_tags(folder),
    )


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """What of a line is drawn."""
    if line["event"] == "step":
        named = {name: line.get(key) for key, name in _CURVES.items()}
    elif line["event"] == "eval":
        named = {f"{line['split']}/{name}": value for name, value in line["metrics"].items()}
    else:
        return {}
    return {name: float(value) for name, value in named.items() if value is not None}


def read_recipe(folder: Path) -> dict[str, Any]:
    """The resolved recipe of a run folder; raises as `read_run`."""
    return read_json(folder / RECIPE_NAME, dict[str, Any])


def registered_name(recipe: Mapping[str, Any]) -> str | None:
    """The name in MLflow's registry that a resolved recipe asks for; None where its model is not to be registered."""
    tracking = recipe.get("tracking", {})
    if not tracking.get("register_model", True):
        return None
    return model_name(str(recipe["name"]), tracking.get("registered_model"))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run folder."""
    return next(iter(list_checkpoints(folder / CHECKPOINTS_NAME)), None)


def class_names(checkpoint: Path) -> dict[str, list[str]]:
    """Class names of each target; empty where the checkpoint keeps none."""
    path = checkpoint / _CLASSES_DOCUMENT
    return read_json(path, _Classes)["classes"] if path.exists() else {}


class _Classes(TypedDict):
    classes: dict[str, list[str]]


def _tags(folder: Path) -> dict[str, str]:
    path = folder / STATE_NAME
    return read_json(path, _Tags)["tags"] if path.exists() else {}


class _Tags(TypedDict):
    tags: dict[str, str]
