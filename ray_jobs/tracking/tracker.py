"""What a person or the program asks of a run's record: send the rest of it, add numbers to it, read them back."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ca2st.errors import UserInputError
from ray_jobs.console import say
from ray_jobs.tracking.client import open_client, reachable, whole_uri
from ray_jobs.tracking.events import Value
from ray_jobs.tracking.metrics import MetricWriter
from ray_jobs.tracking.names import clean_name
from ray_jobs.tracking.sender import Sender
from ray_jobs.tracking.state import read_state

_WAIT_SECONDS = 60.0
"""For a follower to end that is still sending the run."""


def sync(run_dir: Path) -> int:
    """Send what MLflow does not have yet of a run's journal, system metrics and extras; all, if its run was deleted.

    Returns:
        The number of metric values sent.

    Raises:
        TrackingUnavailableError: the store cannot be reached; calling again later loses nothing.
        UserInputError: the folder is none of a training run.
    """
    return Sender(run_dir, say).send(wait_seconds=_WAIT_SECONDS, look=True)


def log_metrics(run_dir: Path, metrics: Mapping[str, float], *, step: int) -> None:
    """Add numbers that no journal holds, such as those of a test after the training, to the run's record.

    Their names are cleaned and those that are not finite become tags, as of the journal's numbers. The artefacts are
    sent again: the test has left its predictions.

    Raises:
        TrackingUnavailableError: the store cannot be reached.
    """
    sync(run_dir)
    state = read_state(run_dir)
    assert state.run_id is not None  # sync made it: a training that can be tested has a journal
    uri, now = whole_uri(state.uri, run_dir.parent), int(time.time() * 1000)
    values = [Value(name, value, now, step) for name, value in metrics.items()]
    with reachable(uri, f"repeat the test of {run_dir}"):
        MetricWriter(say).write(open_client(uri), state.run_id, values)
    Sender(run_dir, say).send_again(("artefacts",), wait_seconds=_WAIT_SECONDS)


def read_metrics(run_dir: Path, names: Sequence[str]) -> dict[str, float]:
    """The run's newest values in MLflow, by the names that `log_metrics` was given.

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
    if missing := sorted(name for name in names if clean_name(name) not in known):
        raise UserInputError(f"{run_dir}: MLflow has no {', '.join(missing)} for this run; test it again")
    return {name: known[clean_name(name)] for name in names}
