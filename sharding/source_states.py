"""What the sources were when their shards were made: kept beside a set, so that a rerun notices what changed since.

``sources.jsonl`` holds a sealed line a shard. It is no part of the set: the shards' bytes depend on what is in the
sources, not on when they were written; a set without it, as a copy may be, is a set like any other.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ca2st.checked_json import DocumentError, canonical_json, checked, parse_json, sha256_of_json
from ca2st.durable import append_bytes, write_bytes
from ca2st.errors import listed
from sharding.errors import MediaError
from sharding.format.shard_set import ShardEntry
from sharding.media.probe import source_state
from sharding.source import SourceList

SOURCES_NAME = "sources.jsonl"
"""File beside a shard set, or in the folder of an unfinished conversion."""

State = tuple[int, int] | None
"""Size in bytes and modification time in ns of a source; None: there is no readable file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSources:
    """The sources on which one shard depends."""

    shard: str
    """File name of the shard."""
    index_sha256: str
    """Of its index, which is thereby known to be the one that was written."""
    first: int
    """Position of the first source."""
    states: tuple[tuple[int, int] | None, ...]
    """State of it and of those behind it, up to the one that no longer fitted into the shard."""


def state_of(path: Path) -> State:
    """The state of a source now."""
    try:
        state = source_state(path)
    except MediaError:
        return None
    return state.num_bytes, state.modified_ns


def read_sources(root: Path) -> dict[str, ShardSources]:
    """What is known by shard name; the last sound line of each counts, others (a kill cuts one) are left out."""
    try:
        lines = (root / SOURCES_NAME).read_bytes().splitlines()
    except OSError:
        return {}
    known = {}
    for line in lines:
        try:
            one = _opened(line)
        except DocumentError:
            continue
        known[one.shard] = one
    return known


def append_sources(root: Path, sources: ShardSources) -> None:
    """Add a line for a shard just written; raises as `append_bytes`."""
    append_bytes(root / SOURCES_NAME, _sealed(sources))


def write_sources(root: Path, known: Iterable[ShardSources]) -> None:
    """Have the file hold these lines and no others; without any there is no file."""
    path, data = root / SOURCES_NAME, b"".join(map(_sealed, known))
    if not data:
        path.unlink(missing_ok=True)
    elif path.is_symlink() or not path.is_file() or path.read_bytes() != data:
        write_bytes(path, data)


def sources_damage(data: bytes, shards: Sequence[ShardEntry]) -> str:
    """What is wrong with the file's bytes beside the finished set of `shards`; empty when nothing is."""
    index_hashes = {shard.name: shard.index_sha256 for shard in shards}
    try:
        known = [_opened(line) for line in data.splitlines()]
    except DocumentError as error:
        return f"{error}; remove it"
    if b"".join(map(_sealed, known)) != data:
        return "its bytes are not those that were written; remove it"
    if any(index_hashes.get(one.shard) != one.index_sha256 for one in known):
        return "speaks of other shards than this set's; remove it"
    return ""


def changed_sources(known: ShardSources, source: SourceList, state: Callable[[Path], State]) -> list[int]:
    """Positions of the sources of a shard that are other files now; one that is gone cannot be compared."""
    changed = []
    for position, before in enumerate(known.states, known.first):
        now = state(source.samples[position].path) if position < len(source.samples) else None
        if now is not None and now != before:
            changed.append(position)
    return changed


def changes_in_words(known: Sequence[ShardSources], source: SourceList, state: Callable[[Path], State]) -> str:
    """How many files changed, and what of the first few; empty when none did."""
    changes = {}
    for one in known:
        for position in changed_sources(one, source, state):
            path = source.samples[position].path
            changes[path] = (one.states[position - one.first], state(path))
    if not changes:
        return ""
    found = [f"{path}: {_change_in_words(*change)}" for path, change in changes.items()]
    return f"{len(changes)} source files ({listed(found, most=3, separator='; ')})"


def _change_in_words(before: State, now: State) -> str:
    if before is None or now is None:
        return "was missing"
    return f"{before[0]} bytes, now {now[0]}" if before[0] != now[0] else f"modified since, {now[0]} bytes as before"


def _sealed(sources: ShardSources) -> bytes:
    document = asdict(sources)
    return canonical_json(document | {"sha256": sha256_of_json(document)}, is_compact=True) + b"\n"


def _opened(line: bytes) -> ShardSources:
    document = parse_json(line, dict[str, Any], where=SOURCES_NAME)
    claimed = document.pop("sha256", None)
    if sha256_of_json(document) != claimed:
        raise DocumentError(f"{SOURCES_NAME}: a line is not as it was written")
    return checked(document, ShardSources, where=SOURCES_NAME)
