"""A job's log as it is written, and how the job ended."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from ca2st.errors import CA2STError, EnvironmentFault
from ray_jobs.ray_access import first_line
from ray_jobs.submit.job_server import JobClient, JobDetails

Show = Callable[[str], None]

_TERMINATED = 143
_KILLED = 137
_COMMAND_NOT_FOUND = 127
_LOST_DRIVER = ("JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE")


class JobFailedError(CA2STError):
    """A job that did not end well; carries the exit code of its driver."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # the driver's own code instead of the class's


class JobUnreachableError(EnvironmentFault):
    """The job's server stays away; the job may well go on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a server may not answer, and how often it is asked."""

    attempts: int = 12
    """Attempts one after the other without an answer before we give up."""
    pause_seconds: float = 1.0
    """Before the second attempt; doubled each time."""
    longest_pause_seconds: float = 30.0
    """But never longer than this: in all about five minutes."""
    quiet_seconds: float = 60.0
    """A log that is silent for this long is opened anew: a connection can be dead without a sign."""

    def pause(self, failures: int) -> float:
        """Seconds before the next attempt after so many failures."""
        return min(self.longest_pause_seconds, self.pause_seconds * 2.0 ** max(0, failures - 1))


def follow(client: JobClient, job_id: str, *, show: Show, patience: Patience) -> JobDetails:
    """Show the job's log from its beginning to its end, whatever the connection does; then how the job ended.

    Raises:
        JobUnreachableError: the server stays away; the job may well go on.
    """
    log = _Log(client, job_id, show)
    failures = 0
    while True:
        try:
            asyncio.run(log.show_rest(quiet_seconds=patience.quiet_seconds))
            details = client.get_job_info(job_id)
        except _connection_errors() as error:
            failures += 1
            if failures >= patience.attempts:
                raise JobUnreachableError(
                    f"job {job_id}: its server does not answer ({first_line(error)}); the job may go on without us"
                ) from error
        else:
            failures = 0
            if details.status.is_terminal():
                return details
        time.sleep(patience.pause(failures))


def _connection_errors() -> tuple[type[Exception], ...]:
    """What a lost connection looks like: Ray's own error, requests' and the system's, and the web socket's."""
    import aiohttp

    return (RuntimeError, OSError, aiohttp.ClientError)


class _Log:
    """A job's log, of which every character is shown once: a new connection begins at the beginning again."""

    def __init__(self, client: JobClient, job_id: str, show: Show) -> None:
        self._client, self._job_id, self._show = client, job_id, show
        self._num_shown = 0

    async def show_rest(self, *, quiet_seconds: float) -> None:
        """Show what was not shown, until the log ends or is silent for `quiet_seconds`."""
        place = 0
        pieces = self._client.tail_job_logs(self._job_id)
        while True:
            try:
                async with asyncio.timeout(quiet_seconds):
                    piece = await anext(pieces)
            except (StopAsyncIteration, TimeoutError):
                return
            place += len(piece)
            if (num_new := place - self._num_shown) > 0:
                self._show(piece[-num_new:])
                self._num_shown = place


def exit_code(details: JobDetails) -> int:
    """What `ca2st submit` ends with: the driver's own code, 128 + the signal that ended it, or what Ray tells."""
    status, code = str(details.status), details.driver_exit_code
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return _TERMINATED
    if code is None:
        return EnvironmentFault.exit_code
    return code if code > 0 else 128 - code


def was_lost(details: JobDetails) -> bool:
    """Whether the driver was killed or lost with its node: the same job, sent again, goes on where it was."""
    if str(details.status) != "FAILED":
        return False
    if details.driver_exit_code is None:
        return details.error_type in _LOST_DRIVER
    return details.driver_exit_code < 0 or details.driver_exit_code == _KILLED


def failure(details: JobDetails, job_id: str) -> JobFailedError:
    """The error of a job that did not succeed; what its driver said is in its log, shown before."""
    code = exit_code(details)
    if str(details.status) == "STOPPED":
        return JobFailedError(f"job {job_id} was stopped; submit the same command again to resume", code)
    if details.driver_exit_code is None:
        return JobFailedError(f"job {job_id} failed: {(details.message or 'Ray does not say why').strip()}", code)
    hint = "see its log above"
    if was_lost(details):
        hint = "its driver was killed; submit the same command again to resume, or let --resubmit N do so"
    elif code == _COMMAND_NOT_FOUND:
        hint = "the head node has no such interpreter: name the one that has Ray by --python PATH"
    return JobFailedError(f"job {job_id} failed with exit code {code}; {hint}", code)
