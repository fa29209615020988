"""Processor cores, and child processes that start without the program that started them, and end with it.

Python's own spawn runs the caller's main script in every child first: a script without a ``__main__`` guard would start
itself again, and ``python -`` has none that could be run. Children of `SPAWN` import only what their function needs.
"""

import contextlib
import ctypes
import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import popen_spawn_posix, reduction, resource_tracker, spawn, util
from multiprocessing.context import SpawnContext, SpawnProcess, set_spawning_popen
from multiprocessing.process import BaseProcess
from typing import Any


def num_cores() -> int:
    """Return the processor cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """In a child: ask Linux to kill it when the thread that started it ends; end at once where it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():  # it died before the request above
        os._exit(128 + signal.SIGKILL)


def start_deaf(process: BaseProcess) -> None:
    """Start a child that is to ignore SIGINT, which waits until it does: Ctrl-C reaches it while it imports, too."""
    resource_tracker.ensure_running()  # when first needed it would let the signal through
    with _handlers_held():
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@contextlib.contextmanager
def _handlers_held() -> Iterator[None]:
    """Let Python's handlers wait: what one raises between two lines would leave a child that nobody knows."""
    came: list[int] = []
    handlers: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler) and threading.current_thread() is threading.main_thread():
                handlers[number] = handler
                signal.signal(number, lambda number, _frame: came.append(number))
        yield
    finally:
        for held, handler in handlers.items():
            signal.signal(held, handler)
        for one in came:
            signal.raise_signal(one)


class _Popen(popen_spawn_posix.Popen):
    """Python's, but for the main script and for files of the working directory named like modules (``-P``)."""

    _fds: list[int]
    """What the child inherits; Python's own list."""

    def _launch(self, process_obj: BaseProcess) -> None:
        tracker_fd = resource_tracker.getfd()
        assert tracker_fd is not None  # it runs now
        self._fds.append(tracker_fd)
        preparation = spawn.get_preparation_data(process_obj.name)
        for main in ("init_main_from_name", "init_main_from_path"):
            preparation.pop(main, None)
        message = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(preparation, message)
            reduction.dump(process_obj, message)
        finally:
            set_spawning_popen(None)
        # The child reads the message from one pipe; its end of the other closes when it dies.
        child_reads, parent_writes = os.pipe()
        self.sentinel, child_holds = os.pipe()
        self.finalizer = util.Finalize(self, _close, (self.sentinel, parent_writes))
        try:
            executable, *options = spawn.get_command_line(tracker_fd=tracker_fd, pipe_handle=child_reads)
            self._fds += [child_reads, child_holds]
            self.pid = util.spawnv_passfds(os.fsencode(executable), [executable, "-P", *options], self._fds)
        finally:
            os.close(child_reads)
            os.close(child_holds)
        with open(parent_writes, "wb", closefd=False) as pipe:
            pipe.write(message.getbuffer())


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class _Process(SpawnProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> _Popen:  # noqa: N802  # the name that multiprocessing calls
        return _Popen(process_obj)


class _Context(SpawnContext):
    Process = _Process


SPAWN = _Context()
"""A multiprocessing context. What it runs lies in a module that a child can import, never in the main script."""
