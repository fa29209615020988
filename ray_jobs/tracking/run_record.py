"""The run in MLflow: found or made once, replaced when somebody deleted it, its settings, tags and metrics written.

MLflow refuses a whole batch for one bad name. Names there are letters and digits of any script, ``_ - . : /`` and
spaces, at most 250 characters, and would mean the same as a path; everything else is changed so that nothing is refused
or lost. A changed name ends in the hash of the original: two names never become one.
"""

import hashlib
import math
import posixpath
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ray_jobs.redaction import redacted_values
from ray_jobs.tracking.client import Complaint, Say, StoreError, artifact_location
from ray_jobs.tracking.state import TrackingState

if TYPE_CHECKING:
    from mlflow import MlflowClient


KEY_TAG = "ca2st.key"
REPLACES_TAG = "ca2st.replaces"
CHANGED_TAG = "ca2st.changed"
NOT_FINITE_TAG = "ca2st.not_finite"
_CALL_VALUES = 1000
"""MLflow takes no more per call."""
MAX_NAME_CHARACTERS = 250
MAX_PARAM_CHARACTERS = 6000
MAX_TAG_CHARACTERS = 8000
MAX_RUN_NAME_CHARACTERS = 250
MAX_EXPERIMENT_CHARACTERS = 250
MAX_PARAMS = 10_000
LEFT_OUT = "ca2st.params_left_out"
"""The param that says how many were left out."""
_BAD_CHARACTER = re.compile(r"[^/\w.\- :]")
_BATCH_BYTES = 500_000  # a server takes a request of at most a million
_BATCH_ITEMS = 100
_CUT = "...(cut)"
_NOT_METRICS = frozenset({"event", "attempt", "step", "time", "sample_ids_hash"})
WORLD_SIZE = "train/world_size"
"""Training processes of the steps that follow: an elastic run has more and fewer."""
SYSTEM_PREFIX = "system/"
"""Of what is measured on a node, beside the run and not of it."""


def create_run(client: "MlflowClient", state: TrackingState, say: Say, *, begun: int | None) -> tuple[str, str]:
    """Make a run of `state` with its settings and tags, or find the one that a lost answer left behind.

    Returns its id, and that of its experiment.

    `begun`: when the training did, in milliseconds since 1970; MLflow may hear of it much later.

    Raises:
        StoreError: the experiment was deleted; says how to fix it.
    """
    experiment_id = _experiment(client, state)
    found = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{state.key}'", max_results=1)
    known: Mapping[str, str] = found[0].data.params if found else {}
    if found:
        run_id: str = found[0].info.run_id
    else:
        name = clean_value(state.run_name, MAX_RUN_NAME_CHARACTERS)
        tags = {KEY_TAG: state.key} | ({REPLACES_TAG: state.run_id} if state.run_id else {})
        run_id = client.create_run(experiment_id, start_time=begun, run_name=name, tags=tags).info.run_id
    _log_params(client, run_id, state.params, say, known=known)
    log_tags(client, run_id, state.tags, say)
    return run_id, experiment_id


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
    """Return whether the run was deleted in MLflow, or is of another store."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "deleted")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return True
        raise


class Value(NamedTuple):
    """One number of a metric."""

    name: str
    value: float
    milliseconds: int
    """Since 1970."""
    step: int


class MetricWriter:
    """Sends numbers under names that MLflow takes; reports each name that it changes once."""

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


def step_values(event: Mapping[str, Any]) -> Iterator[Value]:
    """Yield the numbers of a line: ``train/loss``, ``validation/top1``, ``work/stage/decode_seconds``, ...

    A metric of an evaluation that was not finite, which the journal holds by name only, is NaN.
    """
    if event["event"] == "step":
        named = {f"train/{name}": value for name, value in event.items() if name not in _NOT_METRICS}
        for times in ("stages", "loader"):
            named |= {_stage_name(name): value for name, value in event.get(times, {}).items()}
    elif event["event"] == "eval":
        metrics = event["metrics"] | dict.fromkeys(event.get("not_finite", ()), math.nan)
        named = {f"{event['split']}/{name}": value for name, value in metrics.items()}
    elif event["event"] == "start":
        named = {WORLD_SIZE: event.get("topology", {}).get("world_size")}
    else:
        return
    for name, value in named.items():
        if _is_number(value):
            yield Value(name, float(value), milliseconds(event), event["step"])


_RATES = ("clips_per_second", "data_wait_fraction")


def mean_values(steps: Sequence[Mapping[str, Any]], end: Mapping[str, Any]) -> Iterator[Value]:
    """Yield the means over a whole run of what varies from step to step and tells how fast it was: rates and stages.

    They take the place of the last step's values, which MLflow's tables show, and are of the moment of the line `end`.
    Rates are weighed by the time of their steps.
    """
    if not steps:
        return
    seconds = [float(line.get("step_seconds", 0.0)) for line in steps]
    named: dict[str, float] = {}
    for rate in _RATES:
        if sum(seconds) > 0 and all(_is_number(line.get(rate)) for line in steps):
            weighed = sum(line[rate] * spent for line, spent in zip(steps, seconds, strict=True))
            named[f"train/{rate}"] = weighed / sum(seconds)
    if all("step_seconds" in line for line in steps):
        named["train/step_seconds"] = sum(seconds) / len(steps)
    for times in ("stages", "loader"):
        for name in steps[-1].get(times, {}):
            values = [line.get(times, {}).get(name, 0) for line in steps]
            named[_stage_name(name)] = sum(values) / len(steps)
    for name, value in named.items():
        yield Value(name, float(value), milliseconds(end), steps[-1]["step"])


def system_values(line: Mapping[str, Any], node: str) -> Iterator[Value]:
    """Yield the numbers of a line of ``system/<node>.jsonl`` as ``system/<node>:<name>``.

    MLflow draws what has one ``/`` behind ``system`` last; a section for each node would come before ``train``.
    """
    for name, value in line["metrics"].items():
        if _is_number(value):
            yield Value(f"{SYSTEM_PREFIX}{node}:{name}", float(value), milliseconds(line), int(line["step"]))


def milliseconds(line: Mapping[str, Any]) -> int:
    """Return when a line was written, since 1970."""
    return int(float(line["time"]) * 1000)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _stage_name(name: str) -> str:
    """Return ``work/stage/...`` for times, ``work/data/...`` for counts.

    MLflow draws sections by the alphabet: ``train`` and ``validation`` come first.
    """
    return f"work/stage/{name}" if name.endswith("_seconds") else f"work/data/{name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cleaned:
    """Names and values that MLflow takes, and what was done to the originals."""

    values: Mapping[str, str]
    changes: tuple[str, ...]
    """A sentence for each name or value that is not as it was."""


def clean_name(name: str) -> str:
    """Return `name`, or the nearest name that MLflow takes, ending in eight digits of the original's hash."""
    if _is_taken(name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    path = posixpath.normpath(_BAD_CHARACTER.sub("_", name)).lstrip("/.").strip() or "unnamed"
    return f"{path[: MAX_NAME_CHARACTERS - 9].rstrip('/')}-{digest}"


def clean_value(value: str, limit: int) -> str:
    """Return `value` as text that every store can hold, of at most `limit` characters; a cut is marked at its end."""
    text = value.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else text[: limit - len(_CUT)] + _CUT


def clean_params(params: Mapping[str, str], *, limit: int = MAX_PARAMS) -> Cleaned:
    """Return at most `limit` params; the last of more says how many were left out."""
    if len(params) <= limit:
        return _cleaned("param", params, MAX_PARAM_CHARACTERS)
    kept = dict(list(params.items())[: limit - 1])
    note = f"{len(params) - len(kept)} of {len(params)}; the run folder's recipe.json has all"
    clean = _cleaned("param", {**kept, LEFT_OUT: note}, MAX_PARAM_CHARACTERS)
    return Cleaned(values=clean.values, changes=(*clean.changes, f"params left out: {note}"))


def clean_tags(tags: Mapping[str, str]) -> Cleaned:
    """Return tags that MLflow takes."""
    return _cleaned("tag", tags, MAX_TAG_CHARACTERS)


def batches(values: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield `values` in their order, in parts small enough for one call."""
    part: dict[str, str] = {}
    num_bytes = 0
    for name, value in values.items():
        size = len(name.encode()) + len(value.encode())
        if part and (len(part) == _BATCH_ITEMS or num_bytes + size > _BATCH_BYTES):
            yield part
            part, num_bytes = {}, 0
        part[name] = value
        num_bytes += size
    if part:
        yield part


def _cleaned(kind: str, values: Mapping[str, str], limit: int) -> Cleaned:
    clean: dict[str, str] = {}
    changes = []
    for name, value in values.items():
        new_name, new_value = clean_name(name), clean_value(value, limit)
        if new_name != name:
            changes.append(f"{kind} {name!a} is called {new_name}")
        if new_value != value:
            changes.append(f"the value of {kind} {new_name}, {len(value)} characters, was cut or cleaned")
        clean[new_name] = new_value
    return Cleaned(values=clean, changes=tuple(changes))


def _is_taken(name: str) -> bool:
    is_plain = bool(name) and len(name) <= MAX_NAME_CHARACTERS and not _BAD_CHARACTER.search(name)
    return is_plain and posixpath.normpath(name) == name and name != "." and not name.startswith(("..", "/"))


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
        fix = (
            f"restore it by `mlflow experiments restore --experiment-id {number}`, remove it for good by `mlflow gc "
            f"--experiment-ids {number}`, or train with another tracking.experiment; then run `ca2st track sync` again"
        )
        raise StoreError(complaint.sentence(state.uri, fix), complaint)
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
