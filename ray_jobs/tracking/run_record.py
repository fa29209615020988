"""A run's record in MLflow.

What a run folder tells of its training, read without torch: by whoever sends the run to MLflow.

The run in MLflow: found or made once, replaced when somebody deleted it, its settings and tags kept true.

How long a store in trouble is left alone, and how often its trouble is told.

The one way in which numbers become metrics of a run in MLflow.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ca2st.checked_json import read_json
from ca2st.training.checkpoint import CHECKPOINTS_NAME, list_checkpoints
from ca2st.training.journal import JOURNAL_NAME, read_events
from ray_jobs.config.recipe import model_name
from ray_jobs.redaction import redacted_values
from ray_jobs.tracking.client import (
    MAX_EXPERIMENT_CHARACTERS,
    MAX_RUN_NAME_CHARACTERS,
    Complaint,
    StoreError,
    artifact_location,
    batches,
    clean_name,
    clean_params,
    clean_tags,
    clean_value,
)
from ray_jobs.tracking.events import STATE_NAME, TrackingState, Value
from ray_jobs.tracking.inputs import read_inputs
from sharding.format.remote import doubled_pause

if TYPE_CHECKING:
    from mlflow import MlflowClient


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


KEY_TAG = "ca2st.key"
REPLACES_TAG = "ca2st.replaces"
CHANGED_TAG = "ca2st.changed"
Say = Callable[[str], None]
"""Tells the follower's log a sentence."""


def create_run(client: "MlflowClient", state: TrackingState, say: Say, *, begun: int | None) -> str:
    """MLflow's id of a new run of `state` with its settings and tags; that of the run which a lost answer left behind.

    `begun`: when the training did, in milliseconds since 1970; MLflow may hear of it much later.

    Raises:
        StoreError: the experiment was deleted; says how to mend it.
    """
    experiment_id = _experiment(client, state)
    found = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{state.key}'", max_results=1)
    known: Mapping[str, str] = {}
    if found:
        run_id: str = found[0].info.run_id
        known = found[0].data.params
    else:
        name = clean_value(state.run_name, MAX_RUN_NAME_CHARACTERS)
        tags = {KEY_TAG: state.key} | ({REPLACES_TAG: state.run_id} if state.run_id else {})
        run_id = client.create_run(experiment_id, start_time=begun, run_name=name, tags=tags).info.run_id
    _log_params(client, run_id, state.params, say, known=known)
    log_tags(client, run_id, state.tags, say)
    return run_id


def update_params(
    client: "MlflowClient", run_id: str, sent: Mapping[str, str], now: Mapping[str, str], *, attempt: int, say: Say
) -> None:
    """Record what a resumed run's settings are now: MLflow takes a param once, so a change becomes a tag."""
    _log_params(client, run_id, {name: value for name, value in now.items() if name not in sent}, say)
    changed = {
        f"{CHANGED_TAG}.{name}": f"{value} -> {now.get(name, '(absent)')} from attempt {attempt}"
        for name, value in redacted_values(sent).items()
        if now.get(name) != sent[name]
    }
    log_tags(client, run_id, changed, say)


def log_tags(client: "MlflowClient", run_id: str, tags: Mapping[str, str], say: Say) -> None:
    """Set tags, in batches, secrets hidden."""
    from mlflow.entities import RunTag

    clean = clean_tags(redacted_values(tags))
    for part in batches(clean.values):
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in part.items()])
    for change in clean.changes:
        say(change)


def is_gone(client: "MlflowClient", run_id: str) -> bool:
    """Whether the run was deleted in MLflow, or is of another store."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "deleted")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return True
        raise


def _experiment(client: "MlflowClient", state: TrackingState) -> str:
    from mlflow.exceptions import MlflowException

    name = clean_value(state.experiment, MAX_EXPERIMENT_CHARACTERS)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_location(state.uri)))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)  # another run has just made it
        assert experiment is not None
    if experiment.lifecycle_stage == "deleted":
        number = experiment.experiment_id
        complaint = Complaint(kind="rejected", detail=f"experiment {name!r}, number {number}, was deleted there")
        mend = (
            f"restore it by `mlflow experiments restore --experiment-id {number}`, remove it for good by `mlflow gc "
            f"--experiment-ids {number}`, or train with another tracking.experiment; then run `ca2st track sync` again"
        )
        raise StoreError(complaint.told(state.uri, mend), complaint)
    return str(experiment.experiment_id)


def _log_params(
    client: "MlflowClient",
    run_id: str,
    params: Mapping[str, str],
    say: Say,
    *,
    known: Collection[str] = (),
) -> None:
    from mlflow.entities import Param

    clean = clean_params(redacted_values(params))
    for part in batches({name: value for name, value in clean.values.items() if name not in known}):
        client.log_batch(run_id, params=[Param(name, value) for name, value in part.items()])
    for change in clean.changes:
        say(change)


_LONGEST_SECONDS = 60.0
_REFUSED_SECONDS = 60.0
_LONGEST_ASKED_SECONDS = 600.0


def pause_seconds(failures: int, *, interval_seconds: float, complaint: Complaint | None = None) -> float:
    """Until the next try, after so many failures in a row: doubling up to a minute, or as long as the store asks.

    Credentials that are refused do not mend themselves: they wait the minute at once. More than ten minutes are not
    granted.
    """
    if failures == 0:
        return interval_seconds
    longest = max(interval_seconds, _LONGEST_SECONDS)
    pause = doubled_pause(failures, first_seconds=2 * interval_seconds, longest=longest)
    if complaint is None:
        return pause
    if complaint.kind == "refused":
        return max(pause, _REFUSED_SECONDS)
    return max(pause, min(complaint.retry_after_seconds or 0.0, _LONGEST_ASKED_SECONDS))


@dataclass(kw_only=True, slots=True)
class TroubleLog:
    """Tells a trouble once, how often it came back when it changes, and its end."""

    say: Say
    _signature: tuple[str, str] | None = None
    failures: int = 0
    """In a row, of whatever kind."""
    _repeats: int = 0

    def failed(self, error: StoreError) -> None:
        """A try failed."""
        self.failures += 1
        if error.complaint.signature == self._signature:
            self._repeats += 1
            return
        self._tell_repeats()
        self.say(str(error))
        self._signature, self._repeats = error.complaint.signature, 0

    def succeeded(self) -> None:
        """A try went well."""
        if self.failures:
            self._tell_repeats()
            self.say(f"MLflow answers again, after {self.failures} tries in vain")
        self._signature, self.failures, self._repeats = None, 0, 0

    def close(self) -> None:
        """No try follows."""
        self._tell_repeats()

    def _tell_repeats(self) -> None:
        if self._repeats:
            self.say(f"(the same {self._repeats} times more)")
        self._repeats = 0


NOT_FINITE_TAG = "ca2st.not_finite"
_CALL_VALUES = 1000
"""MLflow takes no more in a call."""


class MetricWriter:
    """Sends numbers under names that MLflow takes; tells each name that it changes once."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._names: dict[str, str] = {}

    def write(self, client: "MlflowClient", run_id: str, values: Sequence[Value]) -> int:
        """Send `values`; returns how many were sent.

        NaN and infinities, which MLflow's charts and comparisons cannot hold, become tags that name the step.

        Raises:
            MlflowException: the store cannot be reached; sending all again makes none of them double.
        """
        from mlflow.entities import Metric

        finite = [value for value in values if math.isfinite(value.value)]
        for start in range(0, len(finite), _CALL_VALUES):
            part = finite[start : start + _CALL_VALUES]
            metrics = [Metric(self._name(one.name), one.value, one.milliseconds, one.step) for one in part]
            client.log_batch(run_id, metrics=metrics)
        steps = {value.name: value.step for value in values if not math.isfinite(value.value)}
        self._tag_not_finite(client, run_id, steps)
        return len(finite)

    def _tag_not_finite(self, client: "MlflowClient", run_id: str, steps: Mapping[str, int]) -> None:
        if steps:
            tags = {f"{NOT_FINITE_TAG}.{name}": f"at step {step}" for name, step in steps.items()}
            log_tags(client, run_id, tags, self._say)

    def _name(self, name: str) -> str:
        if name not in self._names:
            clean = self._names[name] = clean_name(name)
            if clean != name:
                self._say(f"metric {name!a} is called {clean}")
        return self._names[name]
