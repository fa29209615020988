"""One file of the shard cache at a time: opened, filled and evicted under the kernel's locks (see shard_cache.py)."""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ca2st.durable import fsync_folder, is_environment_error
from ca2st.errors import EnvironmentFault

_PART = ".part"
_SUFFIXES = (".tar", ".index.parquet", _PART)


@dataclass(frozen=True, slots=True)
class CachedFile:
    """A file of the cache as it lies on disk."""

    path: Path
    num_bytes: int
    last_used_ns: int
    """Its access time."""

    @property
    def is_part(self) -> bool:
        """Whether it is being fetched, or was when its process died."""
        return self.path.name.endswith(_PART)


def part_of(path: Path) -> Path:
    """Where a file is while it is being fetched."""
    return path.with_name(path.name + _PART)


def cached_file(path: Path) -> CachedFile | None:
    """What lies at `path`; None where that is gone, or no file of shards."""
    if not path.name.endswith(_SUFFIXES):
        return None
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return CachedFile(path, state.st_size, state.st_atime_ns)


def open_held(path: Path, num_bytes: int) -> int | None:
    """A descriptor with a shared lock on a complete file; None where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        state = os.fstat(descriptor)
        if state.st_nlink and state.st_size == num_bytes:
            os.utime(descriptor, ns=(time.time_ns(), state.st_mtime_ns))
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    if state.st_nlink:
        path.unlink(missing_ok=True)  # cut or grown since it was fetched
    return None


def is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one that lies at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def evict(path: Path) -> bool:
    """Remove a file that nobody holds; a part file that nobody holds was left by a dead process."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def filled(part: int, path: Path, fill: Callable[[int], None]) -> int:
    """The locked part file of `path`, filled and given its name, with a shared lock; closed and removed on any error.

    Raises:
        EnvironmentFault: as `naming_place`; and whatever `fill` raises.
    """
    part_path = part_of(path)
    try:
        with naming_place(path):
            fill(part)
            os.fsync(part)
            part_path.rename(path)
            fsync_folder(path.parent)
            fcntl.flock(part, fcntl.LOCK_SH)
            os.utime(part, ns=(time.time_ns(), os.fstat(part).st_mtime_ns))
    except BaseException:
        part_path.unlink(missing_ok=True)
        os.close(part)
        raise
    return part


@contextmanager
def naming_place(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into an error that names the place.

    Raises:
        EnvironmentFault: the disk is full, or the folder may not be written.
    """
    try:
        yield
    except OSError as error:
        if not is_environment_error(error):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space, lower data.loader.cache_bytes" if full else "check the folder's permissions"
        raise EnvironmentFault(
            f"{path}: cannot write the cache of shards ({error.strerror}); {remedy}, or set data.loader.cache_dir to "
            "another disk"
        ) from error
