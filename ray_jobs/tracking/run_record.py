"""The run in MLflow: found or made once; its settings, tags and metrics, under names that MLflow takes.

MLflow refuses a whole batch for one bad name. Names there are letters and digits of any script, ``_ - . : /`` and
spaces, at most 250 characters, and would mean the same as a path; everything else is changed so that nothing is refused
or lost. A changed name ends in the hash of the original: two names never become one.
"""

import hashlib
import math
import posixpath
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from ray_jobs.redaction import redacted_values
from ray_jobs.tracking.client import Complaint, Say, artifact_location, may_exist
from ray_jobs.tracking.state import TrackingState

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY_TAG = "ca2st.key"
REPLACES_TAG = "ca2st.replaces"
CHANGED_TAG = "ca2st.changed"
NOT_FINITE_TAG = "ca2st.not_finite"
MAX_NAME_CHARACTERS = 250
"""Of a setting, tag, metric, run or experiment."""
MAX_PARAM_CHARACTERS = 6000
MAX_TAG_CHARACTERS = 8000
MAX_PARAMS = 10_000
LEFT_OUT = "ca2st.params_left_out"
"""The param that says how many were left out."""
WORLD_SIZE = "train/world_size"
"""Training processes of the steps that follow: an elastic run has more and fewer."""
SYSTEM_PREFIX = "system/"
"""Of what is measured on a node, beside the run and not of it."""
_CALL_VALUES = 1000
"""MLflow takes no more per call."""
_BAD_CHARACTER = re.compile(r"[^/\w.\- :]")
_BATCH_BYTES = 500_000  # a server takes a request of at most a million
_BATCH_ITEMS = 100
_CUT = "...(cut)"
_NOT_METRICS = frozenset({"event", "attempt", "step", "time", "sample_ids_hash"})
_RATES = ("clips_per_second", "data_wait_fraction")


class Value(NamedTuple):
    """One number of a metric."""

    name: str
    value: float
    milliseconds: int
    """Since 1970."""
    step: int


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run in MLflow; secrets are hidden in all that is written, and each change of a name or value is said."""

    client: "MlflowClient"
    run_id: str
    say: Say

    def log_params(self, params: Mapping[str, str], *, known: Collection[str] = ()) -> None:
        """Add settings that are not `known` yet: MLflow takes a param once."""
        from mlflow.entities import Param

        clean, changes = clean_params(redacted_values(params))
        for part in batches({name: value for name, value in clean.items() if name not in known}):
            self.client.log_batch(self.run_id, params=[Param(name, value) for name, value in part.items()])
        self._say_all(changes)

    def update_params(self, sent: Mapping[str, str], now: Mapping[str, str], *, attempt: int) -> None:
        """Record what a resumed run's settings are now: a change becomes a tag."""
        self.log_params({name: value for name, value in now.items() if name not in sent})
        changed = {
            f"{CHANGED_TAG}.{name}": f"{value} -> {now.get(name, '(absent)')} from attempt {attempt}"
            for name, value in redacted_values(sent).items()
            if now.get(name) != sent[name]
        }
        self.log_tags(changed)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        clean, changes = cleaned("tag", redacted_values(tags), MAX_TAG_CHARACTERS)
        for part in batches(clean):
            self.client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in part.items()])
        self._say_all(changes)

    def log_values(self, values: Sequence[Value]) -> int:
        """Send numbers; returns how many were sent.

        NaN and infinities, which MLflow's charts and comparisons cannot hold, become tags that name the step.

        Raises:
            MlflowException: the store cannot be reached; sending all again makes none of them double.
        """
        from mlflow.entities import Metric

        finite = [value for value in values if math.isfinite(value.value)]
        names = {value.name: clean_name(value.name) for value in finite}
        for start in range(0, len(finite), _CALL_VALUES):
            part = finite[start : start + _CALL_VALUES]
            metrics = [Metric(names[one.name], one.value, one.milliseconds, one.step) for one in part]
            self.client.log_batch(self.run_id, metrics=metrics)
        self._say_all(f"metric {name!a} is called {clean}" for name, clean in names.items() if clean != name)
        not_finite = [value for value in values if not math.isfinite(value.value)]
        self.log_tags({f"{NOT_FINITE_TAG}.{value.name}": f"at step {value.step}" for value in not_finite})
        return len(finite)

    def _say_all(self, changes: Iterable[str]) -> None:
        for change in changes:
            self.say(change)


def open_run(client: "MlflowClient", state: TrackingState, say: Say, *, begun: int | None) -> tuple[RunRecord, str]:
    """Make a run of `state` with its settings and tags, or find the one that a lost answer left behind.

    Returns it, and the id of its experiment.

    `begun`: when the training did, in milliseconds since 1970; MLflow may hear of it much later.

    Raises:
        StoreError: the experiment was deleted; says how to fix it.
    """
    experiment_id = _experiment(client, state)
    found = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{state.key}'", max_results=1)
    if found:
        run, known = found[0], found[0].data.params
    else:
        name = clean_value(state.run_name, MAX_NAME_CHARACTERS)
        tags = {KEY_TAG: state.key} | ({REPLACES_TAG: state.run_id} if state.run_id else {})
        run, known = client.create_run(experiment_id, start_time=begun, run_name=name, tags=tags), {}
    record = RunRecord(client, run.info.run_id, say)
    record.log_params(state.params, known=known)
    record.log_tags(state.tags)
    return record, experiment_id


def _experiment(client: "MlflowClient", state: TrackingState) -> str:
    name = clean_value(state.experiment, MAX_NAME_CHARACTERS)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        with may_exist():
            client.create_experiment(name, artifact_location=artifact_location(state.uri))
        experiment = client.get_experiment_by_name(name)
        assert experiment is not None
    if experiment.lifecycle_stage == "deleted":
        number = experiment.experiment_id
        complaint = Complaint(kind="rejected", detail=f"experiment {name!r}, number {number}, was deleted there")
        fix = (
            f"restore it by `mlflow experiments restore --experiment-id {number}`, remove it for good by `mlflow gc "
            f"--experiment-ids {number}`, or train with another tracking.experiment; then run `ca2st track sync` again"
        )
        raise complaint.error(state.uri, fix)
    return str(experiment.experiment_id)


def is_gone(client: "MlflowClient", run_id: str) -> bool:
    """Return whether the run was deleted in MLflow, or is of another store."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "deleted")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return True
        raise


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
    yield from _values(named, event, event["step"])


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
    yield from _values(named, end, steps[-1]["step"])


def system_values(line: Mapping[str, Any], node: str) -> Iterator[Value]:
    """Yield the numbers of a line of ``system/<node>.jsonl`` as ``system/<node>:<name>``.

    MLflow draws what has one ``/`` behind ``system`` last; a section for each node would come before ``train``.
    """
    named = {f"{SYSTEM_PREFIX}{node}:{name}": value for name, value in line["metrics"].items()}
    yield from _values(named, line, line["step"])


def milliseconds(line: Mapping[str, Any]) -> int:
    """Return when a line was written, since 1970."""
    return int(float(line["time"]) * 1000)


def _values(named: Mapping[str, object], line: Mapping[str, Any], step: int) -> Iterator[Value]:
    """Yield what of `named` is a number, as of the moment of `line`."""
    for name, value in named.items():
        if _is_number(value):
            yield Value(name, float(value), milliseconds(line), step)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _stage_name(name: str) -> str:
    """Return ``work/stage/...`` for times, ``work/data/...`` for counts.

    MLflow draws sections by the alphabet: ``train`` and ``validation`` come first.
    """
    return f"work/stage/{name}" if name.endswith("_seconds") else f"work/data/{name}"


def clean_name(name: str) -> str:
    """Return `name`, or the nearest name that MLflow takes, ending in eight digits of the original's hash."""
    is_plain = bool(name) and len(name) <= MAX_NAME_CHARACTERS and not _BAD_CHARACTER.search(name)
    if is_plain and posixpath.normpath(name) == name and name != "." and not name.startswith(("..", "/")):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    path = posixpath.normpath(_BAD_CHARACTER.sub("_", name)).lstrip("/.").strip() or "unnamed"
    return f"{path[: MAX_NAME_CHARACTERS - 9].rstrip('/')}-{digest}"


def clean_value(value: str, limit: int) -> str:
    """Return `value` as text that every store can hold, of at most `limit` characters; a cut is marked at its end."""
    text = value.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else text[: limit - len(_CUT)] + _CUT


def cleaned(kind: str, values: Mapping[str, str], limit: int) -> tuple[dict[str, str], list[str]]:
    """Return names and values that MLflow takes, and a sentence for each that is not as it was."""
    clean: dict[str, str] = {}
    changes = []
    for name, value in values.items():
        new_name, new_value = clean_name(name), clean_value(value, limit)
        if new_name != name:
            changes.append(f"{kind} {name!a} is called {new_name}")
        if new_value != value:
            changes.append(f"the value of {kind} {new_name}, {len(value)} characters, was cut or cleaned")
        clean[new_name] = new_value
    return clean, changes


def clean_params(params: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return as many params as MLflow takes, `cleaned`; the last of more says how many were left out."""
    if len(params) <= MAX_PARAMS:
        return cleaned("param", params, MAX_PARAM_CHARACTERS)
    kept = dict(list(params.items())[: MAX_PARAMS - 1])
    note = f"{len(params) - len(kept)} of {len(params)}; the run folder's recipe.json has all"
    clean, changes = cleaned("param", {**kept, LEFT_OUT: note}, MAX_PARAM_CHARACTERS)
    return clean, [*changes, f"params left out: {note}"]


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
