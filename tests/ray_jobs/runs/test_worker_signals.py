"""Signals and deaths while a launching process starts its workers."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from ca2st.processes import STOPPING, signals_held


@pytest.mark.parametrize("number", STOPPING)
def test_j6_a_signal_that_another_thread_would_take_waits_until_somebody_can_answer_it(number: int) -> None:
    heard, ended = list[int](), threading.Event()
    deaf_to_nothing = threading.Thread(target=ended.wait)  # as the threads of a library: it masks no signal
    deaf_to_nothing.start()
    before = signal.signal(number, lambda number, _frame: heard.append(number))
    try:
        with signals_held():
            os.kill(os.getpid(), number)
            time.sleep(0.1)
            assert heard == []
            child = subprocess.run([sys.executable, "-c", _MASKED], capture_output=True, text=True, check=True)
        assert heard == [number]
        assert child.stdout.split() == ["2", "15"], "a process that is started meanwhile waits too"
    finally:
        signal.signal(number, before)
        ended.set()
        deaf_to_nothing.join()


_MASKED = "import signal\nprint(*sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))))"
_LAUNCHER = """
import multiprocessing, time
from ca2st.processes import die_with_parent

def work():
    time.sleep(1.5)
    die_with_parent()
    time.sleep(60)

if __name__ == "__main__":
    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(60)
"""


def test_t4_a_worker_whose_parent_died_before_it_had_begun_does_not_train_on_alone() -> None:
    with subprocess.Popen([sys.executable, "-c", _LAUNCHER], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        worker = psutil.Process(int(launcher.stdout.readline()))
        launcher.kill()
    gone, _alive = psutil.wait_procs([worker], timeout=10)
    for left in _alive:
        left.kill()
    assert gone
