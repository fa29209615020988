"""Processor cores, and child processes that start without the program that started them, and end with it.

Python's own spawn runs the caller's main script in every child first: a script without a ``__main__`` guard would start
itself again, and ``python -`` has none that could be run. Children of `SPAWN` import only what their function needs.
"""

import ctypes
import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
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


STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def signals_held(masked: Collection[int] = STOPPING) -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the block ends, and those `masked` in processes that are started meanwhile.

    Such a process hears them once it takes them off its mask. Here a mask is not enough: the kernel gives a signal to
    any thread that does not mask it, as those of a library.
    """
    resource_tracker.ensure_running()  # when first needed it would let them through
    came: list[int] = []
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers, nor hears of a signal
        handlers = {number: signal.signal(number, lambda number, _frame: came.append(number)) for number in STOPPING}
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, masked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for one in came:
            signal.raise_signal(one)


def start_deaf(process: BaseProcess) -> None:
    """Start a child that will ignore SIGINT, blocked until then: Ctrl-C reaches a child that still imports, too."""
    with signals_held(masked=[signal.SIGINT]):
        process.start()


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
