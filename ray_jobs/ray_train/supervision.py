"""The driver while the workers train: it passes a stop on to them, and ends what no restart can mend."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

from ca2st.training.signals import StopRequest, stopped_error
from ray_jobs.console import say
from ray_jobs.ray_train.launch_folder import LaunchFolder
from ray_jobs.running.failure_record import FailureRecord, error_of, error_told, read_failure

Move = Literal["wait", "finish", "pass stop on", "end stopped", "end failed"]
FINAL_GRACE_SECONDS = 8.0
"""How long ranks may take to end after one of them failed for good: the others may wait in a collective for ever."""
_POLL_SECONDS = 0.5
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
            say(_told(failure))
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


def _told(failure: FailureRecord) -> str:
    """What to say of a failure that starting again may mend."""
    if failure.preempted:
        return f"taken away as announced: {failure}; the workers are started again on the nodes there are"
    return f"failed: {failure}; the workers are started again as long as restarts are left"
