"""Write one shard: a plain tar by webdataset's TarWriter, and the index that names every byte range in it."""

import hashlib
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

from ca2st.checked_json import canonical_json
from ca2st.durable import NO_FAULTS, FaultPoints, write_bytes, writing
from sharding.format.index import MEMBER_SUFFIXES, MEMBERS, encode_index, frame_checksum, member_checksum
from sharding.format.shard_set import ShardEntry, index_name

_OWNER = "ca2st"
_MODE = 0o444


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSample:
    """Everything of one sample, ready to be written."""

    key: str
    labels: tuple[int, ...]
    video: bytes
    mel: bytes
    json: bytes
    num_frames: int
    duration_seconds: float
    has_audio: bool
    mel_rows: int
    frame_data_offset: int
    frame_bytes: tuple[int, ...]
    frame_ticks: tuple[int, ...]
    notes: tuple[str, ...] = ()
    """Kinds of what was unusual about the source; the index counts them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRange:
    """What of the source list a shard covers; kept in its index, so that a conversion resumes behind it."""

    first: int
    """Position of the first source of the range."""
    end: int
    """Position behind the last one."""
    rejects: tuple[Mapping[str, Any], ...]
    """Sources of the range that were rejected: position, sample_id, reason, what."""


def shard_name(number: int) -> str:
    """File name of the shard with that number."""
    return f"ca2st-{number:06d}.tar"


def member_header(key: str, suffix: str, size: int) -> bytes:
    """Return the 512 bytes that stand before a member in our tars."""
    info = tarfile.TarInfo(f"{key}.{suffix}")
    info.size, info.mtime, info.mode, info.uname, info.gname = size, 0, _MODE, _OWNER, _OWNER
    return info.tobuf(tarfile.USTAR_FORMAT)


def write_shard(
    root: Path,
    number: int,
    samples: Iterable[StoredSample],
    *,
    covers: Callable[[], ShardRange],
    conversion: Mapping[str, Any],
    faults: FaultPoints = NO_FAULTS,
) -> ShardEntry:
    """Write ``ca2st-<number>.tar`` and its index by the write protocol.

    Samples are written as they come; `covers` is asked once they are used up. `conversion` is the identity of the
    conversion (sources, parameters, tools). Both go into the index.
    Fault points reached: ``index.written``, ``index.renamed``, ``shard.written``, ``shard.renamed``.

    Raises:
        EnvironmentFault: no space, no permission.
    """
    name = shard_name(number)
    with writing(root / name, faults=faults, point="shard") as file:
        sink = _HashingSink(file)
        rows, notes = _write_members(sink, samples)
        file.flush()
        _check_headers(Path(file.name), rows)
        about: dict[str, object] = {
            "conversion": conversion,
            "range": asdict(covers()),
            "shard": {"bytes": sink.num_bytes, "sha256": sink.sha256.hexdigest()},
        }
        if notes:
            about["notes"] = notes
        index = encode_index(
            rows, {key: canonical_json(value, is_compact=True).decode() for key, value in about.items()}
        )
        # Before the tar gets its name: no tar is ever there without its index.
        write_bytes(root / index_name(name), index, faults=faults, point="index")
    return ShardEntry(
        name=name,
        bytes=sink.num_bytes,
        sha256=sink.sha256.hexdigest(),
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
        num_samples=len(rows),
    )


def _write_members(
    sink: "_HashingSink", samples: Iterable[StoredSample]
) -> tuple[list[dict[str, Any]], Mapping[str, int]]:
    """Write a tar; return the rows of its index, and how many samples have each kind of note."""
    from webdataset.writer import TarWriter  # here, since webdataset imports torch

    # mtime as int: a float makes tarfile put a PAX header in front of every member
    tar = TarWriter(sink, user=_OWNER, group=_OWNER, mode=_MODE, mtime=0, encoder=False)
    rows, notes = [], Counter[str]()
    try:
        for sample in samples:
            offsets = {}
            for member in MEMBERS:  # one call per member: within a call TarWriter sorts by suffix
                offsets[member] = tar.tarstream.offset + tarfile.BLOCKSIZE
                tar.write({"__key__": sample.key, MEMBER_SUFFIXES[member]: getattr(sample, member)})
            rows.append(_index_row(sample, offsets))
            notes.update(sample.notes)
        tar.close()
    finally:
        sink.closed_for_good = True  # a tar stream that is collected later must not write behind an error
    return rows, notes


def _index_row(sample: StoredSample, offsets: Mapping[str, int]) -> dict[str, Any]:
    video, starts = memoryview(sample.video), accumulate(sample.frame_bytes, initial=sample.frame_data_offset)
    row: dict[str, Any] = {
        "key": sample.key,
        "labels": list(sample.labels),
        "num_frames": sample.num_frames,
        "duration_seconds": sample.duration_seconds,
        "has_audio": sample.has_audio,
        "mel_rows": sample.mel_rows,
        "frame_data_offset": sample.frame_data_offset,
        "frame_bytes": list(sample.frame_bytes),
        "frame_ticks": list(sample.frame_ticks),
        "frame_xxh32": [
            frame_checksum(video[at : at + size]) for at, size in zip(starts, sample.frame_bytes, strict=False)
        ],
    }
    for member in MEMBERS:
        data = getattr(sample, member)
        row |= {
            f"{member}_offset": offsets[member],
            f"{member}_bytes": len(data),
            f"{member}_xxh64": member_checksum(data),
        }
    return row


def _check_headers(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Read every member's header back from where the index says it is."""
    with path.open("rb") as file:
        for row in rows:
            for member in MEMBERS:
                file.seek(row[f"{member}_offset"] - tarfile.BLOCKSIZE)
                expected = member_header(row["key"], MEMBER_SUFFIXES[member], row[f"{member}_bytes"])
                if file.read(tarfile.BLOCKSIZE) != expected:
                    raise RuntimeError(
                        f"{row['key']}.{MEMBER_SUFFIXES[member]}: not at its offset in the tar just written"
                    )


class _HashingSink:
    """Passes writes on, counting and hashing them."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()
        self.closed_for_good = False

    def write(self, data: Any) -> int:
        if not self.closed_for_good:
            self._file.write(data)
            self.sha256.update(data)
            self.num_bytes += len(data)
        return len(data)


def padded(size: int) -> int:
    """Return the bytes that a member of `size` bytes takes in a tar, its header apart."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
