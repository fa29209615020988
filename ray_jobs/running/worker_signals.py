"""SIGINT and SIGTERM on their way from a launching process to its workers, from the moment they are started."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def signals_held() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait, here and in processes that are started meanwhile, until somebody can answer them.

    Here a mask is not enough: the kernel gives a signal to any thread that does not mask it, as those of a library.
    """
    resource_tracker.ensure_running()  # when first needed it would let them through
    came: list[int] = []
    handlers = {number: signal.signal(number, lambda number, _frame: came.append(number)) for number in STOPPING}
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for one in came:
            signal.raise_signal(one)


def take_signals() -> None:
    """In a worker: until there is something to save, a signal ends it at once, and its parent says so."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


@contextmanager
def signals_to(workers: Sequence[BaseProcess], begun: Sequence[int]) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to the workers, which checkpoint and end; this process waits for them.

    A worker that has not `begun` hears no signal yet and is killed. Gives the signals for which that was done.
    """
    ended_unbegun: list[int] = []

    def forward(number: int, _frame: object) -> None:
        for worker, has_begun in zip(workers, begun, strict=True):
            if worker.pid is None:
                continue
            if not has_begun:
                ended_unbegun.append(number)
            with suppress(ProcessLookupError):  # ended already
                os.kill(worker.pid, number if has_begun else signal.SIGKILL)

    previous = {number: signal.signal(number, forward) for number in STOPPING}
    try:
        yield ended_unbegun
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
