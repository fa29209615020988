"""The driver's side of a launch: the files it shares with the workers, lost workers, stops and final failures.

A driver and its workers talk by small files in a folder of the launch's own in the run folder: training must not wait
for a message, a node may be gone, and the run needs the shared storage anyway.
"""

import contextlib
import json
import logging
import math
import re
import shutil
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train.v2.api.callback import UserCallback

from ca2st.durable import write_bytes
from ca2st.errors import EnvironmentFault
from ca2st.processes import STOPPING
from ca2st.training.signals import ONE_REQUEST_SECONDS, StopRequest, stop_on_signals, stopped_error
from ray_jobs.cluster.ray_access import Node, first_line, living_nodes
from ray_jobs.console import say
from ray_jobs.runs.failures import FailureRecord, error_of, error_told, keep_failure, read_failure

_FOLDER = "launches"
_STOP_NAME = "stop.json"
_LOGGER = logging.getLogger(__name__)
_POLL_SECONDS = 0.5
_CLEANING_SECONDS = 30.0
"""For the way out, after a signal came while there was nothing to save."""
FINAL_GRACE_SECONDS = 8.0
"""How long ranks may take to end after one of them failed for good: the others may wait in a collective for ever."""
_NOT_TRAINING = "stopped before its workers trained again; the newest checkpoint counts; rerun to resume"


@dataclass(frozen=True, slots=True)
class LaunchFolder:
    """The files of one launch."""

    path: Path
    """``<run folder>/launches/<unique name>``."""

    @classmethod
    def make(cls, run_dir: Path, name: str) -> "LaunchFolder":
        """Make a new one."""
        plain = re.sub(r"[^\w.-]+", "-", name)  # one folder, whatever a run is called
        # No two launches share a name: Ray would go on with its record of an earlier run of that name.
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
        """Remove it when the launch is over."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):  # another launch has one too
            self.path.parent.rmdir()

    def ask_stop(self, signal_number: int) -> None:
        """Ask all workers to save a checkpoint and end, as this signal would."""
        write_bytes(self.path / _STOP_NAME, json.dumps({"signal": signal_number}).encode())

    def stop_signal(self) -> int:
        """Return the signal that the driver passed on, or 0."""
        try:
            return int(json.loads((self.path / _STOP_NAME).read_text())["signal"])
        except FileNotFoundError:
            return 0

    def num_attempts(self) -> int:
        """Return how often workers have begun."""
        return len(list(self.path.glob("attempt-*.rank-0")))

    def begin(self, attempt: int, *, rank: int, node: str) -> None:
        """Record where the worker of `rank` runs."""
        write_bytes(self.path / f"attempt-{attempt}.rank-{rank}", node.encode())

    def places(self, attempt: int) -> dict[int, str]:
        """Return where the worker of each rank ran, by rank; those that never began are missing."""
        found = {path: int(path.name.rpartition("-")[2]) for path in self.path.glob(f"attempt-{attempt}.rank-*")}
        return {rank: path.read_text() for path, rank in found.items()}


class Supervision:
    """The driver's watch over one launch: it passes a stop on to the workers, and ends what no restart can fix."""

    def __init__(
        self,
        folder: LaunchFolder,
        stop: StopRequest,
        *,
        grace_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        nodes: Callable[[], Collection[Node]] = living_nodes,
    ) -> None:
        self._folder, self._stop, self._grace_seconds = folder, stop, grace_seconds
        self._clock, self._sleep, self._nodes = clock, sleep, nodes
        self._reported: FailureRecord | None = None

    def until_over(self, fit: "Future[dict[str, str]]") -> None:
        """Wait until the run is done; raise how it ended otherwise, or what Ray raised.

        Raises:
            RunStoppedError: a signal stopped it.
            CA2STError: the failure on record, of its own kind, that no restart can fix.
        """
        stop_by = fail_by = math.inf
        while not fit.done():
            now, failure = self._clock(), self._new_failure()
            if failure is not None and failure.final:
                fail_by = min(fail_by, now + FINAL_GRACE_SECONDS)
            if self._stop.signal_number and stop_by == math.inf:
                self._folder.ask_stop(self._stop.signal_number)
                stop_by = now + (self._grace_seconds if self._folder.num_attempts() else 0.0)
                say("stopping: the workers save a checkpoint first; a second signal ends at once")
            if now >= fail_by or (now >= stop_by and fail_by < math.inf):
                raise self._failed({})
            if now >= stop_by:
                message = "its workers had not ended; the newest checkpoint counts; rerun to resume"
                raise stopped_error(self._stop.signal_number, message)
            self._sleep(_POLL_SECONDS)
        ended = fit.result()
        if ended["status"] == "stopped":
            raise stopped_error(self._stop.signal_number, ended["message"] or _NOT_TRAINING)
        if ended["status"] == "failed":
            raise self._failed(ended)

    def failure(self) -> FailureRecord | None:
        """Return what is on record of this launch."""
        failure = read_failure(self._folder.run_dir)
        return failure if failure is not None and failure.launch == self._folder.name else None

    def _new_failure(self) -> FailureRecord | None:
        """Return what is on record; say what starting again may fix, once."""
        failure = self.failure()
        if failure is None or failure.final or failure == self._reported:
            return failure
        if failure.echo:
            if self._folder.num_attempts() <= failure.attempt:
                return failure  # what it is an echo of may still come
            # Ray may start again before it knows that a node was lost: put on record those that are gone since.
            places, living = self._folder.places(failure.attempt), {node.address for node in self._nodes()}
            if lost := {rank: failure.message for rank, place in places.items() if _is_gone(place, living)}:
                record = death_record(lost, places, living=living, attempt=failure.attempt, launch=self._folder.name)
                failure = keep_failure(self._folder.run_dir, record)
        self._reported = failure
        if failure.preempted:
            say(f"taken away as announced: {failure}; the workers are started again on the nodes there are")
        else:
            say(f"failed: {failure}; the workers are started again as long as restarts are left")
        return failure

    def _failed(self, ended: Mapping[str, str]) -> Exception:
        """Return what no restart fixes, from the record or, where it could not be written, as rank 0 reported it."""
        failure = self.failure()
        if ended.get("message") and (failure is None or not failure.final):
            return error_told(ended["message"], int(ended["exit_code"]))
        return error_of(failure) if failure is not None else error_told("failed; see the log of its workers", 1)


class LostWorkers(UserCallback):
    """Ray's controller calls this whenever it finds that workers failed."""

    def __init__(self, folder: Path) -> None:
        self._folder = LaunchFolder(folder)

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Put on record the workers that died: those that raised have done so themselves."""
        del run_context
        try:
            died = {rank: why for rank, error in worker_exceptions.items() if (why := died_of(error)) is not None}
            if not died:
                return
            attempt = self._folder.num_attempts()
            record = death_record(
                died,
                self._folder.places(attempt),
                living={node.address for node in living_nodes()},
                attempt=attempt,
                launch=self._folder.name,
                preempted=any(map(is_preempted, worker_exceptions.values())),
            )
            keep_failure(self._folder.run_dir, record)
        except Exception as error:  # noqa: BLE001  # Ray would end the run, which can go on, for an error in here
            _LOGGER.warning("cannot see which workers died: %s", error)


def died_of(error: Exception) -> str | None:
    """Return Ray's words for the death of a worker's process or node; None when the worker raised `error` itself."""
    cause = _cause_of(error)
    if isinstance(cause, OutOfMemoryError):  # killed by Ray; no RayActorError, and its last lines are advice
        return first_line(cause)
    return str(cause) if isinstance(cause, RayActorError) else None


def is_preempted(error: Exception) -> bool:
    """Return whether a worker died because its node was taken away, as had been announced."""
    cause = _cause_of(error)
    return isinstance(cause, RayActorError) and cause.preempted


def death_record(
    died: Mapping[int, str],
    places: Mapping[int, str],
    *,
    living: Collection[str],
    attempt: int,
    launch: str,
    preempted: bool = False,
) -> FailureRecord:
    """Return what to put on record for workers that died: Ray's words by rank, and their places as ``host (address)``.

    `preempted`: one of them with a node that was taken away as announced, which explains the others.
    """
    rank = min(died)
    by_node: dict[str, list[int]] = {}
    for one in sorted(died):
        by_node.setdefault(places.get(one) or "a node not known", []).append(one)
    deaths = []
    for place, ranks in by_node.items():
        which = f"rank {', '.join(map(str, ranks))}"
        if _is_gone(place, living):
            deaths.append(f"node {place} was lost with the worker of {which}")
        else:
            deaths.append(f"the worker process of {which} on {place} died")
    reasons = [line.strip() for line in died[rank].splitlines() if line.strip()]
    return FailureRecord(
        kind="WorkerDiedError",
        message=f"{'; '.join(deaths)} ({reasons[-1] if reasons else 'Ray gives no reason'})",
        exit_code=EnvironmentFault.exit_code,
        rank=rank,
        node=places.get(rank) or "a node not known",
        attempt=attempt,
        final=False,
        launch=launch,
        preempted=preempted,
    )


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
            raise _SignalledError

    with stop_on_signals(grace_seconds=_CLEANING_SECONDS), _only_handler(end):
        with contextlib.suppress(_SignalledError):
            yield
        if came:
            number, moment = came[0]
            time.sleep(max(0.0, moment + ONE_REQUEST_SECONDS - time.monotonic()))  # the rest of this request
            raise stopped_error(number, message) from None


def _cause_of(error: Exception) -> Exception:
    cause: Exception = getattr(error, "health_check_failure", error)  # what Ray's health check found
    return cause


def _is_gone(place: str, living: Collection[str]) -> bool:
    """Return whether the node of a ``host (address)`` is none of the addresses `living`."""
    return place.endswith(")") and place.rpartition("(")[2].rstrip(")") not in {"", *living}


class _SignalledError(BaseException):
    """A signal on its way out, which no ``except Exception`` on the way takes for a failure that may pass."""


@contextlib.contextmanager
def _only_handler(handle: Callable[[int, object], None]) -> Iterator[None]:
    """Let `handle` hear SIGINT and SIGTERM, whoever else asks for them in the block; the caller puts handlers back.

    `ray.init` asks for SIGTERM by itself, and would end the process with code 15.
    """
    install = signal.signal
    for number in STOPPING:
        install(number, handle)

    def refusing(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in STOPPING else install(number, handler)

    signal.signal = refusing  # type: ignore[assignment]  # as Ray itself does to defer a SIGINT
    try:
        yield
    finally:
        signal.signal = install
