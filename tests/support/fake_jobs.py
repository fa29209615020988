"""As much of Ray's job server as `ca2st submit` talks to, written from what its client does."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class FakeDetails:
    """How a job stands."""

    status: Any
    driver_exit_code: int | None = None
    error_type: str | None = None
    message: str | None = None


def details(status: str, code: int | None = None, error_type: str | None = None, message: str = "") -> FakeDetails:
    """A job's end or state, with Ray's own type of status."""
    from ray.job_submission import JobStatus

    return FakeDetails(JobStatus(status), driver_exit_code=code, error_type=error_type, message=message)


@dataclass
class FakeJobs:
    """Takes jobs; their log is read in `connections`, each the pieces one of them gives and the error it ends with."""

    connections: list[tuple[Sequence[str], Exception | None]] = field(default_factory=list)
    answers: list[FakeDetails | Exception] = field(default_factory=list)
    sent: list[dict[str, Any]] = field(default_factory=list)
    files: list[dict[str, str]] = field(default_factory=list)
    """Of each job's working directory."""
    modules: list[dict[str, set[str]]] = field(default_factory=list)
    """What each job's `py_modules` are called and hold."""

    def submit_job(self, **request: Any) -> str:
        folder, modules = Path(request["runtime_env"]["working_dir"]), map(Path, request["runtime_env"]["py_modules"])
        self.files.append({str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.*")})
        self.modules.append({one.name: {path.name for path in one.iterdir()} for one in modules})
        self.sent.append(request)
        return str(request["submission_id"])

    def get_job_info(self, job_id: str, /) -> FakeDetails:
        assert job_id == self.sent[-1]["submission_id"] if self.sent else job_id
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def tail_job_logs(self, job_id: str, /) -> AsyncIterator[str]:
        pieces, error = self.connections.pop(0)
        for piece in pieces:
            yield piece
        if error is not None:
            raise error

    def get_address(self) -> str:
        return "http://head:8265"
