"""Shards as files: checked for size before the first step, read by position, never mapped into memory."""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

from pipelines.errors import REMEDY, ShardSetDamageError
from pipelines.shard_store import ShardStore, open_store
from sharding.shard_set import ShardEntry, ShardSet

Verify = Literal["size", "sha256"]


def read_index_bytes(shard_set: ShardSet, shard: ShardEntry, *, store: ShardStore | None = None) -> bytes:
    """The bytes of a shard's index, equal to those the shard table vouches for.

    Raises:
        ShardSetDamageError: the index is missing or its sha256 differs.
    """
    store = store or open_store(shard_set)
    data = store.read_index(shard)
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise ShardSetDamageError(f"{store.where(shard.index_name)}: sha256 differs from the shard table's; {REMEDY}")
    return data


class ShardFiles:
    """Open shards, at most `most_open` at a time (more only while more threads read at once).

    With verify ``sha256`` a shard is hashed at its first opening, and again only if the file changed since.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        *,
        verify: Verify = "size",
        most_open: int = 128,
        store: ShardStore | None = None,
    ) -> None:
        self.store = store or open_store(shard_set)
        """Where the shards are opened."""
        self._verify, self._most_open = verify, most_open
        self._lock, self._of_thread = threading.Lock(), threading.local()
        self._open: OrderedDict[str, _OpenShard] = OrderedDict()
        self._hashed: set[tuple[str, int, int]] = set()

    def read(self, shard: ShardEntry, offset: int, size: int) -> bytes:
        """`size` bytes of the shard from `offset`.

        Raises:
            ShardSetDamageError: the shard is missing, has another size or hash, or ends before those bytes.
        """
        path = self.store.where(shard.name)
        with self._opened(shard) as descriptor:
            try:
                data = _read_fully(descriptor, offset, size)
            except OSError as error:
                raise ShardSetDamageError(f"{path}: reading at byte {offset}: {error.strerror}; {REMEDY}") from error
        if len(data) != size:
            raise ShardSetDamageError(
                f"{path}: expected {size} bytes at byte {offset}, found {len(data)}: the shard was cut while in use; "
                f"{REMEDY}"
            )
        return data

    def close(self) -> None:
        """Close every shard that no thread reads right now."""
        with self._lock:
            self._evict(0)

    @contextmanager
    def holding(self, shard: ShardEntry) -> Iterator[None]:
        """Keep a shard of a remote set in this machine's cache for all of a thread's reads in the block.

        Raises as `read`.
        """
        if self.store.keeps_open or getattr(self._of_thread, "shard", None) == shard.name:
            yield
            return
        with os.fdopen(self._open_checked(shard), "rb", buffering=0) as file:
            self._of_thread.shard, self._of_thread.descriptor = shard.name, file.fileno()
            try:
                yield
            finally:
                self._of_thread.shard = None

    def distrust(self, shard: ShardEntry) -> bool:
        """See `ShardStore.distrust`; within `holding`, of the copy that the thread holds."""
        with self._opened(shard) as descriptor:
            return self.store.distrust(shard, descriptor)

    @contextmanager
    def _opened(self, shard: ShardEntry) -> Iterator[int]:
        if not self.store.keeps_open:
            with self.holding(shard):
                yield self._of_thread.descriptor
            return
        with self._lock:
            held = self._open.get(shard.name)
            if held is None:
                held = self._open[shard.name] = _OpenShard(self._open_checked(shard))
            self._open.move_to_end(shard.name)
            held.readers += 1
        try:
            yield held.descriptor
        finally:
            with self._lock:
                held.readers -= 1
                self._evict(self._most_open)

    def _open_checked(self, shard: ShardEntry, *, is_second: bool = False) -> int:
        with ExitStack() as on_error:
            descriptor = self.store.open_shard(shard)
            on_error.callback(os.close, descriptor)
            try:
                self._check(shard, descriptor)
            except ShardSetDamageError:
                if is_second or not self.store.distrust(shard, descriptor):
                    raise
            else:
                on_error.pop_all()
                return descriptor
        return self._open_checked(shard, is_second=True)

    def _check(self, shard: ShardEntry, descriptor: int) -> None:
        path, state = self.store.where(shard.name), os.fstat(descriptor)
        if state.st_size != shard.bytes:
            raise ShardSetDamageError(f"{path}: expected {shard.bytes} bytes, found {state.st_size}; {REMEDY}")
        identity = (shard.name, state.st_ino, state.st_mtime_ns)
        if self._verify == "size" or identity in self._hashed:
            return
        with open(descriptor, "rb", closefd=False) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            raise ShardSetDamageError(f"{path}: sha256 differs from the shard table's; {REMEDY}")
        self._hashed.add(identity)

    def _evict(self, most_open: int) -> None:
        idle = [name for name, held in self._open.items() if not held.readers]
        for name in idle[: max(0, len(self._open) - most_open)]:
            os.close(self._open.pop(name).descriptor)


class _OpenShard:
    __slots__ = ("descriptor", "readers")

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.readers = descriptor, 0


def _read_fully(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
