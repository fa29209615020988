"""Where a loader's shards and indexes are opened: a folder, or a URL through this machine's cache."""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol, runtime_checkable

from pipelines.errors import ShardSetDamageError
from pipelines.shard_cache import NoRoomError, ShardCache
from pipelines.stats import StatsRecorder
from sharding.manifest import ShardEntry, ShardSet
from sharding.remote import RemoteFileMissingError, RemoteFiles
from sharding.retry import Retrier

_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.tar")
_MOST_NAMED = 5
_log = logging.getLogger(__name__)
_DOWNLOADS = 3
"""Times a file is fetched whose bytes arrive with another hash, before the server's copy is called damaged."""
REMEDY = "restore it from a copy or convert it again; `ca2st shard verify` lists all damage"


class _AbandonedError(Exception):
    """Nobody needs the file any more that is being fetched ahead."""


@runtime_checkable
class ShardStore(Protocol):
    """Opens the files of one shard set."""

    keeps_open: bool
    """Whether files may stay open between reads."""

    def check(self) -> None:
        """Compare the size of every shard and index with the shard table, as far as that needs no reading.

        Raises:
            ShardSetDamageError: some are missing, of another size, or named so that they would lie elsewhere.
        """
        ...

    def where(self, name: str) -> str:
        """A file's path or URL, for messages."""
        ...

    def open_shard(self, shard: ShardEntry) -> int:
        """A descriptor of a shard, the caller's to close.

        Raises:
            ShardSetDamageError: it is missing, or cannot be had undamaged.
        """
        ...

    def read_index(self, shard: ShardEntry) -> bytes:
        """The bytes of a shard's index, not yet compared with their hash; raises as `open_shard`."""
        ...

    def distrust(self, shard: ShardEntry) -> bool:
        """Take out a copy of a shard whose bytes proved damaged; False where there is only this one."""
        ...

    def fetch_ahead(self, shard: ShardEntry, *, is_abandoned: Callable[[], bool]) -> bool:
        """Fetch a shard that is needed soon, with its index; False where there is no room, or it was abandoned."""
        ...

    def finish_with(self, shard: ShardEntry) -> None:
        """Say that a shard is not needed again soon."""
        ...


def open_store(shard_set: ShardSet, stats: StatsRecorder | None = None) -> ShardStore:
    """The store of a set, by where it comes from; what it does is counted in `stats`."""
    if shard_set.origin is None:
        return LocalStore(shard_set)
    return CachedStore(shard_set, stats or StatsRecorder())


class LocalStore:
    """The set's own folder."""

    keeps_open = True

    def __init__(self, shard_set: ShardSet) -> None:
        self._shard_set = shard_set

    def check(self) -> None:
        """See `ShardStore.check`."""
        require_sizes(self._shard_set, self._size)

    def where(self, name: str) -> str:
        """See `ShardStore.where`."""
        return str(self._shard_set.root / name)

    def open_shard(self, shard: ShardEntry) -> int:
        """See `ShardStore.open_shard`."""
        try:
            return os.open(self._shard_set.root / shard.name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardSetDamageError(
                f"{self.where(shard.name)}: cannot be opened ({error.strerror}); {REMEDY}"
            ) from error

    def read_index(self, shard: ShardEntry) -> bytes:
        """See `ShardStore.read_index`."""
        try:
            return (self._shard_set.root / shard.index_name).read_bytes()
        except OSError as error:
            raise ShardSetDamageError(
                f"{self.where(shard.index_name)}: cannot be read ({error.strerror}); {REMEDY}"
            ) from error

    def distrust(self, shard: ShardEntry) -> bool:  # noqa: ARG002 - the only copy
        """See `ShardStore.distrust`."""
        return False

    def fetch_ahead(self, shard: ShardEntry, *, is_abandoned: Callable[[], bool]) -> bool:  # noqa: ARG002 - is here
        """See `ShardStore.fetch_ahead`."""
        return False

    def finish_with(self, shard: ShardEntry) -> None:
        """See `ShardStore.finish_with`."""

    def _size(self, name: str) -> int:
        return (self._shard_set.root / name).stat().st_size


class CachedStore:
    """A remote set: whole files come into the set's folder of the cache when they are first needed."""

    keeps_open = False

    def __init__(self, shard_set: ShardSet, stats: StatsRecorder, *, files: RemoteFiles | None = None) -> None:
        assert shard_set.origin is not None
        self._shard_set, self._stats = shard_set, stats
        storage = shard_set.storage
        self._files = files or RemoteFiles(
            folder=shard_set.origin,
            retrier=Retrier(config=storage.retry, on_retry=partial(stats.add, "retries", 1)),
            on_bytes=self._count,
        )
        self._cache = ShardCache(storage.folder, most_bytes=storage.cache_bytes)

    def check(self) -> None:
        """See `ShardStore.check`; sizes by one listing where the server gives one, else at arrival.

        Raises:
            UserInputError: the cache is smaller than a shard.
        """
        sizes = self._files.sizes()
        if sizes is None:
            require_sizes(self._shard_set, None)
        else:
            require_sizes(self._shard_set, lambda name: _listed(sizes, name))
        largest = max(self._shard_set.shards, key=lambda shard: shard.bytes + shard.index_bytes, default=None)
        if largest is not None:
            what = f"the largest shard, {largest.name}, with its index"
            self._cache.require_room_for(largest.bytes + largest.index_bytes, what)
        self._say_size()

    def _say_size(self) -> None:
        total = sum(shard.bytes + shard.index_bytes for shard in self._shard_set.shards)
        line = "%s: %d bytes in %d shards, read through a cache of %d bytes in %s%s"
        small = total > self._cache.most_bytes
        hint = (
            "; what does not fit is fetched again each epoch, oftener where a shuffle block of all lanes does not fit"
        )
        facts = (self._shard_set.where, total, len(self._shard_set.shards), self._cache.most_bytes)
        _log.info(line, *facts, self._shard_set.storage.folder, hint if small else "")

    def where(self, name: str) -> str:
        """See `ShardStore.where`."""
        return self._files.folder.file(name)

    def open_shard(self, shard: ShardEntry) -> int:
        """See `ShardStore.open_shard`."""
        return self._open(shard.name, shard.bytes, shard.sha256)

    def read_index(self, shard: ShardEntry) -> bytes:
        """See `ShardStore.read_index`."""
        with os.fdopen(self._open(shard.index_name, shard.index_bytes, shard.index_sha256), "rb") as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != shard.index_sha256:  # the disk's damage, not the server's
            self._cache.remove(self._shard_set.root / shard.index_name)
            with os.fdopen(self._open(shard.index_name, shard.index_bytes, shard.index_sha256), "rb") as file:
                data = file.read()
        return data

    def distrust(self, shard: ShardEntry) -> bool:
        """See `ShardStore.distrust`: the cached copy goes if its hash is no longer the shard table's."""
        with os.fdopen(self.open_shard(shard), "rb") as file:
            intact = hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
        if not intact:
            self._cache.remove(self._shard_set.root / shard.name)
        return not intact

    def fetch_ahead(self, shard: ShardEntry, *, is_abandoned: Callable[[], bool]) -> bool:
        """See `ShardStore.fetch_ahead`."""
        parts = (
            (shard.index_name, shard.index_bytes, shard.index_sha256),
            (shard.name, shard.bytes, shard.sha256),
        )
        try:
            for name, num_bytes, sha256 in parts:
                if not (self._shard_set.root / name).exists():
                    os.close(self._open(name, num_bytes, sha256, is_abandoned=is_abandoned))
        except (NoRoomError, _AbandonedError):
            return False
        return True

    def finish_with(self, shard: ShardEntry) -> None:
        """See `ShardStore.finish_with`."""
        self._cache.finish_with(self._shard_set.root / shard.name)

    def _open(self, name: str, num_bytes: int, sha256: str, *, is_abandoned: Callable[[], bool] | None = None) -> int:
        """A descriptor at the file's start; with `is_abandoned` the file is one that is not needed yet."""
        fetched = []

        def fill(descriptor: int) -> None:
            fetched.append(name)
            self._download(name, num_bytes, sha256, descriptor, is_abandoned or _never)

        path, ahead = self._shard_set.root / name, is_abandoned is not None
        descriptor = self._cache.open(path, num_bytes, fill, ahead=ahead, on_wait=self._show_life)
        if fetched or not ahead:
            self._stats.add("cache_misses" if fetched else "cache_hits", 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
        return descriptor

    def _download(
        self, name: str, num_bytes: int, sha256: str, descriptor: int, is_abandoned: Callable[[], bool]
    ) -> None:
        for _ in range(_DOWNLOADS):
            os.lseek(descriptor, 0, os.SEEK_SET)
            try:
                found = _write(self._files.ranges(name, num_bytes), descriptor, is_abandoned)
            except RemoteFileMissingError as error:
                raise ShardSetDamageError(f"{error}; copy the set again, it is not complete") from error
            if found == sha256:
                return
            self._stats.add("retries", 1)
        raise ShardSetDamageError(
            f"{self.where(name)}: sha256 differs from the shard table's in each of {_DOWNLOADS} downloads; copy it to "
            "the server again; `ca2st shard verify` lists all damage"
        )

    def _show_life(self) -> None:
        """Waiting for a neighbour's download is no stall."""
        self._stats.add("cache_hits", 0)

    def _count(self, num_bytes: int, seconds: float) -> None:
        self._stats.add("downloaded_bytes", num_bytes)
        self._stats.add("download_seconds", seconds)


def _never() -> bool:
    return False


def _write(pieces: Iterator[bytes], descriptor: int, is_abandoned: Callable[[], bool]) -> str:
    """Write all of a file; its sha256."""
    digest = hashlib.sha256()
    for piece in pieces:
        if is_abandoned():
            raise _AbandonedError
        digest.update(piece)
        view = memoryview(piece)
        while view:
            view = view[os.write(descriptor, view) :]
    return digest.hexdigest()


def _listed(sizes: dict[str, int], name: str) -> int:
    if name not in sizes:
        raise FileNotFoundError(2, "No such file")
    return sizes[name]


def require_sizes(shard_set: ShardSet, size_of: Callable[[str], int] | None) -> None:
    """Compare names, and sizes where `size_of` tells them, with the shard table; raises as `ShardStore.check`."""
    problems = [problem for shard in shard_set.shards for problem in _problems(shard, size_of)]
    if problems:
        more = f" (and {len(problems) - _MOST_NAMED} more)" if len(problems) > _MOST_NAMED else ""
        raise ShardSetDamageError(f"{shard_set.where}: {'; '.join(problems[:_MOST_NAMED])}{more}; {REMEDY}")


def _problems(shard: ShardEntry, size_of: Callable[[str], int] | None) -> Iterator[str]:
    if not _SHARD_NAME.fullmatch(shard.name):
        yield f"shard name {shard.name!r} is not a plain file name ending in .tar"
        return
    if size_of is None:
        return
    for name, expected in ((shard.name, shard.bytes), (shard.index_name, shard.index_bytes)):
        try:
            found = size_of(name)
        except OSError as error:
            yield f"{name}: cannot be read ({error.strerror})"
            continue
        if found != expected:
            yield f"{name}: expected {expected} bytes, found {found}"
