"""The job server of a Ray cluster: found, asked for its token, and its refusals told."""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from ca2st.errors import EnvironmentFault, UserInputError
from ray_jobs.ray_access import HOW_TO_GET_A_TOKEN, RayAccess, first_line
from ray_jobs.ray_probe import PORTS, who_listens

if TYPE_CHECKING:
    from pathlib import Path

_ANSWER_SECONDS = 2.2
_REFUSALS = (401, 403)
_REFUSED_TO_CONNECT = "NewConnectionError"


class JobDetails(Protocol):
    """What Ray tells of a job; as much of it as is read here."""

    @property
    def status(self) -> Any:
        """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""

    @property
    def message(self) -> str | None:
        """What Ray says about the status; of a failed driver also the end of its log."""

    @property
    def error_type(self) -> str | None:
        """Ray's name for what failed."""

    @property
    def driver_exit_code(self) -> int | None:
        """The driver's exit code, negative for a signal; None where it never ended by itself."""


class JobClient(Protocol):
    """As much of Ray's JobSubmissionClient as is used here."""

    def submit_job(
        self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any], metadata: dict[str, str]
    ) -> str:
        """Send a job; returns its submission id."""

    def get_job_info(self, job_id: str, /) -> JobDetails:
        """The job's status and how it ended."""

    def tail_job_logs(self, job_id: str, /) -> AsyncIterator[str]:
        """The driver's log from its beginning, in pieces, until the job has ended."""

    def get_address(self) -> str:
        """The server that is really talked to."""


def connect(address: str, *, access: RayAccess, ca_file: "Path | None" = None) -> JobClient:
    """A client of the job server at `address`, ``http://HOST:8265`` or https.

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
    with told_refusals(address):
        client = JobSubmissionClient(address, verify=verify)
    if client.get_address() != address.rstrip("/"):
        raise UserInputError(
            f"--address {address}: RAY_API_SERVER_ADDRESS or RAY_ADDRESS would send the job to "
            f"{client.get_address()}; unset it or give that address"
        )
    return client


def check_address(address: str) -> None:
    """Refuse what has not the form of a job server's address.

    Raises:
        UserInputError: it has not.
    """
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
    with told_refusals(address):
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
                _tell_cluster_port(address, access)
            raise
    if answer.status_code in _REFUSALS:
        raise UserInputError(f"Ray at {address}: refuses our token ({answer.status_code}); {HOW_TO_GET_A_TOKEN}")
    if not answer.ok:
        raise UserInputError(
            f"Ray at {address}: expected the cluster's dashboard, found a web server that answers "
            f"{answer.status_code}; {PORTS}"
        )


def _tell_cluster_port(address: str, access: RayAccess) -> None:
    """Refuse an address that is the cluster's own port, or another of Ray's, which do not speak HTTP."""
    parts = urlsplit(address)
    try:
        listener = who_listens(parts.hostname or "", parts.port or 80, token=access.shown_token)
    except OSError:
        return
    if listener not in ("web server", "silent"):
        raise UserInputError(f"Ray at {address}: expected the cluster's dashboard, found another of its ports; {PORTS}")


@contextmanager
def told_refusals(address: str) -> Iterator[None]:
    """Ray's and the network's errors as ours, with what to do."""
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


def runtime_env(env_vars: Mapping[str, str], *, working_dir: "Path") -> dict[str, Any]:
    """Ray's runtime environment of a job: variables, and an archive as the working directory of every process."""
    return {"working_dir": str(working_dir), "env_vars": dict(env_vars)}
