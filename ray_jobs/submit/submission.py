"""Send a training to a cluster, follow it, and send it again where that helps."""

import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ca2st.errors import CA2STError
from ray_jobs.console import say
from ray_jobs.ray_access import first_line
from ray_jobs.submit.follow import Patience, Show, exit_code, failure, follow, was_lost
from ray_jobs.submit.job_server import JobClient, JobDetails, runtime_env, told_refusals
from ray_jobs.submit.request import JobRequest

_ASK_AFTER_SECONDS = (0.0, 1.0)
_NOT_FOUND = "status code 404"


class SendingInterruptedError(CA2STError):
    """Ctrl-C while a job was being sent; the message says what became of it."""

    exit_code = 128 + signal.SIGINT


@dataclass(frozen=True, kw_only=True, slots=True)
class EndedJob:
    """A job that was followed to its end."""

    submission_id: str
    details: JobDetails

    @property
    def exit_code(self) -> int:
        """What the command ends with."""
        return exit_code(self.details)


def send(client: JobClient, request: JobRequest, archive: bytes) -> None:
    """Send a job with `archive` as its working directory; Ray uploads it unless the cluster has it.

    Raises:
        UserInputError: the token is refused.
        EnvironmentFault: the server does not answer, or refuses.
        SendingInterruptedError: Ctrl-C before the server took it, or nobody knows whether it did.
        KeyboardInterrupt: Ctrl-C after it did.
    """
    try:
        with tempfile.TemporaryDirectory() as folder, told_refusals(client.get_address()):
            path = Path(folder) / "job.zip"
            path.write_bytes(archive)
            client.submit_job(
                entrypoint=request.entrypoint,
                submission_id=request.submission_id,
                runtime_env=runtime_env(request.env_vars, working_dir=path),
                metadata=dict(request.metadata),
            )
    except KeyboardInterrupt:
        _tell_if_not_taken(client, request.submission_id)
        raise


def _tell_if_not_taken(client: JobClient, job_id: str) -> None:
    """Return where the server knows the job; a request that was on its way then gets some time to arrive."""
    for pause_seconds in _ASK_AFTER_SECONDS:
        try:
            time.sleep(pause_seconds)
            client.get_job_info(job_id)
        except RuntimeError as error:
            if _NOT_FOUND not in str(error):
                raise _not_known(client, job_id, error) from None
        except (OSError, KeyboardInterrupt) as error:  # impatient: Ctrl-C once more
            raise _not_known(client, job_id, error) from None
        else:
            return
    raise SendingInterruptedError("interrupted; nothing was submitted")


def _not_known(client: JobClient, job_id: str, error: BaseException) -> SendingInterruptedError:
    return SendingInterruptedError(
        f"interrupted; whether job {job_id} was taken is not known ({first_line(error)}): "
        f"ray job status --address {client.get_address()} {job_id} tells"
    )


def send_and_follow(
    client: JobClient,
    request: JobRequest,
    archive: bytes,
    *,
    show: Show,
    new_id: Callable[[], str],
    num_resubmits: int = 0,
    patience: Patience | None = None,
) -> EndedJob:
    """Send a job and follow it; one whose driver was killed is sent again under a `new_id`, which resumes the run.

    Raises:
        JobFailedError: it did not succeed; carries the driver's exit code.
        EnvironmentFault: the server does not take it, or stays away later (JobUnreachableError).
        SendingInterruptedError: see `send`; of a job that is sent again, that one.
    """
    remaining = num_resubmits
    while True:
        send(client, request, archive)
        with told_refusals(client.get_address()):
            details = follow(client, request.submission_id, show=show, patience=patience or Patience())
        ended = EndedJob(submission_id=request.submission_id, details=details)
        if ended.exit_code == 0:
            return ended
        if remaining == 0 or not was_lost(details):
            raise failure(details, request.submission_id)
        remaining -= 1
        request = replace(request, submission_id=new_id())
        say(f"{ended.submission_id} lost its driver; sent again as {request.submission_id}, {remaining} times more")
