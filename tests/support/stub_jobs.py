"""Job functions for decode children that misbehave on purpose; a job is a (kind, value) pair or a ClipJob."""

import os
import signal
import struct
import time
from multiprocessing.connection import Connection
from typing import Any

from sharding.decode_child import encode_clip
from sharding.errors import MediaError


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
    if kind == "bug":
        raise KeyError(value)
    if kind == "sleep":
        time.sleep(value)
    if kind == "die answering":
        Connection._send_bytes = _half_a_message_and_die  # type: ignore[attr-defined]  # where CPython sends
    if kind == "pid":
        return os.getpid()
    if kind == "modules":
        import sys

        return sorted(name for name in value if name in sys.modules)
    return value


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
    """`encode_clip`, but at the first b* file that is met the process that started this child is killed."""
    marker = job.path.parent / "killed"
    if job.path.name[0] == "b" and not marker.exists():
        marker.touch()
        os.kill(os.getppid(), signal.SIGKILL)
    return encode_clip(job)
