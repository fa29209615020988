import os
import signal
import subprocess
import sys

import pytest

from ca2st.training.errors import InterruptedRunError, TerminatedError
from ca2st.training.signals import StopRequest, stop_on_signals, stopped_error


def run(code: str) -> subprocess.CompletedProcess[str]:
    program = f"import os, signal, time\nfrom ca2st.training.signals import stop_on_signals\n{code}"
    return subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_a_request_and_the_old_handlers_come_back(number: int) -> None:
    before = signal.getsignal(number)
    with stop_on_signals(grace_seconds=60.0) as stop:
        assert stop.signal_number == 0
        os.kill(os.getpid(), number)
        assert stop.signal_number == number
    assert signal.getsignal(number) is before


def test_the_first_request_counts() -> None:
    stop = StopRequest()
    stop.request(signal.SIGINT)
    stop.request(signal.SIGTERM)
    assert stop.signal_number == signal.SIGINT


def test_the_errors_carry_the_shells_exit_codes() -> None:
    assert isinstance(stopped_error(signal.SIGTERM, "x"), TerminatedError)
    assert isinstance(stopped_error(signal.SIGINT, "x"), InterruptedRunError)
    assert (TerminatedError.exit_code, InterruptedRunError.exit_code) == (143, 130)


def test_a_process_that_does_not_stop_within_its_grace_is_ended_with_its_stacks() -> None:
    # The handler of a process stuck in native code never runs: the main thread here is as deaf.
    done = run(
        "with stop_on_signals(grace_seconds=0.3):\n    signal.raise_signal(signal.SIGTERM)\n    time.sleep(30)\n"
    )
    assert done.returncode == 143
    assert "no exit within 0.3 s" in done.stderr
    assert "<string>" in done.stderr


def test_other_signals_do_not_lengthen_the_grace() -> None:
    done = run(
        "signal.signal(signal.SIGUSR1, lambda *_: None)\n"
        "with stop_on_signals(grace_seconds=0.6):\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    for _ in range(20):\n"
        "        time.sleep(0.2)\n"
        "        signal.raise_signal(signal.SIGUSR1)\n"
    )
    assert done.returncode == 143
    assert "no exit within 0.6 s" in done.stderr


def test_a_second_signal_ends_the_process_at_once() -> None:
    done = run(
        "with stop_on_signals(grace_seconds=30):\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    time.sleep(0.8)\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    time.sleep(30)\n"
    )
    assert done.returncode == 130
    assert "second signal" in done.stderr


def test_signals_that_come_together_are_one_request_and_the_grace_is_counted_from_the_first() -> None:
    together = "    for _ in range(3):\n        signal.raise_signal(signal.SIGINT)\n        time.sleep(0.05)\n"
    done = run(
        f"with stop_on_signals(grace_seconds=30) as stop:\n{together}    time.sleep(0.8)\nprint(stop.signal_number)\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")
    done = run(f"with stop_on_signals(grace_seconds=0.4):\n{together}    time.sleep(30)\n")
    assert (done.returncode, "no exit within 0.4 s" in done.stderr) == (130, True)
