"""Sets behind a URL: the same files as of a folder, through this machine's cache.

The cache on the disk is bounded, shared by all processes, and safe against crashes.
"""

import errno
import hashlib
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from ca2st.durable import fsync_folder, is_environment_error, take_lock
from ca2st.errors import EnvironmentFault, UserInputError
from pipelines.errors import ShardSetDamageError
from pipelines.storage.shard_files import OpenShard, ShardFiles, Verify, sha256_of
from pipelines.threads import StatsRecorder
from sharding.format.remote import RemoteFileMissingError, RemoteFiles, Retrier
from sharding.format.shard_set import ShardEntry, ShardSet

_DOWNLOADS = 3
"""Times a file is fetched whose bytes arrive with another hash, before the server's copy is called damaged."""
_log = logging.getLogger(__name__)


def open_files(shard_set: ShardSet, stats: StatsRecorder | None = None, *, verify: Verify = "size") -> ShardFiles:
    """Return the files of a set, by where it comes from; what the cache does is counted in `stats`."""
    if shard_set.origin is None:
        return ShardFiles(shard_set, verify=verify)
    return CachedShards(shard_set, stats or StatsRecorder(), verify=verify)


class _AbandonedError(Exception):
    """A file that is being fetched ahead is no longer needed."""


class CachedShards(ShardFiles):
    """A remote set: whole files come into the set's folder of the cache when they are first needed.

    A shard is opened for each block of reads and held open no longer, so that it can be evicted.
    """

    def __init__(
        self, shard_set: ShardSet, stats: StatsRecorder, *, verify: Verify = "size", files: RemoteFiles | None = None
    ) -> None:
        """`files`: what reads from the server; None: that of the URL. Raises as `ShardCache`."""
        super().__init__(shard_set, verify=verify)
        assert shard_set.origin is not None
        storage, self._stats = shard_set.storage, stats
        self._remote = files or RemoteFiles(
            folder=shard_set.origin,
            retrier=Retrier(config=storage.retry, on_retry=partial(stats.add, "retries", 1)),
            on_bytes=self._count,
        )
        self._cache = ShardCache(storage.folder, most_bytes=storage.cache_bytes)

    def check(self) -> None:
        """See `ShardFiles.check`; sizes come from one listing where the server gives one, else at arrival.

        Raises:
            UserInputError: the cache is smaller than a shard.
        """
        sizes = self._remote.sizes()

        def listed(name: str) -> int:
            if sizes is None or name not in sizes:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            return sizes[name]

        self._require_sizes(None if sizes is None else listed)
        shards, cache = self.shard_set.shards, self._cache
        largest = max(shards, key=lambda shard: shard.bytes + shard.index_bytes, default=None)
        if largest is not None:
            what = f"the largest shard, {largest.name}, with its index"
            cache.require_room_for(largest.bytes + largest.index_bytes, what)
        total = sum(shard.bytes + shard.index_bytes for shard in shards)
        hint = "; what does not fit is fetched again each epoch, more often if a shuffle block of all lanes is larger"
        line = "%s: %d bytes in %d shards, read through a cache of %d bytes in %s%s"
        facts = (self.shard_set.where, total, len(shards), cache.most_bytes, self.shard_set.storage.folder)
        _log.info(line, *facts, hint if total > cache.most_bytes else "")

    def where(self, name: str) -> str:
        """See `ShardFiles.where`."""
        return self._remote.folder.file(name)

    @contextmanager
    def opened(self, shard: ShardEntry) -> Iterator[OpenShard]:
        """See `ShardFiles.opened`; the shard is fetched first where the cache does not have it."""
        with os.fdopen(self._open_checked(shard), "rb", buffering=0) as file:
            yield OpenShard(file.fileno(), self.where(shard.name))

    def read_index(self, shard: ShardEntry) -> bytes:
        """See `ShardFiles.read_index`; a copy that the disk damaged is fetched again, once."""
        for _ in range(2):
            with os.fdopen(self._open(shard.index_name, shard.index_bytes, shard.index_sha256), "rb") as file:
                data = file.read()
                found = hashlib.sha256(data).hexdigest()
                if found == shard.index_sha256:
                    break
                self._cache.remove(self.shard_set.root / shard.index_name, file.fileno())
        self._require_hash(shard.index_name, found, shard.index_sha256)
        return data

    def invalidate(self, shard: ShardEntry, descriptor: int) -> bool:
        """Take an open shard out of the cache if its hash is no longer the shard table's; return whether it went."""
        if sha256_of(descriptor) == shard.sha256:
            return False
        self._cache.remove(self.shard_set.root / shard.name, descriptor)
        return True

    def fetch_ahead(self, shard: ShardEntry, *, is_abandoned: Callable[[], bool]) -> bool:
        """Fetch a shard that is needed soon, with its index; False where there is no room, or it was abandoned."""
        try:
            for name, num_bytes, sha256 in (
                (shard.index_name, shard.index_bytes, shard.index_sha256),
                (shard.name, shard.bytes, shard.sha256),
            ):
                if not (self.shard_set.root / name).exists():
                    os.close(self._open(name, num_bytes, sha256, is_abandoned=is_abandoned))
        except (NoRoomError, _AbandonedError):
            return False
        return True

    def release(self, shard: ShardEntry) -> None:
        """Say that a shard is not needed again soon."""
        self._cache.release(self.shard_set.root / shard.name)

    def _open_checked(self, shard: ShardEntry, *, is_second: bool = False) -> int:
        descriptor = self._open(shard.name, shard.bytes, shard.sha256)
        try:
            self._check_open(shard, descriptor)
        except ShardSetDamageError:
            is_damaged = not is_second and self.invalidate(shard, descriptor)
            os.close(descriptor)
            if not is_damaged:
                raise
            return self._open_checked(shard, is_second=True)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _open(self, name: str, num_bytes: int, sha256: str, *, is_abandoned: Callable[[], bool] | None = None) -> int:
        """Open a file at its start; with `is_abandoned` the file is one that is not needed yet."""
        fetched = []

        def fill(descriptor: int) -> None:
            fetched.append(name)
            for _ in range(_DOWNLOADS):
                os.lseek(descriptor, 0, os.SEEK_SET)
                try:
                    found = _write(self._remote.ranges(name, num_bytes), descriptor, is_abandoned or (lambda: False))
                except RemoteFileMissingError as error:
                    raise ShardSetDamageError(f"{error}; copy the set again, it is not complete") from error
                if found == sha256:
                    return
                self._stats.add("retries", 1)
            raise ShardSetDamageError(
                f"{self.where(name)}: sha256 differs from the shard table's in each of {_DOWNLOADS} downloads; copy it "
                "to the server again; `ca2st shard verify` lists all damage"
            )

        path, ahead = self.shard_set.root / name, is_abandoned is not None
        waiting_is_no_stall = partial(self._stats.add, "cache_hits", 0)
        descriptor = self._cache.open(path, num_bytes, fill, ahead=ahead, on_wait=waiting_is_no_stall)
        if fetched or not ahead:
            self._stats.add("cache_misses" if fetched else "cache_hits", 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
        return descriptor

    def _count(self, num_bytes: int, seconds: float) -> None:
        self._stats.add("downloaded_bytes", num_bytes)
        self._stats.add("download_seconds", seconds)


def _write(pieces: Iterator[bytes], descriptor: int, is_abandoned: Callable[[], bool]) -> str:
    """Write all of a file; return its sha256."""
    digest = hashlib.sha256()
    for piece in pieces:
        if is_abandoned():
            raise _AbandonedError
        digest.update(piece)
        view = memoryview(piece)
        while view:
            view = view[os.write(descriptor, view) :]
    return digest.hexdigest()


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
        """Raise `UserInputError` for a cache that could never hold a file."""
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
                return self._fill(part, path, fill)
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

    def _fill(self, part: int, path: Path, fill: Callable[[int], None]) -> int:
        """Fill the locked part file of `path`, give it that name and a shared lock; on an error close and remove it."""
        part_path = _part_of(path)
        try:
            with _naming_place(path):
                fill(part)
                os.fsync(part)
                with self._locked():  # or whoever counts what is held sees neither of the two names
                    part_path.rename(path)
                fsync_folder(path.parent)
                take_lock(part, shared=True, wait_seconds=math.inf)
                os.utime(part, ns=(time.time_ns(), os.fstat(part).st_mtime_ns))
        except BaseException:
            part_path.unlink(missing_ok=True)
            os.close(part)
            raise
        return part

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


@contextmanager
def _naming_place(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into an `EnvironmentFault` that names the place."""
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
