"""The folder of a conversion: its lock, its rejects, its shards so far, and what the sources were when they were made.

One converter per output folder: the kernel releases the lock when its holder dies. A rerun continues behind the
unbroken chain of complete shards that belong to the same conversion.

``sources.jsonl`` holds a sealed line per shard, so that a rerun notices sources that changed since. It is no part of
the set: the shards' bytes depend on what is in the sources, not on when they were written; a set without it, as a copy
may be, is a set like any other.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa

from ca2st.checked_json import DocumentError, canonical_json, checked, parse_json, read_json, sha256_of_json
from ca2st.durable import append_bytes, fsync_folder, is_environment_error, take_lock, unwritable, write_bytes
from ca2st.errors import CA2STError, EnvironmentFault, UserInputError, listed
from sharding.errors import AllRejectedError, ConversionRefusedError, MediaError, RejectBudgetError, ShardDamageError
from sharding.format.index import decode_index, sample_key
from sharding.format.shard_set import MANIFEST_NAME, SHARDS_NAME, ShardEntry, index_name
from sharding.format.writer import ShardRange, shard_name
from sharding.media.claims import source_state
from sharding.settings import RejectBudget
from sharding.source import SourceList, SourceSample

LOCK_NAME = ".conversion.lock"
SOURCES_NAME = "sources.jsonl"
"""File beside a shard set, or in the folder of an unfinished conversion."""


class _Holder(TypedDict):
    pid: int
    host: str


@contextlib.contextmanager
def output_folder(out: Path) -> Iterator[None]:
    """`out` as an existing folder; removed again if it was made here and stays empty."""
    existed = out.exists()
    if existed and not out.is_dir():
        raise UserInputError(f"{out}: expected a folder, found a file; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(f"cannot make {out}: {error.strerror}; choose another --out") from error
    try:
        yield
    finally:
        if not existed:
            with contextlib.suppress(OSError):
                out.rmdir()


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
    """A `sharding.errors.RejectReason`."""
    what: str


def count_by_reason(rejects: Sequence[Reject]) -> dict[str, int]:
    """Return number of rejects by reason, in alphabetical order."""
    return dict(sorted(Counter(reject.reason for reject in rejects).items()))


def rejects_file(rejects: Sequence[Reject]) -> bytes:
    """Return contents of ``rejects.jsonl``: an object per line, in source order."""
    return "".join(json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in rejects).encode()


def read_rejects(root: Path) -> list[Reject]:
    """Return the rejects of a shard set, or of an unfinished conversion; none where there is no such file.

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
    """Return counts by reason, each with the file, annotation and fault of the first few."""
    parts = []
    for reason, count in count_by_reason(rejects).items():
        named = [
            f"{source.samples[one.position].path} [{source.samples[one.position].where}]: {one.what}"
            for one in rejects
            if one.reason == reason
        ]
        parts.append(f"{reason} {count} ({listed(named, most=3)})")
    return "; ".join(parts)


def require_within_budget(rejects: Sequence[Reject], source: SourceList, *, budget: RejectBudget, out: Path) -> None:
    """Refuse a set with too many rejects, and list them in ``rejects.jsonl``.

    Raises:
        AllRejectedError: there is nothing but rejects.
        RejectBudgetError: there are more than `budget` allows.
    """
    total = len(source.samples)
    if len(rejects) == total:
        (out / REJECTS_NAME).unlink(missing_ok=True)
        raise AllRejectedError(
            f"all {total} samples were rejected, nothing was written: {rejects_in_words(rejects, source)}",
            rejects=tuple(rejects),
        )
    if not budget.allows(len(rejects), total):
        write_bytes(out / REJECTS_NAME, rejects_file(rejects))
        raise RejectBudgetError(
            f"{len(rejects)} of {total} samples rejected, --max-rejects allows {budget}: "
            f"{rejects_in_words(rejects, source)}; all are listed in {out / REJECTS_NAME}; "
            "repair them and rerun (finished shards are kept), or raise --max-rejects"
        )


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
    """Return the shard of that number if its index is whole and its tar has the length the index says, else None."""
    try:
        return open_done_shard(root, number)
    except ShardDamageError:
        return None


def open_done_shard(root: Path, number: int, *, with_tar: bool = True) -> DoneShard:
    """Return the shard of that number as its index tells; the length of its tar is compared unless `with_tar` is False.

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
    """Return whether a shard's index names the samples and labels of its range of the source list."""
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


State = tuple[int, ...] | None
"""Size in bytes and modification time in ns of a source, then those of the file that its sound has of its own; None:
there is no readable file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSources:
    """The sources on which one shard depends."""

    shard: str
    """File name of the shard."""
    index_sha256: str
    """Of its index, which is thereby known to be the one that was written."""
    first: int
    """Position of the first source."""
    states: tuple[tuple[int, ...] | None, ...]
    """State of it and of those behind it, up to the one that no longer fitted into the shard."""


def state_of(path: Path) -> State:
    """Return the state of a source now."""
    try:
        state = source_state(path)
    except MediaError:
        return None
    return state.num_bytes, state.modified_ns


def state_of_sample(sample: SourceSample, state: Callable[[Path], State] = state_of) -> State:
    """Return the state of a sample's file, and behind it that of the file which its sound has of its own."""
    own = state(sample.path)
    if own is None or sample.sound_path is None:
        return own
    sound = state(sample.sound_path)
    return None if sound is None else (*own, *sound)


def read_sources(root: Path) -> dict[str, ShardSources]:
    """Return what is known by shard name; the last sound line of each counts, others (a kill cuts one) are left out."""
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
    """Return what is wrong with the file's bytes beside the finished set of `shards`; empty when nothing is."""
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
    """Return positions of the sources of a shard that are other files now; one that is gone cannot be compared."""
    changed = []
    for position, before in enumerate(known.states, known.first):
        now = state_of_sample(source.samples[position], state) if position < len(source.samples) else None
        if now is not None and now != before:
            changed.append(position)
    return changed


def changes_in_words(known: Sequence[ShardSources], source: SourceList, state: Callable[[Path], State]) -> str:
    """Return how many files changed, and what of the first few; empty when none did."""
    changes: dict[Path, tuple[State, State]] = {}
    for one in known:
        for position in changed_sources(one, source, state):
            sample, before = source.samples[position], one.states[position - one.first]
            now = state_of_sample(sample, state)
            if sample.sound_path is not None and before and now and before[:2] == now[:2]:
                changes[sample.sound_path] = before[2:], now[2:]
            else:
                changes[sample.path] = before, now
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
