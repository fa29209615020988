"""A remote set's files by way of this machine's cache: fetched whole, compared by hash, opened there."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from pipelines.errors import ShardSetDamageError
from pipelines.shard_cache import NoRoomError, ShardCache
from pipelines.shard_sizes import require_sizes
from pipelines.stats import StatsRecorder
from sharding.remote import RemoteFileMissingError, RemoteFiles
from sharding.retry import Retrier
from sharding.shard_set import ShardEntry, ShardSet

_log = logging.getLogger(__name__)
_DOWNLOADS = 3
"""Times a file is fetched whose bytes arrive with another hash, before the server's copy is called damaged."""


class _AbandonedError(Exception):
    """Nobody needs the file any more that is being fetched ahead."""


class _File(NamedTuple):
    """A shard or an index, as the shard table has it."""

    name: str
    num_bytes: int
    sha256: str


def _tar(shard: ShardEntry) -> _File:
    return _File(shard.name, shard.bytes, shard.sha256)


def _index(shard: ShardEntry) -> _File:
    return _File(shard.index_name, shard.index_bytes, shard.index_sha256)


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
        return self._open(_tar(shard))

    def read_index(self, shard: ShardEntry) -> bytes:
        """See `ShardStore.read_index`."""
        with os.fdopen(self._open(_index(shard)), "rb") as file:
            data = file.read()
            if hashlib.sha256(data).hexdigest() == shard.index_sha256:
                return data
            self._cache.remove(self._shard_set.root / shard.index_name, file.fileno())  # damaged by the disk
        with os.fdopen(self._open(_index(shard)), "rb") as file:
            return file.read()

    def distrust(self, shard: ShardEntry, descriptor: int) -> bool:
        """See `ShardStore.distrust`: the cached copy goes if its hash is no longer the shard table's."""
        os.lseek(descriptor, 0, os.SEEK_SET)
        with open(descriptor, "rb", closefd=False) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                return False
        self._cache.remove(self._shard_set.root / shard.name, descriptor)
        return True

    def fetch_ahead(self, shard: ShardEntry, *, is_abandoned: Callable[[], bool]) -> bool:
        """See `ShardStore.fetch_ahead`."""
        try:
            for file in (_index(shard), _tar(shard)):
                if not (self._shard_set.root / file.name).exists():
                    os.close(self._open(file, is_abandoned=is_abandoned))
        except (NoRoomError, _AbandonedError):
            return False
        return True

    def finish_with(self, shard: ShardEntry) -> None:
        """See `ShardStore.finish_with`."""
        self._cache.finish_with(self._shard_set.root / shard.name)

    def _open(self, file: _File, *, is_abandoned: Callable[[], bool] | None = None) -> int:
        """A descriptor at the file's start; with `is_abandoned` the file is one that is not needed yet."""
        fetched = []

        def fill(descriptor: int) -> None:
            fetched.append(file.name)
            self._download(file, descriptor, is_abandoned or _never)

        path, ahead = self._shard_set.root / file.name, is_abandoned is not None
        descriptor = self._cache.open(path, file.num_bytes, fill, ahead=ahead, on_wait=self._show_life)
        if fetched or not ahead:
            self._stats.add("cache_misses" if fetched else "cache_hits", 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
        return descriptor

    def _download(self, file: _File, descriptor: int, is_abandoned: Callable[[], bool]) -> None:
        for _ in range(_DOWNLOADS):
            os.lseek(descriptor, 0, os.SEEK_SET)
            try:
                found = _write(self._files.ranges(file.name, file.num_bytes), descriptor, is_abandoned)
            except RemoteFileMissingError as error:
                raise ShardSetDamageError(f"{error}; copy the set again, it is not complete") from error
            if found == file.sha256:
                return
            self._stats.add("retries", 1)
        raise ShardSetDamageError(
            f"{self.where(file.name)}: sha256 differs from the shard table's in each of {_DOWNLOADS} downloads; copy "
            "it to the server again; `ca2st shard verify` lists all damage"
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
