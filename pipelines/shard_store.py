"""Where a loader's shards and indexes are opened: a folder, or a URL through this machine's cache."""

import os
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from pipelines.cached_store import CachedStore
from pipelines.errors import REMEDY, ShardSetDamageError
from pipelines.shard_sizes import require_sizes
from pipelines.stats import StatsRecorder
from sharding.shard_set import ShardEntry, ShardSet


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

    def distrust(self, shard: ShardEntry, descriptor: int) -> bool:
        """Whether the open copy of a shard, some of whose bytes proved damaged, can be had anew; it is taken out then.

        False where there is only this one, or where it is as it was written.
        """
        ...

    def fetch_ahead(self, shard: ShardEntry, *, is_abandoned: Callable[[], bool]) -> bool:
        """Fetch a shard that is needed soon, with its index; False where there is no room, or it was abandoned."""
        ...

    def finish_with(self, shard: ShardEntry) -> None:
        """Say that a shard is not needed again soon."""
        ...


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

    def distrust(self, shard: ShardEntry, descriptor: int) -> bool:  # noqa: ARG002 - the only copy
        """See `ShardStore.distrust`."""
        return False

    def fetch_ahead(self, shard: ShardEntry, *, is_abandoned: Callable[[], bool]) -> bool:  # noqa: ARG002 - is here
        """See `ShardStore.fetch_ahead`."""
        return False

    def finish_with(self, shard: ShardEntry) -> None:
        """See `ShardStore.finish_with`."""

    def _size(self, name: str) -> int:
        return (self._shard_set.root / name).stat().st_size


def open_store(shard_set: ShardSet, stats: StatsRecorder | None = None) -> ShardStore:
    """The store of a set, by where it comes from; what it does is counted in `stats`."""
    if shard_set.origin is None:
        return LocalStore(shard_set)
    return CachedStore(shard_set, stats or StatsRecorder())
