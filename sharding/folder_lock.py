"""One converter an output folder: an advisory lock that the kernel releases when its holder dies."""

import contextlib
import errno
import fcntl
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from ca2st.checked_json import read_json
from ca2st.durable import is_environment_error, unwritable
from ca2st.errors import CA2STError, EnvironmentFault
from sharding.errors import ConversionRefusedError

LOCK_NAME = ".conversion.lock"


class _Holder(TypedDict):
    pid: int
    host: str


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the lock file goes when the block ends, a dead holder's is taken over.

    Raises:
        ConversionRefusedError: another process holds it; the message names it.
        EnvironmentFault: the lock file cannot be made, or this file system has no locks.
    """
    path = folder / LOCK_NAME
    descriptor = _acquire(path)
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # while the lock is held: nobody else can have it open and locked
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        try:
            descriptor = _opened_and_locked(path)
        except BlockingIOError:
            raise ConversionRefusedError(
                f"{path.parent}: another conversion writes here ({_holder(path)}); "
                "wait for it, stop it, or choose another --out"
            ) from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise EnvironmentFault(
                    f"cannot lock {path}: expected a file of a conversion, found a symbolic link; remove it"
                ) from error
            if is_environment_error(error):
                raise unwritable(path.parent, error) from error
            raise EnvironmentFault(f"cannot lock {path}: {error.strerror}; choose another folder") from error
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)  # its last holder removed it between our open and our lock


def _opened_and_locked(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        holder = read_json(path, _Holder)
    except (OSError, CA2STError):
        return "an unnamed process"
    return f"process {holder['pid']} on {holder['host']}"
