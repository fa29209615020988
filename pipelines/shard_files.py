"""Shards as files: checked for size before the first step, read by position, never mapped into memory."""

import hashlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from pipelines.errors import ShardSetDamageError
from sharding.manifest import ShardEntry, ShardSet

Verify = Literal["size", "sha256"]
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.tar")
_MOST_NAMED = 5
_REMEDY = "restore it from a copy or convert it again; `ca2st shard verify` lists all damage"


def check_sizes(shard_set: ShardSet) -> None:
    """Compare the size of every shard and index with the shard table.

    Raises:
        ShardSetDamageError: some are missing, of another size, or named so that they would lie elsewhere.
    """
    problems = [problem for shard in shard_set.shards for problem in _problems(shard_set, shard)]
    if problems:
        more = f" (and {len(problems) - _MOST_NAMED} more)" if len(problems) > _MOST_NAMED else ""
        raise ShardSetDamageError(f"{shard_set.root}: {'; '.join(problems[:_MOST_NAMED])}{more}; {_REMEDY}")


def _problems(shard_set: ShardSet, shard: ShardEntry) -> Iterator[str]:
    if not _SHARD_NAME.fullmatch(shard.name):
        yield f"shard name {shard.name!r} is not a plain file name ending in .tar"
        return
    for name, expected in ((shard.name, shard.bytes), (shard.index_name, shard.index_bytes)):
        try:
            found = (shard_set.root / name).stat().st_size
        except OSError as error:
            yield f"{name}: cannot be read ({error.strerror})"
            continue
        if found != expected:
            yield f"{name}: expected {expected} bytes, found {found}"


def read_index_bytes(shard_set: ShardSet, shard: ShardEntry) -> bytes:
    """The bytes of a shard's index, equal to those the shard table vouches for.

    Raises:
        ShardSetDamageError: the index is missing or its sha256 differs.
    """
    path = shard_set.root / shard.index_name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardSetDamageError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from error
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise ShardSetDamageError(f"{path}: sha256 differs from the shard table's; {_REMEDY}")
    return data


class ShardFiles:
    """Open shards, at most `most_open` at a time (more only while more threads read at once).

    With verify ``sha256`` a shard is hashed at its first opening, and again only if the file changed since.
    """

    def __init__(self, shard_set: ShardSet, *, verify: Verify = "size", most_open: int = 128) -> None:
        self._shard_set, self._verify, self._most_open = shard_set, verify, most_open
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _OpenShard] = OrderedDict()
        self._hashed: set[tuple[str, int, int]] = set()

    def read(self, shard: ShardEntry, offset: int, size: int) -> bytes:
        """`size` bytes of the shard from `offset`.

        Raises:
            ShardSetDamageError: the shard is missing, has another size or hash, or ends before those bytes.
        """
        path = self._shard_set.root / shard.name
        with self._opened(shard) as descriptor:
            try:
                data = _read_fully(descriptor, offset, size)
            except OSError as error:
                raise ShardSetDamageError(f"{path}: reading at byte {offset}: {error.strerror}; {_REMEDY}") from error
        if len(data) != size:
            raise ShardSetDamageError(
                f"{path}: expected {size} bytes at byte {offset}, found {len(data)}: the shard was cut while in use; "
                f"{_REMEDY}"
            )
        return data

    def close(self) -> None:
        """Close every shard that no thread reads right now."""
        with self._lock:
            self._evict(0)

    @contextmanager
    def _opened(self, shard: ShardEntry) -> Iterator[int]:
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

    def _open_checked(self, shard: ShardEntry) -> int:
        path = self._shard_set.root / shard.name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardSetDamageError(f"{path}: cannot be opened ({error.strerror}); {_REMEDY}") from error
        try:
            self._check(shard, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check(self, shard: ShardEntry, descriptor: int) -> None:
        path, state = self._shard_set.root / shard.name, os.fstat(descriptor)
        if state.st_size != shard.bytes:
            raise ShardSetDamageError(f"{path}: expected {shard.bytes} bytes, found {state.st_size}; {_REMEDY}")
        identity = (shard.name, state.st_ino, state.st_mtime_ns)
        if self._verify == "size" or identity in self._hashed:
            return
        with open(descriptor, "rb", closefd=False) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            raise ShardSetDamageError(f"{path}: sha256 differs from the shard table's; {_REMEDY}")
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
