"""Workers of a cluster watched: lost, stopping, supervised.

How a driver and its workers talk: small files in the run folder, in a folder of their own for every launch.

Training must not wait for a message, and a node may be gone: files on the shared storage, which the run needs anyway,
ask nothing more of the cluster.

Workers that died without a word: Ray tells of them, and they are put on record with their node.

How a worker learns that it should save and stop, and how a driver ends that has nothing to save yet.

Ray runs a worker's training in a thread, where no signal arrives. A second thread looks for the driver's stop file and
for Ray's notice that a node will be taken away; whatever one rank sees, all ranks agree on at the next step.

The driver while the workers train: it passes a stop on to them, and ends what no restart can mend.
"""

import contextlib
import json
import logging
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train.v2.api.callback import UserCallback

from ca2st.durable import write_bytes
from ca2st.errors import EnvironmentFault
from ca2st.training.signals import ONE_REQUEST_SECONDS, StopRequest, stop_on_signals, stopped_error
from ray_jobs.cluster.every_node import living_nodes
from ray_jobs.cluster.ray_access import first_line
from ray_jobs.console import say
from ray_jobs.runs.failures import FailureRecord, error_of, error_told, keep_failure, read_failure

if TYPE_CHECKING:
    from ray.train.v2.api.preemption import PreemptionInfo


_FOLDER = "launches"
_STOP_NAME = "stop.json"


@dataclass(frozen=True, slots=True)
class LaunchFolder:
    """The files of one launch."""

    path: Path
    """``<run folder>/launches/<unique name>``."""

    @classmethod
    def make(cls, run_dir: Path, name: str) -> "LaunchFolder":
        """A new one. No two launches share a name: Ray would go on with its record of an earlier run of that name."""
        plain = re.sub(r"[^\w.-]+", "-", name)  # one folder, whatever a run is called
        folder = cls(run_dir / _FOLDER / f"{plain}-{time.time_ns()}")
        folder.path.mkdir(parents=True)
        return folder

    @property
    def name(self) -> str:
        """Unique among all launches."""
        return self.path.name

    @property
    def run_dir(self) -> Path:
        """The run folder it lies in."""
        return self.path.parents[1]

    def remove(self) -> None:
        """When the launch is over."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):  # another launch has one too
            self.path.parent.rmdir()

    def ask_stop(self, signal_number: int) -> None:
        """Tell all workers to save a checkpoint and end, as this signal would."""
        write_bytes(self.path / _STOP_NAME, json.dumps({"signal": signal_number}).encode())

    def stop_signal(self) -> int:
        """The signal that the driver passed on, or 0."""
        try:
            return int(json.loads((self.path / _STOP_NAME).read_text())["signal"])
        except FileNotFoundError:
            return 0

    def num_attempts(self) -> int:
        """How often workers have begun."""
        return len(list(self.path.glob("attempt-*.rank-0")))

    def begin(self, attempt: int, *, rank: int, node: str) -> None:
        """Leave where the worker of `rank` runs."""
        write_bytes(self._place(attempt, rank), node.encode())

    def node_of(self, attempt: int, rank: int) -> str:
        """Where the worker of `rank` ran, or an empty text where it never began."""
        try:
            return self._place(attempt, rank).read_text()
        except FileNotFoundError:
            return ""

    def _place(self, attempt: int, rank: int) -> Path:
        return self.path / f"attempt-{attempt}.rank-{rank}"


_LOGGER = logging.getLogger(__name__)


class LostWorkers(UserCallback):
    """Called in Ray's controller whenever it finds that workers failed."""

    def __init__(self, folder: Path) -> None:
        self._folder = LaunchFolder(folder)

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Put on record the workers that died: those that raised have done so themselves."""
        del run_context
        try:
            self._record(worker_exceptions)
        except Exception as error:  # noqa: BLE001  # Ray would end the run, which can go on, for an error in here
            _LOGGER.warning("cannot tell which workers died: %s", error)

    def _record(self, worker_exceptions: Mapping[int, Exception]) -> None:
        died = {rank: error for rank, error in worker_exceptions.items() if died_of(error) is not None}
        if not died:
            return
        attempt = self._folder.num_attempts()
        places = {rank: self._folder.node_of(attempt, rank) for rank in died}
        record = death_record(
            {rank: died_of(error) or "" for rank, error in died.items()},
            places,
            living={node.address for node in living_nodes()},
            attempt=attempt,
            launch=self._folder.name,
            preempted=any(is_preempted(error) for error in died.values()),
        )
        keep_failure(self._folder.run_dir, record)


def died_of(error: Exception) -> str | None:
    """Ray's words for the death of a worker's process or node; None when the worker raised `error` itself."""
    cause = _cause_of(error)
    if isinstance(cause, OutOfMemoryError):  # killed by Ray; no RayActorError, and its last lines are advice
        return first_line(cause)
    return str(cause) if isinstance(cause, RayActorError) else None


def is_preempted(error: Exception) -> bool:
    """Whether a worker died since its node was taken away, as Ray had been told before."""
    cause = _cause_of(error)
    return isinstance(cause, RayActorError) and cause.preempted


def _cause_of(error: Exception) -> Exception:
    """What Ray's health check has found, where that is what failed."""
    cause: Exception = getattr(error, "health_check_failure", error)
    return cause


def death_record(
    died: Mapping[int, str],
    places: Mapping[int, str],
    *,
    living: Collection[str],
    attempt: int,
    launch: str,
    preempted: bool = False,
) -> FailureRecord:
    """What to put on record for workers that died: Ray's words by rank, and their places as ``host (address)``.

    `preempted`: one of them with a node that was taken away as announced, which explains the others.
    """
    rank = min(died)
    by_node: dict[str, list[int]] = {}
    for one in sorted(died):
        by_node.setdefault(places[one] or "a node not known", []).append(one)
    told = "; ".join(_told(place, ranks, living) for place, ranks in by_node.items())
    return FailureRecord(
        kind="WorkerDiedError",
        message=f"{told} ({_last_line(died[rank])})",
        exit_code=EnvironmentFault.exit_code,
        rank=rank,
        node=places[rank] or "a node not known",
        attempt=attempt,
        final=False,
        launch=launch,
        preempted=preempted,
    )


def _told(place: str, ranks: list[int], living: Collection[str]) -> str:
    address = place.rpartition("(")[2].rstrip(")")
    which = f"rank {', '.join(map(str, ranks))}"
    if address and address not in living and place.endswith(")"):
        return f"node {place} was lost with the worker of {which}"
    return f"the worker process of {which} on {place} died"


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "Ray gives no reason")


PREEMPTED = int(signal.SIGHUP)
"""How a notice is told to the training loop. Ranks take the highest number any of them saw: a person's SIGINT or
SIGTERM at the same time counts for more."""
_POLL_SECONDS = 0.5
_STOPPING = (signal.SIGINT, signal.SIGTERM)
_CLEANING_SECONDS = 30.0
"""For the way out, after a signal came while there was nothing to save."""


@contextlib.contextmanager
def watching(ask: Callable[[], int], *, poll_seconds: float = _POLL_SECONDS) -> Iterator[StopRequest]:
    """Ask every `poll_seconds` while the block runs; the first number that is not 0 becomes a stop request.

    An `ask` that fails (storage that does not answer) is told once in the log and asked again.
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
    """`ask`, with 0 for an answer while it fails (storage that does not answer); the log tells of the first time."""
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


def preemption_notice() -> "PreemptionInfo | None":
    """Ray's notice that nodes of this worker group will be taken away, as this worker has it; None: none.

    Ray's public ``get_preemption_info`` waits for all ranks; a thread of one rank must not.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info


def hold(until: Callable[[], int], *, poll_seconds: float = _POLL_SECONDS) -> None:
    """Wait, the state being saved, for Ray to take this worker down: it does when the notice has run out.

    Ending before would not do: Ray counts a run whose workers return as finished and one whose workers fail as failed.
    Returns only when `until` says that a person asked to stop after all.
    """
    while not until():
        time.sleep(poll_seconds)


class _SignalledError(BaseException):
    """A signal on its way out: no ``except Exception`` on the way takes it for a failure that may pass."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def ended_by_signals(message: str) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM end the block, wherever the main thread is just then; a second one the process.

    For the time in which there is nothing to save: the way out cleans up, for 30 s at most. Signals within half a
    second of the first are the same request (see `ca2st.training.signals`). Main thread only.

    Raises:
        RunStoppedError: with `message`, for the signal that came.
    """
    came: list[tuple[int, float]] = []

    def end(number: int, _frame: object) -> None:
        if not came:
            came.append((number, time.monotonic()))
            raise _SignalledError(number)

    with stop_on_signals(grace_seconds=_CLEANING_SECONDS), _only_handler(end):
        with contextlib.suppress(_SignalledError):
            yield
        if came:
            number, moment = came[0]
            time.sleep(max(0.0, moment + ONE_REQUEST_SECONDS - time.monotonic()))  # the rest of this request
            raise stopped_error(number, message) from None


@contextlib.contextmanager
def _only_handler(handle: Callable[[int, object], None]) -> Iterator[None]:
    """Let `handle` hear SIGINT and SIGTERM, whoever else asks for them in the block; the caller puts handlers back.

    `ray.init` asks for SIGTERM, without being told to, and would end the process with code 15.
    """
    install = signal.signal
    for number in _STOPPING:
        install(number, handle)

    def refusing(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in _STOPPING else install(number, handler)

    signal.signal = refusing  # type: ignore[assignment]  # as Ray itself does to defer a SIGINT
    try:
        yield
    finally:
        signal.signal = install


Move = Literal["wait", "finish", "pass stop on", "end stopped", "end failed"]
FINAL_GRACE_SECONDS = 8.0
"""How long ranks may take to end after one of them failed for good: the others may wait in a collective for ever."""
_NOT_TRAINING = "stopped before its workers trained again; the newest checkpoint counts; rerun to resume"


@dataclass(frozen=True, kw_only=True, slots=True)
class Situation:
    """What the driver knows at one moment; seconds since something happened are None where it has not."""

    ended: bool
    """Ray has given the run's result."""
    stop_asked: bool
    since_passed_on: float | None
    """Seconds since the workers were told to stop."""
    started: bool
    """Workers have begun at least once."""
    since_final: float | None
    """Seconds since a failure was seen that no restart can mend."""
    grace_seconds: float
    """How long workers may take to save and end."""


def next_move(now: Situation) -> Move:
    """What the driver does now."""
    if now.ended:
        return "finish"
    if now.stop_asked and now.since_passed_on is None:
        return "pass stop on"
    if now.since_passed_on is not None and (not now.started or now.since_passed_on >= now.grace_seconds):
        return "end stopped" if now.since_final is None else "end failed"
    if now.since_final is not None and now.since_final >= FINAL_GRACE_SECONDS:
        return "end failed"
    return "wait"


class Supervision:
    """Watches one launch until it is over."""

    def __init__(
        self,
        folder: LaunchFolder,
        stop: StopRequest,
        *,
        grace_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._folder, self._stop, self._grace_seconds = folder, stop, grace_seconds
        self._clock, self._sleep = clock, sleep
        self._passed_on: float | None = None
        self._final: float | None = None
        self._started = False
        self._told: FailureRecord | None = None

    def until_over(self, fit: "Future[dict[str, str]]") -> None:
        """Return when the run is done; raise how it ended otherwise, or what Ray raised.

        Raises:
            RunStoppedError: a signal stopped it.
            CA2STError: the failure on record, of its own kind, that no restart can mend.
        """
        while True:
            move = next_move(self._situation(fit))
            if move == "finish":
                self._finish(fit.result())
                return
            if move == "pass stop on":
                self._folder.ask_stop(self._stop.signal_number)
                self._passed_on = self._clock()
                say("stopping: the workers save a checkpoint first; a second signal ends at once")
            elif move == "end stopped":
                raise self._stopped("its workers had not ended; the newest checkpoint counts; rerun to resume")
            elif move == "end failed":
                raise self._failed({})
            else:
                self._sleep(_POLL_SECONDS)

    def failure(self) -> FailureRecord | None:
        """What is on record of this launch."""
        failure = read_failure(self._folder.run_dir)
        return failure if failure is not None and failure.launch == self._folder.name else None

    def _situation(self, fit: "Future[dict[str, str]]") -> Situation:
        failure = self.failure()
        if failure is not None and failure.final and self._final is None:
            self._final = self._clock()
        if failure is not None and not failure.echo and not failure.final and failure != self._told:
            self._told = failure
            say(_told_of_supervision(failure))
        return Situation(
            ended=fit.done(),
            stop_asked=self._stop.signal_number != 0,
            since_passed_on=None if self._passed_on is None else self._clock() - self._passed_on,
            started=self._has_started(),
            since_final=None if self._final is None else self._clock() - self._final,
            grace_seconds=self._grace_seconds,
        )

    def _has_started(self) -> bool:
        self._started = self._started or self._folder.num_attempts() > 0
        return self._started

    def _finish(self, ended: dict[str, str]) -> None:
        if ended["status"] == "stopped":
            raise self._stopped(ended["message"] or _NOT_TRAINING)
        if ended["status"] == "failed":
            raise self._failed(ended)

    def _stopped(self, message: str) -> Exception:
        return stopped_error(self._stop.signal_number, message)

    def _failed(self, ended: Mapping[str, str]) -> Exception:
        """What no restart mends, from the record or, where it could not be written, as rank 0 told it."""
        failure = self.failure()
        if ended.get("message") and (failure is None or not failure.final):
            return error_told(ended["message"], int(ended["exit_code"]))
        return error_of(failure) if failure is not None else error_told("failed; see the log of its workers", 1)


def _told_of_supervision(failure: FailureRecord) -> str:
    """What to say of a failure that starting again may mend."""
    if failure.preempted:
        return f"taken away as announced: {failure}; the workers are started again on the nodes there are"
    return f"failed: {failure}; the workers are started again as long as restarts are left"
