"""The process that follows a run goes on through every trouble, and hears when it shall end."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.tracking import following
from ray_jobs.tracking.following import follow
from ray_jobs.tracking.sender import Sender
from support.fake_mlflow import FakeMlflow, served
from support.tracked_runs import losses, remote_run, start, step, write


@pytest.fixture
def own_signals() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals")
def test_k2_refused_credentials_are_told_once_and_not_asked_again_every_two_seconds(
    tmp_path: Path, fake: FakeMlflow
) -> None:
    run_dir = remote_run(tmp_path / "runs" / "mine", fake.uri)
    fake.status = 401
    told: list[str] = []

    def end_soon() -> None:
        if fake.asked.wait(60):
            threading.Event().wait(0.5)  # fifty intervals
        os.kill(os.getpid(), signal.SIGTERM)

    ender = threading.Thread(target=end_soon)
    with served(fake):
        ender.start()
        follow(run_dir, parent_pid=os.getppid(), say=told.append, interval_seconds=0.01)
        ender.join()
    assert fake.num_requests == 3  # the first try, the question why, and the last one at the end
    assert [line for line in told if "refuses the credentials" in line] == told[:1]
    assert told[1:] == ["(the same 1 times more)"]


@pytest.mark.usefixtures("own_signals")
def test_an_error_that_nobody_expected_is_told_once_and_ends_no_follower(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works, tries, told = Sender.send, [], list[str]()

    def send(sender: Sender, **named: Any) -> int:
        tries.append(named)
        if len(tries) < 3:
            raise ValueError("Expecting value: line 1 from https://me:hunter2@host")
        os.kill(os.getpid(), signal.SIGTERM)
        return works(sender, **named)

    monkeypatch.setattr(Sender, "send", send)
    write(run_dir, start(), step(1, 3.0))
    follow(run_dir, parent_pid=os.getppid(), say=told.append, interval_seconds=0.01)
    assert losses(run_dir) == [(1, 3.0)]
    assert told[0].startswith("Traceback (most recent call last)")
    assert told[0].endswith("ValueError: Expecting value: line 1 from https://[hidden]@host")
    assert told[1:] == ["(the same 1 times more)", "MLflow answers again, after 2 tries in vain"]


@pytest.mark.usefixtures("own_signals")
def test_a_follower_that_is_asked_to_end_while_it_sends_an_orphan_hears_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []

    def end_orphans(run_dir: Path, *, is_asked_to_end: Callable[[], bool], **named: Any) -> list[str]:
        heard.append(is_asked_to_end())
        write(run_dir, step(2, 2.0))
        os.kill(os.getpid(), signal.SIGTERM)
        heard.append(is_asked_to_end())
        return []

    monkeypatch.setattr(following, "end_orphans", end_orphans)
    write(run_dir, start(), step(1, 3.0))
    follow(run_dir, parent_pid=os.getppid(), say=print, interval_seconds=0.01)
    assert heard == [False, True]
    assert losses(run_dir) == [(1, 3.0), (2, 2.0)]


@pytest.mark.usefixtures("own_signals")
def test_a_follower_sends_the_rest_and_ends_when_who_trains_is_gone(tmp_path: Path, fake: FakeMlflow) -> None:
    run_dir = remote_run(tmp_path / "runs" / "mine", fake.uri)
    with served(fake):
        follow(run_dir, parent_pid=-1, say=print, interval_seconds=0.01)
    assert fake.losses() == [(1, 3.0)]
