"""Where a loader's shards and indexes are opened: a folder, or a URL through this machine's cache.

The files of a shard set compared with its shard table by name and size, before the first step.

A remote set's files by way of this machine's cache: fetched whole, compared by hash, opened there.

Shards as files: checked for size before the first step, read by position, never mapped into memory.
"""

import hashlib
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from pipelines.errors import REMEDY, ShardSetDamageError
from pipelines.stats import StatsRecorder
from pipelines.storage.cache import NoRoomError, ShardCache
from sharding.format.remote import RemoteFileMissingError, RemoteFiles, Retrier
from sharding.format.shard_set import ShardEntry, ShardSet

_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.tar")
_MOST_NAMED = 5


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
