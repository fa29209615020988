"""Threads that read bytes and never keep a process alive.

`concurrent.futures` waits at the interpreter's exit for every thread it ever started: one read that never returns,
from a file server that is gone, and the process never ends. These are daemons: closing waits for them only so long.
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_Call = Callable[[], None]


class FetchThreads:
    """A fixed number of threads that make calls in the order they came; errors travel in the futures."""

    def __init__(self, count: int) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"clip-fetch_{number}", daemon=True) for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> "Future[T]":
        """Have `function` called by one of the threads."""
        future: Future[T] = Future()

        def call() -> None:
            if self._closing.is_set() or not future.set_running_or_notify_cancel():
                future.cancel()
                return
            try:
                future.set_result(function(*arguments, **named))
            except BaseException as error:  # noqa: BLE001 - carried to whoever asks for the result
                future.set_exception(error)

        self._calls.put(call)
        return future

    def close(self, *, patience_seconds: float = 10.0) -> None:
        """Let running calls end, drop those that wait, and end the threads; one that hangs is left behind."""
        self._closing.set()
        for _ in self._threads:
            self._calls.put(None)
        deadline = time.monotonic() + patience_seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call
