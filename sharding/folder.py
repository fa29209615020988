"""The folder of a conversion: its lock, its rejects, and what an unfinished run left in it.

One converter an output folder: an advisory lock that the kernel releases when its holder dies.

Sources that gave no sample: what is kept about them and how they are named to the user.

What an unfinished conversion left in its folder, and whether the one at hand may continue it.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa

from ca2st.checked_json import DocumentError, checked, parse_json, read_json
from ca2st.durable import fsync_folder, is_environment_error, take_lock, unwritable, write_bytes
from ca2st.errors import CA2STError, EnvironmentFault, listed
from sharding.errors import ConversionRefusedError, ShardDamageError
from sharding.format.index import decode_index, sample_key
from sharding.format.shard_set import MANIFEST_NAME, SHARDS_NAME, ShardEntry, index_name
from sharding.format.writer import ShardRange, shard_name
from sharding.source import SourceList
from sharding.source_states import SOURCES_NAME

LOCK_NAME = ".conversion.lock"


class _Holder(TypedDict):
    pid: int
    host: str


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the lock file goes when the block ends, a dead holder's is taken over.

    Raises:
        ConversionRefusedError: another process holds it; the message names it.
        EnvironmentFault: the lock file cannot be made, or this file system has no locks.
    """
    path = folder / LOCK_NAME
    descriptor = _acquire(path)
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # while the lock is held: nobody else can have it open and locked
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = -1
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            is_ours = take_lock(descriptor)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            if error.errno == errno.ELOOP:
                raise EnvironmentFault(
                    f"cannot lock {path}: expected a file of a conversion, found a symbolic link; remove it"
                ) from error
            if is_environment_error(error):
                raise unwritable(path.parent, error) from error
            raise EnvironmentFault(f"cannot lock {path}: {error.strerror}; choose another folder") from error
        if is_ours and _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)
        if not is_ours:
            raise ConversionRefusedError(
                f"{path.parent}: another conversion writes here ({_holder(path)}); "
                "wait for it, stop it, or choose another --out"
            )
        # else: its last holder removed it between our open and our lock


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        holder = read_json(path, _Holder)
    except (OSError, CA2STError):
        return "an unnamed process"
    return f"process {holder['pid']} on {holder['host']}"


REJECTS_NAME = "rejects.jsonl"
"""File of a shard set, or of an unfinished conversion, that lists its rejects; absent when there are none."""
MISSING_NAME = "missing.jsonl"
"""File of a shard set that lists the samples that ``--max-missing`` left out; absent when there are none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """A source that gave no sample. Holds no path: a set is the same wherever its sources lay."""

    position: int
    """Place in the source list."""
    sample_id: str
    reason: str
    """A key of `sharding.media.probe.REASONS`."""
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


def write_missing(root: Path, samples: Sequence[str]) -> None:
    """Write ``missing.jsonl``, an object per line, or remove it where nothing is missing."""
    if samples:
        lines = (json.dumps({"sample": sample}, ensure_ascii=False) + "\n" for sample in samples)
        write_bytes(root / MISSING_NAME, "".join(lines).encode())
    else:
        (root / MISSING_NAME).unlink(missing_ok=True)


def rejects_in_words(rejects: Sequence[Reject], source: SourceList) -> str:
    """Counts by reason, each with the file, annotation and fault of the first few."""
    parts = []
    for reason, count in count_by_reason(rejects).items():
        named = [_name(reject, source) for reject in rejects if reject.reason == reason]
        parts.append(f"{reason} {count} ({listed(named, most=3)})")
    return "; ".join(parts)


def _name(reject: Reject, source: SourceList) -> str:
    sample = source.samples[reject.position]
    return f"{sample.path} [{sample.where}]: {reject.what}"


_OURS = re.compile(r"ca2st-\d{6}\.(tar|index\.parquet)")
_OTHERS_OF_OURS = (MANIFEST_NAME, SHARDS_NAME, REJECTS_NAME, MISSING_NAME, SOURCES_NAME, LOCK_NAME)


@dataclass(frozen=True, kw_only=True, slots=True)
class DoneShard:
    """A complete shard, as its index tells."""

    entry: ShardEntry
    covers: ShardRange
    conversion: Mapping[str, Any]
    num_with_audio: int
    notes: Mapping[str, int] = field(default_factory=dict)
    """Samples by the kinds of their notes."""


class UnnamedConversionError(ShardDamageError):
    """An index without the notes of a conversion of ours."""


class _Written(TypedDict):
    bytes: int
    sha256: str


def read_done_shard(root: Path, number: int) -> DoneShard | None:
    """The shard of that number if its index is whole and its tar has the length the index says, else None."""
    try:
        return open_done_shard(root, number)
    except ShardDamageError:
        return None


def open_done_shard(root: Path, number: int, *, with_tar: bool = True) -> DoneShard:
    """The shard of that number as its index tells; the length of its tar is compared unless `with_tar` is False.

    Raises:
        ShardDamageError: the index is missing or damaged, or its tar has not the length the index says.
    """
    name = shard_name(number)
    where = index_name(name)
    try:
        data = (root / where).read_bytes()
        table = decode_index(data, columns=["has_audio"])
        metadata = table.schema.metadata or {}
        if not metadata:
            raise UnnamedConversionError(f"{where}: expected the metadata of a conversion, found none")
        shard = parse_json(metadata[b"shard"], _Written, where=f"{where}: shard")
        covers = parse_json(metadata[b"range"], ShardRange, where=f"{where}: range")
        _check_range(covers, table.num_rows, where)
        conversion = parse_json(metadata[b"conversion"], dict[str, Any], where=f"{where}: conversion")
        notes = parse_json(metadata.get(b"notes", b"{}"), dict[str, int], where=f"{where}: notes")
        if with_tar and (found := (root / name).stat().st_size) != shard["bytes"]:
            raise ShardDamageError(f"{name}: expected {shard['bytes']} bytes, found {found}")
    except KeyError as error:
        raise ShardDamageError(f"{where}: expected the metadata {error}, found none") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ShardDamageError(f"{where}: not the index of a shard ({error})") from error
    entry = ShardEntry(
        name=name,
        bytes=shard["bytes"],
        sha256=shard["sha256"],
        index_bytes=len(data),
        index_sha256=hashlib.sha256(data).hexdigest(),
        num_samples=table.num_rows,
    )
    with_audio = sum(table["has_audio"].to_pylist())
    return DoneShard(entry=entry, covers=covers, conversion=conversion, num_with_audio=with_audio, notes=notes)


def _check_range(covers: ShardRange, num_rows: int, where: str) -> None:
    rejects = [checked(reject, Reject, where=f"{where}: range: rejects") for reject in covers.rejects]
    positions = {reject.position for reject in rejects}
    inside = all(covers.first <= position < covers.end for position in positions)
    if covers.first < 0 or not inside or len(positions) != len(rejects):
        raise DocumentError(f"{where}: range: expected rejects within its range, each once, found others")
    if num_rows != covers.end - covers.first - len(rejects):
        raise DocumentError(
            f"{where}: range: expected a row or a reject for each of its {covers.end - covers.first} sources, found "
            f"{num_rows} and {len(rejects)}"
        )


def done_shards(
    root: Path, identity: Mapping[str, Any], source: SourceList, *, is_whole: Callable[[DoneShard], bool]
) -> list[DoneShard]:
    """The unbroken chain of complete shards from number 0 on that hold what `source` says and that `is_whole` accepts.

    Raises:
        ConversionRefusedError: one of them belongs to another conversion; the message shows the difference.
    """
    chain: list[DoneShard] = []
    while (shard := read_done_shard(root, len(chain))) is not None:
        refuse_another_conversion(root, shard.conversion, identity)
        if shard.covers.first != (chain[-1].covers.end if chain else 0):
            break
        if not (_holds(root, shard, source) and is_whole(shard)):
            break
        chain.append(shard)
    return chain


def _holds(root: Path, shard: DoneShard, source: SourceList) -> bool:
    """Whether a shard's index names the samples and labels of its range of the source list."""
    rejected = {reject["position"] for reject in shard.covers.rejects}
    samples = source.samples[shard.covers.first : shard.covers.end]
    kept = [one for position, one in enumerate(samples, shard.covers.first) if position not in rejected]
    rows = decode_index((root / shard.entry.index_name).read_bytes(), columns=["key", "labels"]).to_pydict()
    expected = {"key": [sample_key(one.sample_id) for one in kept], "labels": [list(one.labels) for one in kept]}
    return bool(rows == expected)


_IN_WORDS = {"source_list_sha256": "another list of files, segments, labels or classes (source_list_sha256)"}


def refuse_another_conversion(root: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise ConversionRefusedError with every field that differs, if any does."""
    before, now = (_flat({"clock": "first-frame"} | dict(one)) for one in (theirs, json.loads(json.dumps(ours))))
    before, now = ({_IN_WORDS.get(name, name): value for name, value in one.items()} for one in (before, now))
    differences = [
        f"{name}: there {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise ConversionRefusedError(
            f"{root}: holds shards of another conversion ({'; '.join(differences)}); "
            "convert with the same sources, parameters and versions, or choose another --out"
        )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, Mapping) else {f"{prefix}{name}": item}
    return flat


def refuse_foreign_files(root: Path) -> None:
    """Raise ConversionRefusedError if the folder holds anything that no conversion of ours wrote."""
    for path in sorted(root.iterdir()):
        temporary = path.name.startswith(".") and path.name.endswith(".tmp")
        if not (_OURS.fullmatch(path.name) or path.name in _OTHERS_OF_OURS or temporary):
            raise ConversionRefusedError(
                f"{root}: expected an empty folder or an unfinished conversion, found {path.name}; choose another --out"
            )


def remove_shards_from(root: Path, number: int) -> None:
    """Remove every shard and index with that number or a higher one, the last first."""
    for path in sorted((path for path in root.iterdir() if _OURS.fullmatch(path.name)), reverse=True):
        if path.name >= f"ca2st-{number:06d}":
            path.unlink()
    fsync_folder(root)
