"""MLflow follows the journal: training writes metrics to a local file, this module sends them on.

Training never waits for MLflow. The journal is the truth; what was sent is remembered in ``tracking.json`` beside
it, so a follower that was killed, or a server that was down, costs nothing but time: `sync` sends the rest.
One MLflow run stands for a training run through all its attempts; a step is sent once, whichever attempt made it.
"""

import fcntl
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ca2st.durable import write_bytes
from ca2st.errors import UserInputError
from ray_jobs.errors import TrackingUnavailableError

if TYPE_CHECKING:
    from mlflow import MlflowClient

STATE_NAME = "tracking.json"
LOCK_NAME = "tracking.lock"
JOURNAL_NAME = "journal.jsonl"
_BATCH_VALUES = 500  # MLflow takes at most 1000 metrics a call
_MAX_PARAM_CHARACTERS = 6000
_NOT_METRICS = frozenset({"event", "attempt", "step", "time", "sample_ids_hash"})


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingState:
    """What the run is called in MLflow and how far the journal has been sent."""

    uri: str
    """MLflow tracking URI: ``sqlite:///path`` or a server's address."""
    experiment: str
    run_name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    run_id: str | None = None
    """MLflow's run, made at the first sync."""
    sent_bytes: int = 0
    """Length of the journal's prefix that MLflow has."""
    last_step: int = -1
    """Highest step sent: a resumed attempt's repeated steps are not sent again."""


def open_tracking(run_dir: Path, state: TrackingState) -> TrackingState:
    """Keep `state` beside the journal, or the one that is there already when the run is resumed."""
    with _one_at_a_time(run_dir):
        if (run_dir / STATE_NAME).exists():
            kept = read_state(run_dir)
            state = replace(kept, uri=state.uri, tags={**kept.tags, **state.tags})
        _write_state(run_dir, state)
    return state


def read_state(run_dir: Path) -> TrackingState:
    """The tracking state of a run folder.

    Raises:
        UserInputError: the folder has none: no training with tracking was started there.
    """
    path = run_dir / STATE_NAME
    try:
        return TrackingState(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserInputError(f"{path}: no such file; expected the folder of a training run") from None


def _write_state(run_dir: Path, state: TrackingState) -> None:
    write_bytes(run_dir / STATE_NAME, (json.dumps(asdict(state), indent=1) + "\n").encode(), point="tracking")


def sync(run_dir: Path) -> int:
    """Send what MLflow does not have yet; returns the number of metric values sent.

    Raises:
        TrackingUnavailableError: the store cannot be reached; calling again later loses nothing.
    """
    uri = read_state(run_dir).uri
    with _one_at_a_time(run_dir), reachable(uri, f"the journal keeps everything: rerun `ca2st track sync {run_dir}`"):
        state = read_state(run_dir)
        if state.run_id is None and not unsent_bytes(run_dir):
            return 0  # a run that ends before its first line would stay RUNNING for ever
        client = open_client(state.uri)
        if state.run_id is None:
            state = replace(state, run_id=_create_run(client, state))
            _write_state(run_dir, state)
        return _send(client, run_dir, state)


def log_metrics(run_dir: Path, metrics: Mapping[str, float], *, step: int) -> None:
    """Add numbers that no journal holds, such as those of a test after the training, to the run's record.

    Raises:
        TrackingUnavailableError: the store cannot be reached.
    """
    from mlflow.entities import Metric

    sync(run_dir)
    state = read_state(run_dir)
    assert state.run_id is not None  # sync made it: a training that can be tested has a journal
    now = int(time.time() * 1000)
    with reachable(state.uri, f"repeat the test of {run_dir}"):
        open_client(state.uri).log_batch(state.run_id, metrics=[Metric(k, v, now, step) for k, v in metrics.items()])


def read_metrics(run_dir: Path, names: Sequence[str]) -> dict[str, float]:
    """The run's newest values in MLflow.

    Raises:
        TrackingUnavailableError: the store cannot be reached.
        UserInputError: the run has no such metric, or was never sent.
    """
    state = read_state(run_dir)
    if state.run_id is None:
        raise UserInputError(f"{run_dir}: MLflow has no run of it yet; send it by `ca2st track sync {run_dir}`")
    with reachable(state.uri, f"send the run by `ca2st track sync {run_dir}`"):
        known = open_client(state.uri).get_run(state.run_id).data.metrics
    if missing := sorted(set(names) - known.keys()):
        raise UserInputError(f"{run_dir}: MLflow has no {', '.join(missing)} for this run; test it again")
    return {name: known[name] for name in names}


@contextmanager
def _one_at_a_time(run_dir: Path) -> Iterator[None]:
    """Wait for whoever is sending this run: the follower of a killed attempt outlives it by a last sync.

    Two of them at once would make two MLflow runs. The kernel releases the lock when its holder ends, however it ends.
    """
    with (run_dir / LOCK_NAME).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def reachable(uri: str, what_to_do: str) -> Iterator[None]:
    """Turn the errors of a store that does not answer into one that says `what_to_do` when it is back.

    Raises:
        TrackingUnavailableError: the store cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise TrackingUnavailableError(
            f"MLflow at {uri} cannot be reached ({str(error).splitlines()[0]}); {what_to_do} when it is back"
        ) from error


def follow(run_dir: Path, *, parent_pid: int, interval_seconds: float = 2.0) -> None:
    """Sync again and again until SIGTERM asks for the last time, or the process that trains is gone."""
    asked_to_end = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: asked_to_end.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        is_last = asked_to_end.wait(interval_seconds) or os.getppid() != parent_pid
        try:
            sync(run_dir)
        except TrackingUnavailableError as error:
            print(error, flush=True)  # noqa: T201  # the follower's own log file
        if is_last:
            return


def unsent_bytes(run_dir: Path) -> int:
    """Length of the journal's part that MLflow does not have; 0 while there is no journal."""
    journal = run_dir / JOURNAL_NAME
    return journal.stat().st_size - read_state(run_dir).sent_bytes if journal.exists() else 0


def open_client(uri: str) -> "MlflowClient":
    """A client that gives up on a dead server within seconds; the folder of an SQLite store is made."""
    # A dead server would otherwise be retried for four minutes a call.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow import MlflowClient

    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def _create_run(client: "MlflowClient", state: TrackingState) -> str:
    from mlflow.entities import Param

    experiment = client.get_experiment_by_name(state.experiment)
    experiment_id = (
        experiment.experiment_id
        if experiment is not None
        else client.create_experiment(state.experiment, artifact_location=_artifact_location(state.uri))
    )
    run = client.create_run(experiment_id, run_name=state.run_name, tags=dict(state.tags))
    run_id: str = run.info.run_id
    params = [Param(name, value[:_MAX_PARAM_CHARACTERS]) for name, value in state.params.items()]
    for start in range(0, len(params), 100):
        client.log_batch(run_id, params=params[start : start + 100])
    return run_id


def _artifact_location(uri: str) -> str | None:
    """Beside an SQLite store; a server decides for itself."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlflow-artifacts").as_uri()


def _send(client: "MlflowClient", run_dir: Path, state: TrackingState) -> int:
    from mlflow.entities import Metric

    assert state.run_id is not None
    sent = 0
    for events, end_offset in _event_batches(run_dir / JOURNAL_NAME, state.sent_bytes):
        metrics: list[Metric] = []
        last_step = state.last_step
        for event in events:
            if event["event"] == "step" and event["step"] <= last_step:
                continue
            if event["event"] in ("step", "eval"):
                metrics += [Metric(name, value, _milliseconds(event), event["step"]) for name, value in _values(event)]
            if event["event"] == "step":
                last_step = event["step"]
        client.log_batch(state.run_id, metrics=metrics)
        _set_status(client, state.run_id, events)
        state = replace(state, sent_bytes=end_offset, last_step=last_step)
        _write_state(run_dir, state)
        sent += len(metrics)
    return sent


def _set_status(client: "MlflowClient", run_id: str, events: list[dict[str, Any]]) -> None:
    for event in events:
        if event["event"] == "start":
            client.update_run(run_id, status="RUNNING")
            client.set_tag(run_id, "ca2st.attempt", str(event["attempt"]))
        elif event["event"] == "end":
            status = {"done": "FINISHED", "stopped": "KILLED"}.get(event["status"], "FAILED")
            client.set_terminated(run_id, status=status, end_time=_milliseconds(event))


def _values(event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Finite numbers of an event under MLflow names: ``train/loss``, ``stage/decode_seconds``, ``validation/top1``."""
    if event["event"] == "step":
        named = {f"train/{name}": value for name, value in event.items() if name not in _NOT_METRICS}
        for times in ("stages", "loader"):
            named |= {_stage_name(name): value for name, value in event.get(times, {}).items()}
    else:
        named = {f"{event['split']}/{name}": value for name, value in event["metrics"].items()}
    for name, value in named.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and math.isfinite(value):
            yield name, float(value)


def _stage_name(name: str) -> str:
    """Times of the step and of the loader's threads side by side; what the loader counts is ``data/bytes_read``."""
    return f"stage/{name}" if name.endswith("_seconds") else f"data/{name}"


def _event_batches(journal: Path, offset: int) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Whole lines behind `offset`, in batches small enough for one call, with the offset behind each."""
    if not journal.exists():
        return
    batch: list[dict[str, Any]] = []
    num_values = 0
    with journal.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                break
            event = json.loads(line)
            batch.append(event)
            num_values += len(event) + sum(len(value) for value in event.values() if isinstance(value, dict))
            offset += len(line)
            if num_values > _BATCH_VALUES:
                yield batch, offset
                batch, num_values = [], 0
    if batch:
        yield batch, offset


def _milliseconds(event: Mapping[str, Any]) -> int:
    return int(float(event["time"]) * 1000)
