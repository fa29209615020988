"""What the rest of the program uses of tracking: send a run, read what is known of it, add and read numbers."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ca2st.errors import UserInputError
from ray_jobs.console import say
from ray_jobs.tracking.client import open_client, reachable, whole_uri
from ray_jobs.tracking.sender import Sender
from ray_jobs.tracking.state import TrackingState, open_tracking, read_state, unsent_bytes

__all__ = [
    "TrackingState",
    "log_metrics",
    "open_client",
    "open_tracking",
    "reachable",
    "read_metrics",
    "read_state",
    "sync",
    "unsent_bytes",
]

_WAIT_SECONDS = 60.0
"""For a follower to end that is still sending the run."""


def sync(run_dir: Path) -> int:
    """Send what MLflow does not have yet of a run's journal, system metrics and extras.

    Returns:
        The number of metric values sent.

    Raises:
        TrackingUnavailableError: the store cannot be reached; calling again later loses nothing.
        UserInputError: the folder is none of a training run.
    """
    return Sender(run_dir, say).send(wait_seconds=_WAIT_SECONDS)


def log_metrics(run_dir: Path, metrics: Mapping[str, float], *, step: int) -> None:
    """Add numbers that no journal holds, such as those of a test after the training, to the run's record.

    The artefacts are sent again: the test has left its predictions.

    Raises:
        TrackingUnavailableError: the store cannot be reached.
    """
    from mlflow.entities import Metric

    sync(run_dir)
    state = read_state(run_dir)
    assert state.run_id is not None  # sync made it: a training that can be tested has a journal
    uri, now = whole_uri(state.uri, run_dir.parent), int(time.time() * 1000)
    with reachable(uri, f"repeat the test of {run_dir}"):
        open_client(uri).log_batch(state.run_id, metrics=[Metric(k, v, now, step) for k, v in metrics.items()])
    Sender(run_dir, say).send_again(("artefacts",), wait_seconds=_WAIT_SECONDS)


def read_metrics(run_dir: Path, names: Sequence[str]) -> dict[str, float]:
    """The run's newest values in MLflow.

    Raises:
        TrackingUnavailableError: the store cannot be reached.
        UserInputError: the run has no such metric, or was never sent.
    """
    state = read_state(run_dir)
    if state.run_id is None:
        raise UserInputError(f"{run_dir}: MLflow has no run of it yet; send it by `ca2st track sync {run_dir}`")
    uri = whole_uri(state.uri, run_dir.parent)
    with reachable(uri, f"send the run by `ca2st track sync {run_dir}`"):
        known = open_client(uri).get_run(state.run_id).data.metrics
    if missing := sorted(set(names) - known.keys()):
        raise UserInputError(f"{run_dir}: MLflow has no {', '.join(missing)} for this run; test it again")
    return {name: known[name] for name in names}
