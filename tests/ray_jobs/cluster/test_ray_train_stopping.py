"""How a driver ends that has nothing to save yet, and how a worker learns that it should save and stop."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ca2st.training.errors import InterruptedRunError, TerminatedError
from ray_jobs.cluster.driver import hold, preemption_notice, watching
from ray_jobs.cluster.supervision import LaunchFolder, ended_by_signals


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, TerminatedError), (signal.SIGINT, InterruptedRunError)])
def test_j6_a_signal_while_nothing_is_to_be_saved_ends_through_the_cleaning_up(
    number: int, kind: type[Exception]
) -> None:
    before, cleaned = signal.getsignal(number), list[str]()

    def connect() -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as `ray.init` does
        try:
            with contextlib.suppress(Exception):  # as a library might, that tries again
                os.kill(os.getpid(), number)
                time.sleep(10)
        finally:
            os.kill(os.getpid(), number)  # a terminal and the parent, timeout(1): one request, heard twice
            time.sleep(0.1)
            cleaned.append("all")

    begin = time.monotonic()
    with pytest.raises(kind, match="rerun to resume"), ended_by_signals("rerun to resume"):
        connect()
    assert cleaned == ["all"]
    assert time.monotonic() - begin >= 0.5, "who comes late finds the block's handler still"
    assert signal.getsignal(number) == before
    signal.signal(number, before)
    assert signal.getsignal(number) == before


def test_j6_a_second_request_while_it_cleans_up_ends_the_process_at_once() -> None:
    code = (
        "import os, signal, time\n"
        "from ray_jobs.cluster.supervision import ended_by_signals\n"
        "with ended_by_signals('never told'):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    finally:\n"
        "        time.sleep(0.8)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(300)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=200)
    assert (done.returncode, "second signal" in done.stderr, "never told" in done.stderr) == (130, True, False)


def test_t14_a_worker_hears_of_the_stop_file_in_a_thread_of_its_own(tmp_path: Path) -> None:
    folder = LaunchFolder.make(tmp_path, "run")
    with watching(folder.stop_signal, poll_seconds=0.01) as stop:
        time.sleep(0.05)
        assert stop.signal_number == 0
        folder.ask_stop(signal.SIGINT)
        _until(lambda: stop.signal_number == signal.SIGINT)


def test_t14_storage_that_does_not_answer_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    answers = iter([OSError("stale file handle"), OSError("stale file handle"), ValueError("half a file")])

    def ask() -> int:
        error = next(answers, None)
        if error is not None:
            raise error
        return int(signal.SIGTERM)

    with watching(ask, poll_seconds=0.01) as stop:
        _until(lambda: stop.signal_number == signal.SIGTERM)
    assert caplog.text.count("stale file handle") == 1
    assert "half a file" not in caplog.text


def test_t14_after_a_notice_a_worker_holds_until_somebody_stops_the_run(tmp_path: Path) -> None:
    folder = LaunchFolder.make(tmp_path, "run")
    holding = threading.Thread(target=hold, args=(folder.stop_signal,), kwargs={"poll_seconds": 0.01})
    holding.start()
    holding.join(0.05)
    assert holding.is_alive()
    folder.ask_stop(signal.SIGTERM)
    holding.join(10)
    assert not holding.is_alive()


def test_t14_rays_notice_is_read_where_ray_keeps_it() -> None:
    from ray.train.v2._internal.execution import context
    from ray.train.v2._internal.execution.preemption import PreemptionContext
    from ray.train.v2.api.preemption import PreemptionInfo

    class Context:
        preemption_context = PreemptionContext()

    info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a" * 56: [1]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context, "_train_context", Context)
        assert preemption_notice() is None
        Context.preemption_context.preemption_info = info
        assert preemption_notice() is info


def _until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("never happened")
