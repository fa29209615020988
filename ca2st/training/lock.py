"""One training at a time in a run folder."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from ca2st.durable import open_itself
from ca2st.training.errors import RunFolderBusyError

LOCK_NAME = "run.lock"
"""Held by the rank that writes."""
LAUNCH_LOCK_NAME = "launch.lock"
"""Held by the command that starts the ranks, for as long as it starts them again."""
_POLL_SECONDS = 0.2
_MOST_BYTES = 500


@contextlib.contextmanager
def locked(folder: Path, *, name: str = LOCK_NAME, wait_seconds: float = 5.0) -> Iterator[None]:
    """Hold one of the folder's locks; the kernel releases it when the process ends, however it ends.

    `wait_seconds` lets a killed predecessor finish dying, and whoever only looks whether the lock is held let go of it,
    before this one gives up.

    Raises:
        RunFolderBusyError: another process holds it, named by host and process id.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open_itself(folder / name, "a+b") as file:
        deadline = time.monotonic() + wait_seconds
        while not _try_lock(file.fileno()):
            if time.monotonic() >= deadline:
                file.seek(0)
                holder = file.read(_MOST_BYTES).decode(errors="replace").strip() or "another process"
                raise RunFolderBusyError(
                    f"{folder}: {holder} is training in this run folder; wait for it, stop it, or choose another folder"
                )
            time.sleep(_POLL_SECONDS)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
