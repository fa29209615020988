"""The job server of a Ray cluster: found, asked for its token, its refusals explained; a job's log and its end."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ca2st.errors import CA2STError, EnvironmentFault, UserInputError
from ray_jobs.cluster.ray_access import HOW_TO_GET_A_TOKEN, PORTS, RayAccess, first_line, who_listens
from sharding.format.remote import doubled_pause

if TYPE_CHECKING:
    from pathlib import Path

    from ray.job_submission import JobDetails, JobSubmissionClient

_ANSWER_SECONDS = 2.2
_REFUSALS = (401, 403)
_REFUSED_TO_CONNECT = "NewConnectionError"
Show = Callable[[str], None]
_TERMINATED = 143
_KILLED = 137
_COMMAND_NOT_FOUND = 127
_LOST_DRIVER = ("JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE")


def connect(address: str, *, access: RayAccess, ca_file: "Path | None" = None) -> "JobSubmissionClient":
    """Return a client of the job server at `address`, ``http://HOST:8265`` or https.

    Raises:
        UserInputError: no such address, no or another token, or a server that asks for none.
        EnvironmentFault: no answer.
    """
    check_address(address)
    access.check(address)
    verify: bool | str = True if ca_file is None else str(ca_file)
    check_server(address, access, verify=verify)
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray.job_submission import JobSubmissionClient

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    with explained_refusals(address):
        client = JobSubmissionClient(address, verify=verify)
    if client.get_address() != address.rstrip("/"):
        raise UserInputError(
            f"--address {address}: RAY_API_SERVER_ADDRESS or RAY_ADDRESS would send the job to "
            f"{client.get_address()}; unset it or give that address"
        )
    return client


def check_address(address: str) -> None:
    """Refuse what has not the form of a job server's address (UserInputError)."""
    try:
        parts = urlsplit(address)
        fits = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
    except ValueError:  # brackets or a port that are none
        fits = False
    if not fits:
        raise UserInputError(
            f"--address {address}: expected the address of the cluster's dashboard, for example http://HEAD:8265"
        )


def check_server(address: str, access: RayAccess, *, verify: bool | str) -> None:
    """Make sure within seconds that a job server answers at `address`, takes our token, and nobody without one.

    Raises:
        UserInputError: it takes jobs from anybody and that is not accepted, or refuses our token, or is no job server.
        EnvironmentFault: no answer.
    """
    import requests

    place = address.rstrip("/")
    with explained_refusals(address):
        try:
            answer = requests.get(f"{place}/api/jobs/", timeout=_ANSWER_SECONDS, verify=verify)
            if answer.status_code in _REFUSALS:
                shown = {"Authorization": f"Bearer {access.shown_token}"}
                version = f"{place}/api/version"
                answer = requests.get(version, timeout=_ANSWER_SECONDS, verify=verify, headers=shown)
            elif answer.ok and not access.accept_open:
                raise UserInputError(f"Ray at {address}: takes jobs from anybody; {HOW_TO_GET_A_TOKEN}")
        except requests.ConnectionError as error:
            if _REFUSED_TO_CONNECT not in type(getattr(error.args[0], "reason", None)).__name__:
                _refuse_cluster_port(address, access)
            raise
    if answer.status_code in _REFUSALS:
        raise UserInputError(f"Ray at {address}: refuses our token ({answer.status_code}); {HOW_TO_GET_A_TOKEN}")
    if not answer.ok:
        raise UserInputError(
            f"Ray at {address}: expected the cluster's dashboard, found a web server that answers "
            f"{answer.status_code}; {PORTS}"
        )


@contextmanager
def explained_refusals(address: str) -> Iterator[None]:
    """Turn Ray's and the network's errors into ours, with what to do."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise UserInputError(
            f"Ray at {address}: refuses our token ({first_line(error)}); {HOW_TO_GET_A_TOKEN}"
        ) from error
    except OSError as error:  # requests' errors are OSErrors too
        raise EnvironmentFault(
            f"Ray at {address}: no answer ({first_line(error)}); is the cluster up, with its dashboard, and is "
            "this its address? From outside its network: a tunnel or the VPN"
        ) from error
    except RuntimeError as error:
        raise EnvironmentFault(f"Ray at {address}: {first_line(error)}") from error


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
        """Return the seconds before the next attempt after so many failures."""
        return doubled_pause(failures, first_seconds=self.pause_seconds, longest=self.longest_pause_seconds)


def follow(client: "JobSubmissionClient", job_id: str, *, show: Show, patience: Patience) -> "JobDetails":
    """Show the job's log from its beginning to its end, whatever the connection does; then how the job ended.

    Raises:
        JobUnreachableError: the server stays away; the job may well go on.
    """
    import aiohttp

    num_shown = failures = 0
    over: JobDetails | None = None

    async def show_rest() -> bool:
        """Show what was not shown (a new connection begins at the beginning again) until the log ends, or is silent."""
        nonlocal num_shown
        place = 0
        pieces = client.tail_job_logs(job_id)
        while True:
            try:
                async with asyncio.timeout(patience.quiet_seconds):
                    piece = await anext(pieces)
            except StopAsyncIteration:
                return True
            except TimeoutError:
                return False
            place += len(piece)
            if (num_new := place - num_shown) > 0:
                show(piece[-num_new:])
                num_shown = place

    while True:
        try:
            is_whole = asyncio.run(show_rest())
            details = client.get_job_info(job_id)
        except (RuntimeError, OSError, aiohttp.ClientError) as error:  # Ray's, requests' and the system's, the socket's
            if over is not None:  # a cluster made for one job may go with it; how that ended is known
                return over
            failures += 1
            if failures >= patience.attempts:
                raise JobUnreachableError(
                    f"job {job_id}: its server does not answer ({first_line(error)}); the job may go on without us"
                ) from error
        else:
            failures = 0
            if details.status.is_terminal():
                if is_whole or over is not None:  # a log that was silent may have got its last words just now
                    return details
                over = details
        time.sleep(patience.pause(failures))


class JobFailedError(CA2STError):
    """A job that did not end well; carries the exit code of its driver."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # the driver's own code instead of the class's


class JobUnreachableError(EnvironmentFault):
    """The job's server stays away; the job may well go on."""


def exit_code(details: "JobDetails") -> int:
    """Return what `ca2st submit` ends with: the driver's own code, 128 + the signal that ended it, or Ray's word."""
    status, code = str(details.status), details.driver_exit_code
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return _TERMINATED
    if code is None:
        return EnvironmentFault.exit_code
    return code if code > 0 else 128 - code


def was_lost(details: "JobDetails") -> bool:
    """Return whether the driver was killed or lost with its node: the same job, sent again, goes on where it was."""
    if str(details.status) != "FAILED":
        return False
    if details.driver_exit_code is None:
        return details.error_type in _LOST_DRIVER
    return details.driver_exit_code < 0 or details.driver_exit_code == _KILLED


def failure(details: "JobDetails", job_id: str) -> JobFailedError:
    """Return the error of a job that did not succeed; what its driver said is in its log, shown before."""
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


def _refuse_cluster_port(address: str, access: RayAccess) -> None:
    """Refuse an address that is the cluster's own port, or another of Ray's, which do not speak HTTP."""
    parts = urlsplit(address)
    try:
        listener = who_listens(parts.hostname or "", parts.port or 80, token=access.shown_token)
    except OSError:
        return
    if listener not in ("web server", "silent"):
        raise UserInputError(f"Ray at {address}: expected the cluster's dashboard, found another of its ports; {PORTS}")
