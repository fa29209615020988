"""Sources that gave no sample: what is kept about them and how they are named to the user."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ca2st.checked_json import parse_json
from sharding.source import SourceList

REJECTS_NAME = "rejects.jsonl"
"""File of a shard set, or of an unfinished conversion, that lists its rejects; absent when there are none."""
_NAMES_SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """A source that gave no sample. Holds no path: a set is the same wherever its sources lay."""

    position: int
    """Place in the source list."""
    sample_id: str
    reason: str
    """A key of `sharding.media.REASONS`."""
    what: str


def count_by_reason(rejects: Sequence[Reject]) -> dict[str, int]:
    """Number of rejects by reason, in alphabetical order."""
    return dict(sorted(Counter(reject.reason for reject in rejects).items()))


def rejects_file(rejects: Sequence[Reject]) -> bytes:
    """Contents of ``rejects.jsonl``: an object a line, in source order."""
    return "".join(json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in rejects).encode()


def read_rejects(root: Path) -> list[Reject]:
    """The rejects of a shard set, or of an unfinished conversion; none where there is no such file.

    Raises:
        DocumentError: it is not what was written.
    """
    path = root / REJECTS_NAME
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [parse_json(line, Reject, where=f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def rejects_in_words(rejects: Sequence[Reject], source: SourceList) -> str:
    """Counts by reason, each with the file, annotation and fault of the first few."""
    parts = []
    for reason, count in count_by_reason(rejects).items():
        named = [_name(reject, source) for reject in rejects if reject.reason == reason][:_NAMES_SHOWN]
        more = [f"and {count - len(named)} more"] if count > len(named) else []
        parts.append(f"{reason} {count} ({', '.join(named + more)})")
    return "; ".join(parts)


def _name(reject: Reject, source: SourceList) -> str:
    sample = source.samples[reject.position]
    return f"{sample.path} [{sample.where}]: {reject.what}"
