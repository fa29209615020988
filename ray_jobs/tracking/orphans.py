"""Runs that MLflow believes to be running although everything that trained them was killed.

Whoever follows the next run of the same experiment ends them. Only a run of this machine is touched, whose folder is
here and belongs to that very run, and in whose folder neither a training nor a follower holds its lock. When such a
run is resumed it is RUNNING again, in the same MLflow run.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ca2st.durable import open_itself, take_lock
from ca2st.errors import CA2STError, UserInputError
from ca2st.training.journal import JOURNAL_NAME
from ca2st.training.journal import LOCK_NAME as RUN_LOCK_NAME
from ray_jobs.errors import TrackingUnavailableError
from ray_jobs.tracking.client import open_client, reachable, whole_uri
from ray_jobs.tracking.events import FOLDER_TAG, one_sender, read_state
from ray_jobs.tracking.run_record import Say
from ray_jobs.tracking.sender import EXIT_TAG, Sender

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

HOST_TAG = "ca2st.host"
FOLLOWER_LOCK_NAME = "follower.lock"
_MOST = 200
_LOOK_SECONDS = 0.15


@contextlib.contextmanager
def alive(run_dir: Path) -> Iterator[None]:
    """Show that a follower of this run lives; several may. The kernel takes the sign away however it ends."""
    with open_itself(run_dir / FOLLOWER_LOCK_NAME, "ab") as file:
        take_lock(file, shared=True, wait_seconds=math.inf)
        yield


def show_ready(run_dir: Path) -> None:
    """Leave this follower's process number beside its lock: what it waits for from now on is the store."""
    (run_dir / FOLLOWER_LOCK_NAME).write_text(str(os.getpid()))


def is_ready(run_dir: Path, pid: int) -> bool:
    """Whether the follower with this process number has called `show_ready`."""
    path = run_dir / FOLLOWER_LOCK_NAME
    return path.exists() and path.read_text() == str(pid)


def is_alive(run_dir: Path) -> bool:
    """Whether somebody on this machine trains or follows the run of this folder."""
    return _is_held(run_dir / RUN_LOCK_NAME, shared=True) or _is_held(run_dir / FOLLOWER_LOCK_NAME, shared=False)


def end_orphans(
    run_dir: Path, *, host: str, say: Say, is_asked_to_end: Callable[[], bool] = lambda: False
) -> list[str]:
    """Send the rest of each orphan in the experiment of `run_dir`'s run and end it as KILLED; returns their ids.

    Once `is_asked_to_end` is true the others, and the one in work, are left for the next start.

    Raises:
        TrackingUnavailableError: the store cannot be reached.
    """
    state = read_state(run_dir)
    if state.run_id is None:
        return []
    uri = whole_uri(state.uri, run_dir.parent)
    with reachable(uri, "start a run"):
        client = open_client(uri)
        experiment_id = client.get_run(state.run_id).info.experiment_id
        running = f"attributes.status = 'RUNNING' and tags.`{HOST_TAG}` = '{host}'"
        found = client.search_runs([experiment_id], running, max_results=_MOST)
        others = [run for run in found if run.info.run_id != state.run_id]
        return [run.info.run_id for run in others if not is_asked_to_end() and _end(client, run, say, is_asked_to_end)]


def _end(client: "MlflowClient", run: "Run", say: Say, is_asked_to_end: Callable[[], bool]) -> bool:
    run_id, folder = run.info.run_id, Path(run.data.tags.get(FOLDER_TAG, ""))
    try:
        if not folder.is_absolute() or read_state(folder).run_id != run_id or is_alive(folder):
            return False
        with contextlib.suppress(TrackingUnavailableError):  # what cannot be sent stays in its journal
            Sender(folder, say, is_asked_to_end=is_asked_to_end).send()
        if is_asked_to_end():  # a part may be missing still
            return False
        with one_sender(folder, wait_seconds=0.0):
            if is_alive(folder) or client.get_run(run_id).info.status != "RUNNING":
                return False
            client.set_tag(run_id, EXIT_TAG, "killed")
            client.set_terminated(run_id, status="KILLED", end_time=_last_sign(folder))
    except (UserInputError, TrackingUnavailableError):  # no folder of ours here, or somebody is sending it
        return False
    except (
        CA2STError,
        OSError,
        ValueError,
        TypeError,
        KeyError,
    ) as error:  # another version's, damaged, another user's
        say(f"run {run_id} of {folder} seems to be killed, but is left as it is: {type(error).__name__}: {error}")
        return False
    say(f"run {run_id} of {folder} was killed without an end: it is KILLED in MLflow now, until it is resumed")
    return True


def _last_sign(folder: Path) -> int | None:
    """When the run last wrote a line, in milliseconds since 1970; None: now."""
    journal = folder / JOURNAL_NAME
    return int(journal.stat().st_mtime * 1000) if journal.exists() else None


def _is_held(path: Path, *, shared: bool) -> bool:
    """Return whether a lock is refused for a while.

    Looking takes the lock for an instant. A training that begins just then tries again for seconds (`locked`), and
    who looks at the same time, for as long as it takes here; a holder keeps its lock for as long as it lives.
    """
    if not path.exists():
        return False
    with path.open("rb+") as file:  # NFS locks for one alone only what is open for writing
        return not take_lock(file, shared=shared, wait_seconds=_LOOK_SECONDS)
