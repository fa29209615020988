"""Whole shards of remote sets on this machine's disk: bounded, shared by all its processes, safe against crashes.

::

    <cache_dir>/cache.lock                    held (flock) while room is made and files are claimed
    <cache_dir>/<manifest hash>/NAME          complete: size and sha256 were compared before it got this name
    <cache_dir>/<manifest hash>/NAME.part     being fetched by the holder of its flock; else left by a dead process

Locks are the kernel's and end with their holder; no file is a lock by existing. Every reader of a file holds a shared
flock on it, and only a file without a holder is evicted: least recently used first, where the time of last use is the
file's access time, set at every opening. A part file takes its full size when it is claimed, so the sum of sizes is
what the cache holds, fetches under way included.
"""

import errno
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ca2st.durable import fsync_folder, is_environment_error, take_lock
from ca2st.errors import EnvironmentFault, UserInputError

_PART = ".part"
_SUFFIXES = (".tar", ".index.parquet", _PART)
_LOCK_NAME = "cache.lock"
_POLL_SECONDS = 0.02
_RELEASED = 0
"""Access time, in ns, of a file that its readers have released."""


class NoRoomError(Exception):
    """Nothing may be evicted for a file that is not needed yet."""


class ShardCache:
    """The cache folder as one process sees it; safe to use from several threads."""

    def __init__(self, folder: Path, *, most_bytes: int | None, patience_seconds: float = 600.0) -> None:
        """Make the folder where it is missing; `most_bytes` None takes half of what its disk has for it.

        Raises:
            EnvironmentFault: the folder cannot be made.
        """
        self._folder, self._patience_seconds = folder, patience_seconds
        with _naming_place(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.most_bytes = most_bytes or (shutil.disk_usage(folder).free + self.held_bytes()) // 2
            """Most bytes of files, those being fetched included."""

    def held_bytes(self) -> int:
        """Return the bytes of the files in the cache, those being fetched included."""
        return sum(state.st_size for _, state in self._kept())

    def require_room_for(self, num_bytes: int, what: str) -> None:
        """Refuse a cache that could never hold a file.

        Raises:
            UserInputError: with the numbers.
        """
        if num_bytes > self.most_bytes:
            raise UserInputError(
                f"data.loader.cache_bytes: expected at least {num_bytes} bytes for {what}, found {self.most_bytes} in "
                f"{self._folder}; raise it, or set data.loader.cache_dir to a larger disk"
            )

    def open(
        self,
        path: Path,
        num_bytes: int,
        fill: Callable[[int], None],
        *,
        ahead: bool = False,
        on_wait: Callable[[], None] = lambda: None,
    ) -> int:
        """Open a file of the cache, which is held until it is closed; fetch it first where it is not there.

        Args:
            path: The file, in a set's folder.
            num_bytes: Its size.
            fill: Writes all of it to a descriptor and checks it; called by one process for all that wait.
            ahead: The file is not needed yet: nothing that is still in use is evicted for it.
            on_wait: Called again and again while another process fetches the file, or room is in use.

        Raises:
            NoRoomError: `ahead`, and there is no room.
            EnvironmentFault: the disk is full, or everything in the cache stays in use.
        """
        self.require_room_for(num_bytes, path.name)
        start = time.monotonic()
        while True:
            with _naming_place(path):
                held = _open_held(path, num_bytes)
                if held is not None:
                    return held
                part = self._claim(path, num_bytes, ahead=ahead)
            if part is not None:
                return _fill(part, path, fill)
            if time.monotonic() - start > self._patience_seconds:
                raise EnvironmentFault(
                    f"{path}: no room for {num_bytes} bytes within {self._patience_seconds:.0f} s: all of the "
                    f"{self.held_bytes()} bytes in {self._folder} (most {self.most_bytes}) are in use or being "
                    "fetched; raise data.loader.cache_bytes"
                )
            on_wait()
            time.sleep(_POLL_SECONDS)

    def release(self, path: Path) -> None:
        """Let a file be the first to be evicted, unless another process still reads it."""
        with suppress(OSError):
            os.utime(path, ns=(_RELEASED, path.stat().st_mtime_ns))

    def remove(self, path: Path, descriptor: int) -> None:
        """Remove an open file whose bytes are no longer those that were fetched; its readers go on reading.

        Where another has been fetched in its place already, that one stays.
        """
        if _is_at(path, descriptor):
            path.unlink(missing_ok=True)

    def _claim(self, path: Path, num_bytes: int, *, ahead: bool) -> int | None:
        """Return the locked part file of `path`, at its full size; None while another fetches it or room is in use."""
        part_path = _part_of(path)
        with self._locked():
            if path.exists():
                return None
            path.parent.mkdir(parents=True, exist_ok=True)
            part = os.open(part_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if take_lock(part):
                    if path.exists() or not _is_at(part_path, part):  # its fetcher ended between our look and our lock
                        if _is_at(part_path, part):
                            part_path.unlink()
                        os.close(part)
                        return None
                    os.ftruncate(part, 0)
                    if self._make_room(num_bytes, ahead=ahead):
                        os.posix_fallocate(part, 0, num_bytes)
                        return part
                    part_path.unlink()
            except BaseException:
                part_path.unlink(missing_ok=True)
                os.close(part)
                raise
            os.close(part)
        if ahead:
            raise NoRoomError
        return None

    def _make_room(self, num_bytes: int, *, ahead: bool) -> bool:
        """Evict what may go, what dead processes left first, until `num_bytes` fit; return whether they do."""
        kept = sorted(self._kept(), key=lambda one: (one[0].suffix != _PART, one[1].st_atime_ns))
        held = sum(state.st_size for _, state in kept)
        for path, state in kept:
            is_enough = held + num_bytes <= self.most_bytes or (ahead and state.st_atime_ns > _RELEASED)
            if is_enough and path.suffix != _PART:
                break
            if state.st_size and _evict(path):
                held -= state.st_size
        return held + num_bytes <= self.most_bytes

    def _kept(self) -> list[tuple[Path, os.stat_result]]:
        kept = []
        for folder in self._folder.iterdir():
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.name.endswith(_SUFFIXES):
                    with suppress(FileNotFoundError):
                        kept.append((path, path.stat()))
        return kept

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            take_lock(descriptor, wait_seconds=math.inf)
            yield
        finally:
            os.close(descriptor)


def _part_of(path: Path) -> Path:
    return path.with_name(path.name + _PART)


def _open_held(path: Path, num_bytes: int) -> int | None:
    """Open a complete file with a shared lock; None where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        take_lock(descriptor, shared=True, wait_seconds=math.inf)
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


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether the open file is the one that lies at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _evict(path: Path) -> bool:
    """Remove a file without a holder; a part file without one was left by a dead process."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if not take_lock(descriptor):
            return False
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
    return True


def _fill(part: int, path: Path, fill: Callable[[int], None]) -> int:
    """Fill the locked part file of `path`, and give it that name and a shared lock; on any error close and remove it.

    Raises:
        EnvironmentFault: as `_naming_place`; and whatever `fill` raises.
    """
    part_path = _part_of(path)
    try:
        with _naming_place(path):
            fill(part)
            os.fsync(part)
            part_path.rename(path)
            fsync_folder(path.parent)
            take_lock(part, shared=True, wait_seconds=math.inf)
            os.utime(part, ns=(time.time_ns(), os.fstat(part).st_mtime_ns))
    except BaseException:
        part_path.unlink(missing_ok=True)
        os.close(part)
        raise
    return part


@contextmanager
def _naming_place(path: Path) -> Iterator[None]:
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
