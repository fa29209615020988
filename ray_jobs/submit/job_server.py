"""The job server of a Ray cluster: found, asked for its token, and its refusals told."""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from ca2st.errors import EnvironmentFault, UserInputError
from ray_jobs.ray_access import HOW_TO_GET_A_TOKEN, RayAccess, first_line

if TYPE_CHECKING:
    from pathlib import Path

_ANSWER_SECONDS = 30.0


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
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
        raise UserInputError(
            f"--address {address}: expected the address of the cluster's dashboard, for example http://HEAD:8265"
        )
    access.check(address)
    verify: bool | str = True if ca_file is None else str(ca_file)
    if not access.accept_open:
        refuse_open(address, verify=verify)
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


def refuse_open(address: str, *, verify: bool | str) -> None:
    """Make sure that the job server answers nobody without a token.

    Raises:
        UserInputError: it does.
        EnvironmentFault: no answer.
    """
    import requests

    with told_refusals(address):
        answer = requests.get(f"{address.rstrip('/')}/api/jobs/", timeout=_ANSWER_SECONDS, verify=verify)
    if answer.status_code == requests.codes.ok:
        raise UserInputError(f"Ray at {address}: takes jobs from anybody; {HOW_TO_GET_A_TOKEN}")


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
