"""The files of a shard set compared with its shard table by name and size, before the first step."""

import re
from collections.abc import Callable, Iterator

from pipelines.errors import REMEDY, ShardSetDamageError
from sharding.shard_set import ShardEntry, ShardSet

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
