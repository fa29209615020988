"""The files of a shard set in a folder: compared with the shard table, read by position, never mapped into memory.

Sets behind a URL are read by `pipelines.storage.remote.CachedShards`, the same through this machine's cache.
"""

import hashlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from ca2st.errors import listed
from pipelines.errors import REMEDY, ShardSetDamageError
from sharding.format.shard_set import ShardEntry, ShardSet

Verify = Literal["size", "sha256"]
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.tar")


@dataclass(slots=True)
class OpenShard:
    """A shard that is open for reading."""

    descriptor: int
    where: str
    readers: int = 0

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`.

        Raises:
            ShardSetDamageError: the shard cannot be read, or ends before those bytes.
        """
        try:
            data = os.pread(self.descriptor, size, offset)
            while len(data) < size and (more := os.pread(self.descriptor, size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise ShardSetDamageError(f"{self.where}: reading at byte {offset}: {error.strerror}; {REMEDY}") from error
        if len(data) != size:
            raise ShardSetDamageError(
                f"{self.where}: expected {size} bytes at byte {offset}, found {len(data)}: the shard was cut while in "
                f"use; {REMEDY}"
            )
        return data


class ShardFiles:
    """A set in a folder; at most `most_open` shards stay open (more only while more threads read at once).

    With verify ``sha256`` a shard is hashed at its first opening, and again only if the file changed since.
    """

    def __init__(self, shard_set: ShardSet, *, verify: Verify = "size", most_open: int = 128) -> None:
        self.shard_set = shard_set
        self._verify, self._most_open = verify, most_open
        self._lock = threading.Lock()
        self._held: OrderedDict[str, OpenShard] = OrderedDict()
        self._hashed: set[tuple[str, int, int]] = set()

    def check(self) -> None:
        """Compare the size of every shard and index with the shard table.

        Raises:
            ShardSetDamageError: some are missing, of another size, or named so that they would lie elsewhere.
        """
        self._require_sizes(lambda name: (self.shard_set.root / name).stat().st_size)

    def where(self, name: str) -> str:
        """Return a file's path or URL, for messages."""
        return str(self.shard_set.root / name)

    @contextmanager
    def opened(self, shard: ShardEntry) -> Iterator[OpenShard]:
        """Keep a shard open for the reads of a block.

        Raises:
            ShardSetDamageError: the shard is missing, or has another size or hash.
        """
        with self._lock:
            held = self._held.get(shard.name)
            if held is None:
                held = self._held[shard.name] = OpenShard(self._open_checked(shard), self.where(shard.name))
            self._held.move_to_end(shard.name)
            held.readers += 1
        try:
            yield held
        finally:
            with self._lock:
                held.readers -= 1
                self._evict(self._most_open)

    def read_index(self, shard: ShardEntry) -> bytes:
        """Return the bytes of a shard's index, equal to those the shard table vouches for.

        Raises:
            ShardSetDamageError: the index is missing or its sha256 differs.
        """
        try:
            data = (self.shard_set.root / shard.index_name).read_bytes()
        except OSError as error:
            raise ShardSetDamageError(
                f"{self.where(shard.index_name)}: cannot be read ({error.strerror}); {REMEDY}"
            ) from error
        self._require_hash(shard.index_name, hashlib.sha256(data).hexdigest(), shard.index_sha256)
        return data

    def invalidate(self, shard: ShardEntry, descriptor: int) -> bool:  # noqa: ARG002 - see `CachedShards`
        """Return whether another copy of an open shard, some of whose bytes are damaged, can be had: never here."""
        return False

    def close(self) -> None:
        """Close every shard that no thread reads right now."""
        with self._lock:
            self._evict(0)

    def _require_sizes(self, size_of: Callable[[str], int] | None) -> None:
        """Compare names, and sizes where `size_of` knows them, with the shard table; raises as `check`."""
        problems = []
        for shard in self.shard_set.shards:
            if not _SHARD_NAME.fullmatch(shard.name):
                problems.append(f"shard name {shard.name!r} is not a plain file name ending in .tar")
            elif size_of is not None:
                for name, expected in ((shard.name, shard.bytes), (shard.index_name, shard.index_bytes)):
                    try:
                        found = size_of(name)
                    except OSError as error:
                        problems.append(f"{name}: cannot be read ({error.strerror})")
                        continue
                    if found != expected:
                        problems.append(f"{name}: expected {expected} bytes, found {found}")
        if problems:
            raise ShardSetDamageError(f"{self.shard_set.where}: {listed(problems, separator='; ')}; {REMEDY}")

    def _open_checked(self, shard: ShardEntry) -> int:
        try:
            descriptor = os.open(self.shard_set.root / shard.name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardSetDamageError(
                f"{self.where(shard.name)}: cannot be opened ({error.strerror}); {REMEDY}"
            ) from error
        try:
            self._check_open(shard, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check_open(self, shard: ShardEntry, descriptor: int) -> None:
        state = os.fstat(descriptor)
        if state.st_size != shard.bytes:
            raise ShardSetDamageError(
                f"{self.where(shard.name)}: expected {shard.bytes} bytes, found {state.st_size}; {REMEDY}"
            )
        identity = (shard.name, state.st_ino, state.st_mtime_ns)
        if self._verify == "size" or identity in self._hashed:
            return
        self._require_hash(shard.name, sha256_of(descriptor), shard.sha256)
        self._hashed.add(identity)

    def _require_hash(self, name: str, found: str, expected: str) -> None:
        if found != expected:
            raise ShardSetDamageError(f"{self.where(name)}: sha256 differs from the shard table's; {REMEDY}")

    def _evict(self, most_open: int) -> None:
        idle = [name for name, held in self._held.items() if not held.readers]
        for name in idle[: max(0, len(self._held) - most_open)]:
            os.close(self._held.pop(name).descriptor)


def sha256_of(descriptor: int) -> str:
    """Return the hash of a whole open file."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, "rb", closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
