"""The folder of a conversion: its lock, its rejects, its shards so far, and what the sources were when they were made.

One converter per output folder: the kernel releases the lock when its holder dies. A rerun keeps every complete shard
that holds its range of the same conversion's plan, and makes the others.

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

from ca2st import durable
from ca2st.checked_json import DocumentError, canonical_json, checked, parse_json, read_json, sha256_of_json
from ca2st.errors import CA2STError, EnvironmentFault, UserInputError, listed
from sharding.errors import AllRejectedError, ConversionRefusedError, MediaError, RejectBudgetError, ShardDamageError
from sharding.format.index import decode_index, sample_key
from sharding.format.remote import Files, Location, RemoteFileMissingError, files_of
from sharding.format.shard_set import MANIFEST_NAME, TABLE_NAMES, ShardEntry, index_name
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


STATE_FOLDER = Path("~/.cache/ca2st/conversions")
"""Of conversions to a URL: their locks, and what their sources were."""


@contextlib.contextmanager
def claimed(place: Location) -> Iterator[Path]:
    """Hold an output for this process; yield the folder of what is the conversion's own and no part of the set.

    Behind a URL nothing can be locked: there the lock holds on this machine alone. A folder that is made here is
    removed again if it stays empty.

    Raises:
        ConversionRefusedError: another process holds it; the message names it.
        EnvironmentFault: the folder or its lock cannot be made.
        UserInputError: it is a file.
    """
    key = hashlib.sha256(str(place).encode()).hexdigest()[:16]
    home = place if isinstance(place, Path) else STATE_FOLDER.expanduser() / key
    existed = home.exists()
    if existed and not home.is_dir():
        raise UserInputError(f"{home}: expected a folder, found a file; choose another --out")
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(f"cannot make {home}: {error.strerror}; choose another --out") from error
    try:
        with folder_lock(home):
            yield home
    finally:
        if not existed:
            with contextlib.suppress(OSError):
                home.rmdir()


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
            is_ours = durable.take_lock(descriptor)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            if error.errno == errno.ELOOP:
                raise EnvironmentFault(
                    f"cannot lock {path}: expected a file of a conversion, found a symbolic link; remove it"
                ) from error
            if durable.is_environment_error(error):
                raise durable.unwritable(path.parent, error) from error
            raise EnvironmentFault(f"cannot lock {path}: {error.strerror}; choose another folder") from error
        if is_ours and _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)  # if locked, not the file at `path`: its last holder has just removed that
        if not is_ours:
            raise ConversionRefusedError(
                f"{path.parent}: another conversion writes here ({_holder(path)}); "
                "wait for it, stop it, or choose another --out"
            )


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


def missing_file(samples: Sequence[str]) -> bytes:
    """Return contents of ``missing.jsonl``: an object per line."""
    return "".join(json.dumps({"sample": sample}, ensure_ascii=False) + "\n" for sample in samples).encode()


def write_or_remove(files: Files, name: str, data: bytes) -> None:
    """Write a list of the set, or remove it where there is nothing to list."""
    if data:
        files.write(name, data)
    else:
        files.remove(name)


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


def require_within_budget(
    rejects: Sequence[Reject], source: SourceList, *, budget: RejectBudget, files: Files | None
) -> None:
    """Refuse a set with too many rejects, and list them in ``rejects.jsonl`` of `files`; None: that is another's.

    Raises:
        AllRejectedError: there is nothing but rejects.
        RejectBudgetError: there are more than `budget` allows.
    """
    total = len(source.samples)
    if len(rejects) == total:
        if files is not None:
            files.remove(REJECTS_NAME)
        raise AllRejectedError(
            f"all {total} samples were rejected, nothing was written: {rejects_in_words(rejects, source)}",
            rejects=tuple(rejects),
        )
    if not budget.allows(len(rejects), total):
        listed_in = ""
        if files is not None:
            files.write(REJECTS_NAME, rejects_file(rejects))
            listed_in = f"all are listed in {files.folder}/{REJECTS_NAME}; "
        raise RejectBudgetError(
            f"{len(rejects)} of {total} samples rejected, --max-rejects allows {budget}: "
            f"{rejects_in_words(rejects, source)}; {listed_in}"
            "repair them and rerun (finished shards are kept), or raise --max-rejects"
        )


_OURS = re.compile(r"ca2st-\d{6}\.(tar|index\.parquet)")
_OTHERS_OF_OURS = (MANIFEST_NAME, REJECTS_NAME, MISSING_NAME, SOURCES_NAME, LOCK_NAME)


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


def read_done_shard(root: Path | Files, number: int) -> DoneShard | None:
    """Return the shard of that number if its index is whole and its tar has the length the index says, else None."""
    try:
        return open_done_shard(root, number)
    except ShardDamageError:
        return None


def open_done_shard(root: Path | Files, shard: int | str, *, with_tar: bool = True) -> DoneShard:
    """Return the shard of that number or name as its index tells, the length of its tar compared if `with_tar`.

    Raises:
        ShardDamageError: the index is missing or damaged, or its tar has not the length the index says.
    """
    files, name = files_of(root), shard_name(shard) if isinstance(shard, int) else shard
    where = index_name(name)
    try:
        data = files.read(where)
        table = decode_index(data, columns=["has_audio"])
        metadata = table.schema.metadata or {}
        if not metadata:
            raise UnnamedConversionError(f"{where}: expected the metadata of a conversion, found none")
        written = parse_json(metadata[b"shard"], _Written, where=f"{where}: shard")
        covers = parse_json(metadata[b"range"], ShardRange, where=f"{where}: range")
        _check_range(covers, table.num_rows, where)
        conversion = parse_json(metadata[b"conversion"], dict[str, Any], where=f"{where}: conversion")
        notes = parse_json(metadata.get(b"notes", b"{}"), dict[str, int], where=f"{where}: notes")
        if with_tar and (found := files.size(name)) != written["bytes"]:
            raise ShardDamageError(f"{name}: expected {written['bytes']} bytes, found {found}")
    except KeyError as error:
        raise ShardDamageError(f"{where}: expected the metadata {error}, found none") from error
    except (OSError, ValueError, RemoteFileMissingError, pa.ArrowException) as error:
        raise ShardDamageError(f"{where}: not the index of a shard ({error})") from error
    entry = ShardEntry(
        name=name,
        bytes=written["bytes"],
        sha256=written["sha256"],
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


def planned_shard(
    files: Files,
    number: int,
    *,
    covers: range,
    identity: Mapping[str, Any],
    source: SourceList,
) -> DoneShard | None:
    """Return the shard of that number if it is complete and its index names the samples and labels of that range.

    Raises:
        ConversionRefusedError: it belongs to another conversion; the message shows the difference.
    """
    shard = read_done_shard(files, number)
    if shard is None:
        return None
    refuse_another_conversion(files.folder, shard.conversion, identity)
    if (shard.covers.first, shard.covers.end) != (covers.start, covers.stop):
        return None
    rejected = {reject["position"] for reject in shard.covers.rejects}
    samples = source.samples[covers.start : covers.stop]
    kept = [one for position, one in enumerate(samples, covers.start) if position not in rejected]
    rows = decode_index(files.read(shard.entry.index_name), columns=["key", "labels"]).to_pydict()
    expected = {"key": [sample_key(one.sample_id) for one in kept], "labels": [list(one.labels) for one in kept]}
    return shard if rows == expected else None


_IN_WORDS = {"source_list_sha256": "another list of files, segments, labels or classes (source_list_sha256)"}
_BEFORE_PLANS = "shard_plan"


def refuse_another_conversion(
    root: Location, theirs: Mapping[str, Any], ours: Mapping[str, Any], *, finished: bool = False
) -> None:
    """Raise ConversionRefusedError with every field that differs, if any does.

    Shards of a `finished` set may have been cut by the rule before `plan_shards`; an unfinished one cannot go on so.
    """
    has_plan = _BEFORE_PLANS in theirs
    ours = {name: value for name, value in json.loads(json.dumps(ours)).items() if has_plan or name != _BEFORE_PLANS}
    before, now = (_flat({"clock": "first-frame", **one}) for one in (theirs, ours))
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
    if not has_plan and not finished:
        raise ConversionRefusedError(
            f"{root}: holds an unfinished conversion of an earlier ca2st, which cut shards as they filled, not ahead; "
            "finish it with that version, or empty the folder or choose another --out to convert anew"
        )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, Mapping) else {f"{prefix}{name}": item}
    return flat


def refuse_foreign_files(files: Files) -> None:
    """Raise ConversionRefusedError if the place holds anything that no conversion of ours wrote."""
    for name in sorted(files.sizes() or {}):
        temporary = name.startswith(".") and name.endswith(".tmp")
        if not (_OURS.fullmatch(name) or TABLE_NAMES.fullmatch(name) or name in _OTHERS_OF_OURS or temporary):
            raise ConversionRefusedError(
                f"{files.folder}: expected an empty folder or an unfinished conversion, found {name}; "
                "choose another --out"
            )


def shard_number(name: str) -> int:
    """Return the number in the file name of a shard or an index."""
    return int(name.removeprefix("ca2st-")[:6])


def shards_there(files: Files) -> set[int]:
    """Return numbers of which there is a shard or an index."""
    return {shard_number(name) for name in files.sizes() or {} if _OURS.fullmatch(name)}


def remove_shard(files: Files, number: int) -> None:
    """Remove a shard and its index, as far as they are there; the tar first."""
    name = shard_name(number)
    files.remove(name)
    files.remove(index_name(name))


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
    states: tuple[State, ...]
    """State of it and of those behind it, to the end of the shard's range."""


def state_of(path: Path) -> State:
    """Return the state of a source now."""
    try:
        return source_state(path)
    except MediaError:
        return None


def state_of_sample(sample: SourceSample, state: Callable[[Path], State] = state_of) -> State:
    """Return the state of a sample's file, and behind it that of the file which its sound has of its own."""
    own = state(sample.path)
    if own is None or sample.sound_path is None:
        return own
    sound = state(sample.sound_path)
    return None if sound is None else (*own, *sound)


class SourcesFile:
    """The ``sources.jsonl`` of a folder: the last sound line of each shard counts, others (a kill cuts one) do not.

    Lines stay on disk, since all of them can be more than fits into memory.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / SOURCES_NAME
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            for line in file:
                with contextlib.suppress(DocumentError):
                    self._places[_opened(line).shard] = (self._end, len(line))
                self._end += len(line)

    def of(self, shard: str) -> ShardSources | None:
        """Return what is known of a shard's sources."""
        return _opened(self._line(shard)) if shard in self._places else None

    def _line(self, shard: str) -> bytes:
        start, size = self._places[shard]
        with self._path.open("rb") as file:
            file.seek(start)
            return file.read(size)

    def append(self, sources: ShardSources) -> None:
        """Add a line for a shard just made; raises as `append_bytes`."""
        line = _sealed(sources)
        durable.append_bytes(self._path, line)
        self._places[sources.shard] = (self._end, len(line))
        self._end += len(line)

    def keep(self, shards: Iterable[str]) -> None:
        """Have the file hold the lines of these shards, in this order, and no others; without any there is no file."""
        shards = [shard for shard in shards if shard in self._places]
        if not shards:
            self._path.unlink(missing_ok=True)
            self._places, self._end = {}, 0
            return
        places, end = dict[str, tuple[int, int]](), 0
        for shard in shards:
            size = self._places[shard][1]
            places[shard] = (end, size)
            end += size
        if self._path.is_symlink() or (places, end) != (self._places, self._end):
            with durable.writing(self._path) as file:
                file.writelines(map(self._line, shards))
            self._places, self._end = places, end


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


def changes_in_words(known: Iterable[ShardSources], source: SourceList, state: Callable[[Path], State]) -> str:
    """Return how many files changed, and what of the first few."""
    changes: dict[Path, str] = {}
    for one in known:
        for position in changed_sources(one, source, state):
            sample, before = source.samples[position], one.states[position - one.first]
            path, now = sample.path, state_of_sample(sample, state)
            if sample.sound_path is not None and before and now and before[:2] == now[:2]:
                path, before, now = sample.sound_path, before[2:], now[2:]
            if before is None or now is None:
                changes[path] = "was missing"
            elif before[0] != now[0]:
                changes[path] = f"{before[0]} bytes, now {now[0]}"
            else:
                changes[path] = f"modified since, {now[0]} bytes as before"
    found = [f"{path}: {change}" for path, change in changes.items()]
    return f"{len(changes)} source files ({listed(found, most=3, separator='; ')})"


def _sealed(sources: ShardSources) -> bytes:
    document = {name: getattr(sources, name) for name in ("shard", "index_sha256", "first", "states")}
    return canonical_json(document | {"sha256": sha256_of_json(document)}, is_compact=True) + b"\n"


def _opened(line: bytes) -> ShardSources:
    document = parse_json(line, dict[str, Any], where=SOURCES_NAME)
    claimed = document.pop("sha256", None)
    if sha256_of_json(document) != claimed:
        raise DocumentError(f"{SOURCES_NAME}: a line is not as it was written")
    return checked(document, ShardSources, where=SOURCES_NAME)
