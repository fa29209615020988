"""Job functions for decode children that misbehave on purpose; a job is a (kind, value) pair or a ClipJob."""

import os
import resource
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sharding.errors import MediaError
from sharding.media.encode import encode_clip

WAS_KILLED = 0o700


def act(job: tuple[str, Any]) -> Any:
    """Do what `job` says, in the child."""
    kind, value = job
    if kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "exit":
        os._exit(value)
    if kind == "hang":
        time.sleep(3600)
    if kind == "eat":
        return len(bytearray(value))
    if kind == "refuse":
        raise MediaError("decode_error", value)
    if kind == "ffmpeg":
        import av

        raise av.error.OSError(95, value)
    if kind == "bug":
        raise KeyError(value)
    if kind == "sleep":
        time.sleep(value)
    if kind == "die answering":
        Connection._send_bytes = _half_a_message_and_die  # type: ignore[attr-defined]  # where CPython sends
    if kind == "pid":
        return os.getpid()
    if kind == "spin":
        while time.process_time() < value:
            pass
    if kind == "signal":
        os.kill(os.getpid(), value)
    if kind == "limits":
        return [resource.getrlimit(limit)[0] for limit in value]
    if kind == "reach out":
        return refused_acts(*value)
    if kind == "modules":
        import sys

        return sorted(name for name in value if name in sys.modules)
    return value


def refused_acts(folder: Path, port: int) -> list[str]:
    """Which of the things that no decoder needs the system refuses; `folder` holds a file named old of one byte."""
    acts: dict[str, Callable[[], object]] = {
        "grow a file": lambda: (folder / "old").write_bytes(b"more"),
        "empty a file": lambda: os.truncate(folder / "old", 0),
        "make a file": lambda: (folder / "new").touch(),
        "make a folder": lambda: (folder / "folder").mkdir(),
        "make a link": lambda: (folder / "link").symlink_to("old"),
        "rename": lambda: (folder / "old").rename(folder / "other"),
        "remove": lambda: (folder / "old").unlink(),
        "start a program": lambda: subprocess.run(["true"], check=True),
        "connect": lambda: socket.create_connection(("127.0.0.1", port), timeout=5).close(),
        "open many files": lambda: [os.open(os.devnull, os.O_RDONLY) for _ in range(200)],
    }
    refused = []
    for name, do in acts.items():
        try:
            do()
        except OSError:
            refused.append(name)
    return refused


def _half_a_message_and_die(connection: Any, data: bytes) -> None:
    connection._send(struct.pack("!i", 2 * len(data)) + bytes(data))
    os.kill(os.getpid(), signal.SIGKILL)


def crash_on_b(job: Any) -> Any:
    """`encode_clip`, except that the decoder crashes on files named b*, hangs on h* and runs out of memory on m*."""
    first = job.path.name[0]
    if first == "b":
        os.kill(os.getpid(), signal.SIGSEGV)
    if first == "h":
        time.sleep(3600)
    if first == "m":
        raise MemoryError
    return encode_clip(job)


def kill_the_worker_once_at_b(job: Any) -> Any:
    """`encode_clip`, but at the first b* file that is met the process that started this child is killed.

    A child cannot make a file: that it was done is kept in the mode of the folder.
    """
    folder = job.path.parent
    if job.path.name[0] == "b" and folder.stat().st_mode & 0o777 != WAS_KILLED:
        folder.chmod(WAS_KILLED)
        os.kill(os.getppid(), signal.SIGKILL)
    return encode_clip(job)


def kill_the_worker(job: Any) -> Any:
    """End the process that started this child, with every clip."""
    os.kill(os.getppid(), signal.SIGKILL)
    return encode_clip(job)


def kill_the_worker_once_at_each(job: Any) -> Any:
    """`encode_clip`, but whoever meets a file first is killed, with the process that started it.

    A child cannot make a file: that it was done is kept in the mode of the clip.
    """
    if job.path.stat().st_mode & 0o777 != WAS_KILLED:
        job.path.chmod(WAS_KILLED)
        os.kill(os.getppid(), signal.SIGKILL)
    return encode_clip(job)
