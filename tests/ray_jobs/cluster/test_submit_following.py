"""How ``ca2st submit`` follows a job, passes on how it ended, and sends it again."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ca2st.errors import EnvironmentFault
from ray_jobs.cluster.job_server import JobFailedError, Patience, exit_code, failure, follow, was_lost
from ray_jobs.cluster.submission import Choices, prepared, send_and_follow
from support.fake_jobs import FakeDetails, FakeJobs, details
from support.tiny_runs import RECIPE

AT_ONCE = Patience(pause_seconds=0.0)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.format(root="/shared"))
    return path


def test_a_log_is_shown_once_though_its_connection_breaks() -> None:
    jobs = FakeJobs(
        connections=[
            (["one\n", "tw"], RuntimeError("WebSocket connection closed unexpectedly")),
            ([], ConnectionResetError("reset")),
            (["one\ntwo\n", "three\n"], None),
            (["one\n", "two\nthree\nfour\n"], None),
        ],
        answers=[details("RUNNING"), details("SUCCEEDED", 0)],
    )
    shown: list[str] = []
    ended = follow(jobs, "job", show=shown.append, patience=AT_ONCE)
    assert "".join(shown) == "one\ntwo\nthree\nfour\n"
    assert exit_code(ended) == 0


class Silent(FakeJobs):
    """Whose last connection alone ends."""

    async def tail_job_logs(self, job_id: str, /) -> AsyncIterator[str]:
        pieces, _ = self.connections.pop(0)
        for piece in pieces:
            yield piece
        if self.connections:
            await asyncio.Event().wait()


@pytest.mark.parametrize("meanwhile", [details("RUNNING"), details("SUCCEEDED", 0)])
def test_a_silent_connection_is_opened_anew_though_the_job_has_ended_meanwhile(meanwhile: FakeDetails) -> None:
    jobs = Silent(connections=[(["one\n"], None), (["one\n", "two\n"], None)], answers=[meanwhile])
    jobs.answers.append(details("SUCCEEDED", 0))
    shown: list[str] = []
    follow(jobs, "job", show=shown.append, patience=Patience(pause_seconds=0.0, quiet_seconds=0.01))
    assert "".join(shown) == "one\ntwo\n"


def test_a_job_that_was_seen_to_end_has_ended_though_its_server_goes_before_its_log_is_whole() -> None:
    class Going(Silent):
        async def tail_job_logs(self, job_id: str, /) -> AsyncIterator[str]:
            if not self.answers:
                raise ConnectionRefusedError("refused")
            async for piece in super().tail_job_logs(job_id):
                yield piece

    jobs = Going(connections=[(["one\n"], None), ([], None)], answers=[details("FAILED", 6)])
    patience = Patience(attempts=3, pause_seconds=0.0, quiet_seconds=0.01)
    assert exit_code(follow(jobs, "job", show=lambda _: None, patience=patience)) == 6


def test_a_server_that_stays_away_is_given_up_and_the_job_is_not() -> None:
    jobs = FakeJobs(connections=[([], ConnectionRefusedError("refused"))] * 3)
    with pytest.raises(EnvironmentFault, match=r"job ours: its server does not answer \(refused\); the job may go on"):
        follow(jobs, "ours", show=lambda _: None, patience=Patience(attempts=3, pause_seconds=0.0))
    assert not jobs.connections


@pytest.mark.parametrize(
    ("ended", "code", "lost", "told"),
    [
        (details("FAILED", 2), 2, False, "failed with exit code 2; see its log"),
        (details("FAILED", 6), 6, False, "failed with exit code 6"),
        (details("FAILED", -9), 137, True, "exit code 137; its driver was killed; submit the same command again"),
        (details("FAILED", 137), 137, True, "its driver was killed"),
        (details("FAILED", -11), 139, True, "exit code 139"),
        (details("FAILED", 127), 127, False, "no such interpreter: name the one that has Ray by --python"),
        (details("STOPPED"), 143, False, "was stopped; submit the same command again to resume"),
        (details("FAILED", None, "JOB_SUPERVISOR_ACTOR_DIED", "node died"), 4, True, "failed: node died"),
        (details("FAILED", None, "RUNTIME_ENV_SETUP_FAILURE", "no space"), 4, False, "failed: no space"),
    ],
)
def test_how_a_job_ended_is_passed_on(ended: FakeDetails, code: int, lost: bool, told: str) -> None:
    assert exit_code(ended) == failure(ended, "job").exit_code == code
    assert was_lost(ended) == lost
    assert told in str(failure(ended, "job"))


@pytest.fixture
def job(recipe: Path) -> Any:
    return prepared(Choices(recipe=str(recipe), out=Path("/shared/run"), variables={}, package=False))


def test_t15_a_job_whose_driver_is_killed_is_sent_again_under_a_new_id(job: Any) -> None:
    jobs = FakeJobs(
        connections=[(["first\n"], None), (["second\n"], None)],
        answers=[details("FAILED", -9), details("SUCCEEDED", 0)],
    )
    shown: list[str] = []
    ended = send_and_follow(
        jobs,
        job,
        show=shown.append,
        again=lambda: replace(job, submission_id="again"),
        num_resubmits=1,
        patience=AT_ONCE,
    )
    assert exit_code(ended) == 0
    assert shown == ["first\n", "second\n"]
    first, second = jobs.sent
    assert (first["submission_id"], second["submission_id"]) == (job.submission_id, "again")
    assert first["entrypoint"] == second["entrypoint"]
    assert first["runtime_env"]["env_vars"] == job.env_vars
    assert jobs.files == [{"submitted_recipe/tiny.toml": job.recipe_text}] * 2


@pytest.mark.parametrize(("end", "num_resubmits"), [(details("FAILED", -9), 0), (details("FAILED", 3), 5)])
def test_a_job_that_fails_by_itself_or_too_often_is_not_sent_again(
    job: Any, end: FakeDetails, num_resubmits: int
) -> None:
    jobs = FakeJobs(connections=[([], None)], answers=[end])
    with pytest.raises(JobFailedError, match=job.submission_id):
        send_and_follow(
            *(jobs, job),
            show=lambda _: None,
            again=lambda: pytest.fail("sent again"),
            num_resubmits=num_resubmits,
            patience=AT_ONCE,
        )
    assert len(jobs.sent) == 1
