"""What a Ray worker runs, from its start to its end.

Ray starts a worker group again whenever one of its workers raises. So a worker raises what a restart may fix, and
returns, with the reason on record, where it cannot: then the run is over and no restart is spent on it.

Ray runs a worker's training in a thread, where no signal arrives. A second thread looks for the driver's stop file and
for Ray's notice that a node will be taken away; whatever one rank sees, all ranks agree on at the next step.
"""

import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ca2st.errors import CA2STError
from ca2st.training.errors import RunStoppedError
from ca2st.training.journal import JOURNAL_NAME
from ca2st.training.signals import StopRequest
from ray_jobs import environment
from ray_jobs.cluster.every_node import this_node
from ray_jobs.cluster.supervision import LaunchFolder
from ray_jobs.console import say
from ray_jobs.runs.failures import keep_failure, read_failure, record_of
from ray_jobs.runs.worker import Job, run

if TYPE_CHECKING:
    from ray.train.v2.api.preemption import PreemptionInfo

Status = Literal["done", "stopped", "failed"]
_LOGGER = logging.getLogger(__name__)
_PREEMPTED = int(signal.SIGHUP)
"""How a notice reaches the training loop. Ranks take the highest number any of them saw: a person's SIGINT or
SIGTERM at the same time counts for more."""
_POLL_SECONDS = 0.5


class AttemptFailedError(CA2STError):
    """What a worker reports to Ray of its failure: text alone, since not every error survives the way to the driver."""


def train_on_worker(settings: dict[str, Any]) -> dict[str, str]:
    """Train as one worker, from its start to its end: Ray has set up the process group that Accelerate joins.

    `settings`: ``recipe`` and ``run_dir`` as in `Job`, ``folder`` of the launch. Returns ``status`` (see `Status`) and
    a ``message``, and the ``exit_code`` of a failure: a full disk keeps no record of it.

    Raises:
        AttemptFailedError: this attempt failed, another may not.
    """
    from ray import train
    from ray.train.collective import broadcast_from_rank_zero

    job, folder = Job(recipe=settings["recipe"], run_dir=settings["run_dir"]), LaunchFolder(Path(settings["folder"]))
    rank = train.get_context().get_world_rank()
    attempt, over = broadcast_from_rank_zero(_begin(folder) if rank == 0 else None)
    if over is not None:
        return _ended(over, "")
    faults = environment.fault_points(restart=(folder.run_dir / JOURNAL_NAME).exists()).on_rank(rank)
    try:
        folder.begin(attempt, rank=rank, node=node_name())  # fails on a node that joined later and shares no storage
        with watching(lambda: folder.stop_signal() or _notice()) as stop:
            outcome = run(job, faults=faults, stop=stop)
    except RunStoppedError as error:
        asked = patient(folder.stop_signal)  # a worker that fails here is a failure to Ray, and ends all too early
        if not asked():
            if rank == 0:
                say(f"{_announced()}: the state is saved; Ray starts the workers again when the notice has run out")
            hold(asked)
        return _ended("stopped", str(error))
    except Exception as error:  # noqa: BLE001  # put on record, then raised again or reported to the driver
        return _failed(error, folder, attempt=attempt, rank=rank)
    train.report({"steps": outcome.steps})
    return _ended("done", "")


def node_name() -> str:
    """Return host name and address of this node."""
    return f"{socket.gethostname()} ({this_node().address})"


@contextlib.contextmanager
def watching(ask: Callable[[], int], *, poll_seconds: float = _POLL_SECONDS) -> Iterator[StopRequest]:
    """Ask every `poll_seconds` while the block runs; the first number that is not 0 becomes a stop request.

    An `ask` that fails (storage that does not answer) is logged once and asked again.
    """
    stop, ended, ask = StopRequest(), threading.Event(), patient(ask)

    def watch() -> None:
        while not ended.wait(poll_seconds):
            if number := ask():
                stop.request(number)
                return

    watcher = threading.Thread(target=watch, name="stop-watch", daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        ended.set()
        watcher.join()


def patient(ask: Callable[[], int]) -> Callable[[], int]:
    """Return `ask`, with 0 for an answer while it fails; the first failure is logged."""
    troubled = False

    def answer() -> int:
        nonlocal troubled
        try:
            return ask()
        except (OSError, ValueError) as error:
            if not troubled:
                _LOGGER.warning("cannot see whether to stop, trying again: %s", error)
            troubled = True
            return 0

    return answer


def hold(until: Callable[[], int], *, poll_seconds: float = _POLL_SECONDS) -> None:
    """Wait, the state being saved, for Ray to take this worker down: it does when the notice has run out.

    Ending before would not do: Ray counts a run whose workers return as finished and one whose workers fail as failed.
    Returns only when `until` says that a person asked to stop after all.
    """
    while not until():
        time.sleep(poll_seconds)


def preemption_notice() -> "PreemptionInfo | None":
    """Return Ray's notice that nodes of this worker group will be taken away, as this worker has it; None: none.

    Ray's public ``get_preemption_info`` waits for all ranks; a thread of one rank must not.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info


def _begin(folder: LaunchFolder) -> tuple[int, Status | None]:
    """Return, as rank 0 decides for all, the number of this attempt and whether the launch is over already."""
    failure = read_failure(folder.run_dir)
    over: Status | None = None
    if failure is not None and failure.final and failure.launch == folder.name:
        over = "failed"
    elif folder.stop_signal():
        over = "stopped"
    return folder.num_attempts() + 1, over


def _notice() -> int:
    return 0 if preemption_notice() is None else _PREEMPTED


def _announced() -> str:
    notice = preemption_notice()
    if notice is None:  # another rank has heard of it first
        return "a node will be taken away"
    return f"node {', '.join(node_id[:8] for node_id in notice.preempted_node_ids)} will be taken away"


def _failed(error: Exception, folder: LaunchFolder, *, attempt: int, rank: int) -> dict[str, str]:
    own = record_of(
        error,
        rank=rank,
        node=node_name(),
        attempt=attempt,
        launch=folder.name,
        before=read_failure(folder.run_dir),
    )
    kept = keep_failure(folder.run_dir, own)
    if own.final or (kept.final and kept.launch == own.launch and kept.attempt == attempt):
        if not own.echo:
            _LOGGER.error("%s", own)
        return _ended("failed", str(kept)) | {"exit_code": str(kept.exit_code)}
    raise AttemptFailedError(str(kept)) from error


def _ended(status: Status, message: str) -> dict[str, str]:
    return {"status": status, "message": message}
