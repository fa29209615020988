"""A pool of decode children: results in the order of the jobs, one bad clip never more than one reject.

One thread of the parent moves everything: it hands jobs to idle children, waits on their pipes, kills the one whose
clip takes too long, and replaces the one that died. Closing the pool ends every child at once. A child (`serve`) limits
its own memory, files and processor time, and gives up writing, starting programs and TCP where Linux offers Landlock.
"""

import contextlib
import ctypes
import math
import os
import resource
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av

from ca2st.errors import EnvironmentFault
from ca2st.processes import SPAWN, die_with_parent, start_deaf
from sharding.errors import MediaError, RejectReason

_MAX_OPEN_FILES = 64
_LONGEST_SECONDS = 1e9  # what a limit of the system can express on every machine
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWNET = 0x40000000
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446  # the same numbers on every processor
_LANDLOCK_VERSION = 1
_READS = 1 << 2 | 1 << 3  # of files, of folders
_FILE_ACTS = {1: 13, 2: 14, 3: 15}  # bits that each version of Landlock knows, the newest of these for all later ones
_BIND_OR_CONNECT_TCP, _NET_VERSION = 0b11, 4
_START_SECONDS = 120.0  # a cold interpreter on a busy machine
_LOOK_AHEAD = 3  # jobs per child, finished or not, ahead of the one that is awaited


@dataclass(frozen=True, slots=True)
class Rejected:
    """Why a clip could not be made; `what` names no path, so that it is the same in every place."""

    reason: RejectReason
    what: str


_LATE = Rejected("timeout", "expected the clip within the clip timeout, found it unfinished")


class _Child:
    """One process, its pipe, and the job it is working on."""

    def __init__(self, job_function: Callable[[Any], Any], memory_bytes: int, timeout_seconds: float) -> None:
        ours, theirs = SPAWN.Pipe()  # spawned: forking after PyAV or torch work hangs
        self.connection: Connection = ours
        self.process: BaseProcess = SPAWN.Process(
            target=serve, args=(theirs, job_function, memory_bytes, timeout_seconds), daemon=True
        )
        start_deaf(self.process)
        theirs.close()
        self.ready = False
        self.index: int | None = None
        self.deadline = time.monotonic() + _START_SECONDS

    @property
    def idle(self) -> bool:
        return self.ready and self.index is None

    def give(self, index: int, job: Any, timeout_seconds: float) -> None:
        self.index, self.deadline = index, time.monotonic() + timeout_seconds
        self.connection.send(job)

    def end(self, *, dying: bool = False) -> int | None:
        """Reap the process, killing it first unless it is dying anyway; its exit code."""
        if dying:
            self.process.join(timeout=5.0)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode
        self.connection.close()
        self.process.close()
        return code


class DecodePool:
    """Runs `job_function` in `num_workers` children.

    Args:
        job_function: A function of one picklable argument at the top of a module that children can import, so not of
            the main script; it may raise MediaError.
        num_workers: Children at a time.
        timeout_seconds: Wall time of one job, and processor time of its child.
        memory_bytes: Address space a child may add to what it starts with.
    """

    def __init__(
        self,
        job_function: Callable[[Any], Any],
        *,
        num_workers: int,
        timeout_seconds: float,
        memory_bytes: int = 4 * 2**30,
    ) -> None:
        self._job_function, self._memory_bytes = job_function, memory_bytes
        self._num_workers, self._timeout_seconds = num_workers, timeout_seconds
        self._children: list[_Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every child."""
        children, self._children = self._children, []
        for child in children:
            child.process.kill()
        for child in children:
            child.end()

    def map(self, jobs: Iterable[Any]) -> Iterator[Any]:
        """Yield a result or a `Rejected` for each job, in order; at most a few jobs per child are read ahead.

        One map at a time, used up or followed by `close`.

        Raises:
            EnvironmentFault: a child cannot be started.
        """
        numbered = enumerate(jobs)
        waiting = deque(islice(numbered, self._num_workers))
        done: dict[int, Any] = {}
        next_out = 0
        while True:
            while next_out in done:
                yield done.pop(next_out)
                next_out += 1
            while waiting and waiting[0][0] - next_out < _LOOK_AHEAD * self._num_workers and self._give(*waiting[0]):
                waiting.popleft()
                waiting.extend(islice(numbered, 1))
            if not waiting and not done and all(child.index is None for child in self._children):
                return
            num_starting = sum(not child.ready for child in self._children)
            room = self._num_workers - len(self._children)
            for _ in range(min(len(waiting) - num_starting, room)):  # all at once
                try:
                    self._children.append(_Child(self._job_function, self._memory_bytes, self._timeout_seconds))
                except OSError as error:
                    raise cannot_start("a decode child", error) from error
            if next_out not in done:
                self._collect(done)

    def _give(self, index: int, job: Any) -> bool:
        """Hand a job to an idle child; False when none is idle now."""
        for child in [child for child in self._children if child.idle]:
            try:
                child.give(index, job, self._timeout_seconds)
            except OSError:  # it died while idle: no fault of this job
                self._drop(child)
                continue
            return True
        return False

    def _collect(self, done: dict[int, Any]) -> None:
        """Wait for the next message, death or deadline, and deal with every one that is due."""
        awaited = [child for child in self._children if not child.idle]
        now = time.monotonic()
        patience = max(0.0, min((child.deadline for child in awaited), default=now) - now)
        talking = wait([child.connection for child in awaited], timeout=patience)
        for child in awaited:
            if child.connection in talking:
                self._receive(child, done)
            elif time.monotonic() >= child.deadline:
                self._drop(child)
                if child.index is None:
                    raise EnvironmentFault(
                        f"a decode child did not start within {_START_SECONDS:g} s; is the machine overloaded?"
                    )
                done[child.index] = _LATE

    def _receive(self, child: _Child, done: dict[int, Any]) -> None:
        try:
            message = child.connection.recv()
        except (EOFError, OSError):  # OSError: it died in the middle of a message
            code = self._drop(child, dying=True)
            if child.index is None:
                raise EnvironmentFault(
                    f"a decode child ended while starting (exit code {code}); is memory short?"
                ) from None
            died = Rejected("decoder_crash", f"the decoding process died: {exit_in_words(code)}")
            done[child.index] = _LATE if code == -signal.SIGXCPU else died
            return
        if child.index is None:
            child.ready = True
            return
        done[child.index], child.index = message, None
        if isinstance(message, Rejected) and message.reason == "out_of_memory":
            self._drop(child)  # what is left of its heap is not worth keeping

    def _drop(self, child: _Child, *, dying: bool = False) -> int | None:
        self._children.remove(child)
        return child.end(dying=dying)


def cannot_start(what: str, error: OSError) -> EnvironmentFault:
    """Return the fault to raise where the machine has no room for one more process."""
    return EnvironmentFault(
        f"{what} cannot be started: {error.strerror}; give fewer --workers, or raise the limits for open files and "
        "processes (ulimit -n, ulimit -u)"
    )


def exit_in_words(code: int | None) -> str:
    """Return how a process ended: the name of its signal, or its exit code."""
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


def serve(
    connection: Connection, job_function: Callable[[Any], Any], memory_bytes: int, timeout_seconds: float
) -> None:
    """Answer jobs from `connection` until it closes; the body of a child process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()
    _limit_resources(memory_bytes)
    _give_up_privileges()
    with contextlib.suppress(EOFError, ConnectionError):
        connection.send("ready")
        while True:
            job = connection.recv()
            _limit_processor_time(timeout_seconds)
            connection.send(_answer(job_function, job))


def _answer(job_function: Callable[[Any], Any], job: Any) -> Any:
    try:
        return job_function(job)
    except MediaError as error:
        return Rejected(error.reason, str(error))
    except MemoryError:
        return Rejected("out_of_memory", "decoding needed more memory than a child may have")
    except av.error.FFmpegError as error:  # some are OSErrors, too
        return Rejected("decode_error", f"FFmpeg: {error.strerror}")
    except OSError as error:
        return Rejected("missing_file", f"expected a readable file, found: {error.strerror}")
    except Exception as error:  # noqa: BLE001  a fault on one file is counted with its name, not the end of a conversion
        return Rejected("internal_error", f"{type(error).__name__}: {error}")


def _limit_resources(memory_bytes: int) -> None:
    """`memory_bytes` of address space more than the process has now, no core files, few open files and no writing."""
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, 0)  # a write fails; pipes have no size
    _lower(resource.RLIMIT_NOFILE, _MAX_OPEN_FILES)
    if sys.platform == "linux":
        now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _lower(resource.RLIMIT_AS, now + memory_bytes)


def _lower(limit: int, value: int) -> None:
    """For good; a limit from outside that is lower stays."""
    _, hard = resource.getrlimit(limit)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def _limit_processor_time(seconds: float) -> None:
    """SIGXCPU ends a process that computes for as long as the clip may take, should nobody watch it any more."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(time.process_time() + min(seconds, _LONGEST_SECONDS)) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _give_up_privileges() -> None:
    """As much of the file system and the network as this system lets a process give up; see the module's text."""
    if sys.platform != "linux":
        return
    linux = ctypes.CDLL(None)
    linux.unshare(_CLONE_NEWNET)  # refused to most: no harm
    linux.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    version = linux.syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION)
    if version < 1:  # not in this kernel, or switched off
        return
    acts = ((1 << _FILE_ACTS[min(version, max(_FILE_ACTS))]) - 1) & ~_READS
    rules = (ctypes.c_uint64 * 2)(acts, _BIND_OR_CONNECT_TCP if version >= _NET_VERSION else 0)
    ruleset = linux.syscall(_LANDLOCK_CREATE_RULESET, rules, ctypes.sizeof(rules), 0)
    if ruleset >= 0:
        linux.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0)
        os.close(ruleset)
