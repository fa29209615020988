"""Check every byte of a shard set against its manifest, and say which file, sample and frame is damaged.

A set behind a URL is checked shard after shard through a temporary folder, one at a time.
"""

import contextlib
import hashlib
import itertools
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NotRequired, TypedDict

import pyarrow as pa

from ca2st.checked_json import DocumentError, parse_json
from ca2st.durable import is_environment_error
from ca2st.errors import EnvironmentFault
from sharding import folder
from sharding.errors import ManifestError, ShardDamageError
from sharding.format.index import MEMBER_SUFFIXES, MEMBERS, decode_index, frame_checksum, member_checksum
from sharding.format.remote import Files, LocalFiles, RemoteFileMissingError, RemoteFiles, as_location
from sharding.format.shard_set import (
    MANIFEST_NAME,
    TABLE_NAMES,
    LabelSpace,
    ShardEntry,
    ShardSet,
    parse_manifest,
    read_manifest,
    read_shard_set,
)
from sharding.format.writer import member_header, padded

_MOST_PER_SHARD = 20
_SAID_TWICE = ("key", "labels", "duration_seconds", "num_frames", "has_audio", "json_offset", "json_bytes")
_Row = Mapping[str, Any]


class _SaidLabel(TypedDict):
    index: int
    name: str


class _SaidVideo(TypedDict):
    num_frames: int


class _SaidAudio(TypedDict):
    has_audio: bool


class _Said(TypedDict):
    """What of a sample's JSON the index says too; a writer other than ours may leave it out."""

    key: NotRequired[str]
    labels: NotRequired[dict[str, _SaidLabel | list[_SaidLabel]]]
    duration_seconds: NotRequired[float]
    video: NotRequired[_SaidVideo]
    audio: NotRequired[_SaidAudio]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is wrong with a shard set."""

    shard: str
    """File name: a shard, or whichever file of the set is concerned."""
    key: str
    """Key of the damaged sample, or empty when it is not one sample's."""
    what: str


def verify_shard_set(root: Path, *, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Return everything that is wrong with the set in `root`; an empty list means every byte is as it was written.

    Args:
        root: The set's folder.
        progress: Called with (shards checked, shards) after each shard.

    Raises:
        ManifestError: `root` is no folder, or holds no manifest that this version reads.
    """
    if not root.is_dir():
        raise ManifestError(f"{root}: expected a folder with {MANIFEST_NAME}, found none; check the path")
    try:
        shard_set = read_shard_set(root)
    except ShardDamageError as error:
        return [_set_problem(error)]
    return _problems_of_all(shard_set, LocalFiles(folder=root), progress)


def _problems_of_all(shard_set: ShardSet, files: Files, progress: Callable[[int, int], None] | None) -> list[Problem]:
    """Return what is wrong with a set whose manifest can be read; copies of remote files go into its root."""
    root, spaces = shard_set.root, shard_set.manifest.label_spaces
    sizes, problems = files.sizes() or {}, list[Problem]()
    for number, shard in enumerate(shard_set.shards):
        if isinstance(files, LocalFiles):
            problems += shard_problems(root, shard, spaces)
        else:
            listed = sizes.get(shard.name, shard.bytes)
            problems += remote_shard_problems(files, shard, spaces, root=root, listed=listed)
        if progress:
            progress(number + 1, len(shard_set.shards))
    return [*_problems_beside(shard_set, sizes, files), *_index_problems(shard_set), *problems]


def _set_problem(error: Exception) -> Problem:
    """Return what keeps a set from being read at all."""
    table = TABLE_NAMES.search(str(error))
    return Problem(shard=table[0] if table else MANIFEST_NAME, key="", what=str(error))


def _problems_beside(shard_set: ShardSet, names: Iterable[str], files: Files) -> Iterator[Problem]:
    """Yield which of `names` the manifest does not account for, and a list of rejects that is not that of the indexes.

    The set's indexes are in its folder.
    """
    has_rejects = bool(shard_set.manifest.rejected)
    expected = {
        MANIFEST_NAME,
        shard_set.manifest.table,
        folder.LOCK_NAME,  # left by a converter that was killed at its end
        folder.SOURCES_NAME,
        folder.MISSING_NAME,
        *[folder.REJECTS_NAME][:has_rejects],
    }
    for shard in shard_set.shards:
        expected |= {shard.name, shard.index_name}
    for name in sorted(set(names) - expected):
        yield Problem(shard=name, key="", what="not named by the manifest; remove it")
    sources = _read(files, folder.SOURCES_NAME)
    if sources is not None and (what := folder.sources_damage(sources, shard_set.shards)):
        yield Problem(shard=folder.SOURCES_NAME, key="", what=what)
    if not has_rejects:
        return
    found, digest = _read(files, folder.REJECTS_NAME), shard_set.manifest.rejects_sha256
    if found is None:
        yield Problem(shard=folder.REJECTS_NAME, key="", what="missing: the manifest counts rejects")
    elif digest is not None and hashlib.sha256(found).hexdigest() != digest:
        yield Problem(shard=folder.REJECTS_NAME, key="", what="sha256 differs from the manifest's; restore it")
    elif digest is None and found != _rejects_of_indexes(shard_set):
        yield Problem(shard=folder.REJECTS_NAME, key="", what="differs from what the shards' indexes say; remove it")


def _read(files: Files, name: str) -> bytes | None:
    """Return a file's bytes, none of one that this machine does not read; None where there is no such file."""
    try:
        return files.read(name)
    except (FileNotFoundError, RemoteFileMissingError):
        return None
    except OSError:
        return b""
    except EnvironmentFault:
        if name != folder.SOURCES_NAME:  # that one is no part of the set
            raise
        return None


def _rejects_of_indexes(shard_set: ShardSet) -> bytes:
    """Return contents of ``rejects.jsonl`` by the indexes."""
    rejects = []
    for entry in shard_set.shards:
        if not _has_bytes_of(shard_set.root, entry):
            continue
        with contextlib.suppress(ShardDamageError):  # named by `_index_problems`
            shard = folder.open_done_shard(shard_set.root, entry.name, with_tar=False)
            rejects += [folder.Reject(**reject) for reject in shard.covers.rejects]
    return folder.rejects_file(rejects)


def _index_problems(shard_set: ShardSet) -> Iterator[Problem]:
    """Yield what the indexes say of their conversion otherwise than the manifest and than each other."""
    end = 0
    # Behind a hash of all rejects, ranges may leave out sources that were all rejected: their shards have no file.
    left_out = sum(shard_set.manifest.rejected.values()) if shard_set.manifest.rejects_sha256 else 0
    manifest = json.loads(shard_set.manifest.to_json())
    names = ("dataset", "split", "source_list_sha256", "video", "audio", "tool_versions")
    expected, lists = {name: manifest[name] for name in names}, list(shard_set.manifest.source_lists)
    for entry in shard_set.shards:
        if not _has_bytes_of(shard_set.root, entry):
            return  # named by the check of its bytes
        try:
            shard = folder.open_done_shard(shard_set.root, entry.name, with_tar=False)
        except folder.UnnamedConversionError:
            return  # not a conversion of ours: nothing is said twice
        except ShardDamageError as error:
            yield Problem(shard=entry.index_name, key="", what=f"{error}; restore it or convert again")
            return
        if lists and shard.conversion.get("source_list_sha256") != lists[0]:  # the first shard of what was added
            del lists[0]
            end = 0
        if shard_set.manifest.source_lists:  # what was added may be made by other versions
            expected["source_list_sha256"] = lists[0] if lists else ""
            expected["tool_versions"] = shard.conversion.get("tool_versions")
        gap = shard.covers.first - end
        left_out -= max(0, gap) + len(shard.covers.rejects)
        for what, found, wanted in (
            ("first source", shard.covers.first, end if gap < 0 or left_out < 0 else shard.covers.first),
            ("bytes of the shard", shard.entry.bytes, entry.bytes),
            ("sha256 of the shard", shard.entry.sha256, entry.sha256),
            *((name, shard.conversion.get(name, value), value) for name, value in expected.items()),
        ):
            if found != wanted:
                told = f"{what}: expected {wanted!r:.99}, found {found!r:.99}; convert again"
                yield Problem(shard=entry.index_name, key="", what=told)
        end = shard.covers.end


def _has_bytes_of(root: Path, entry: ShardEntry) -> bool:
    """Return whether the index is the one that the shard table names: no other is read, for its claims could be any."""
    data = _read(LocalFiles(folder=root), entry.index_name)
    return hashlib.sha256(data or b"").hexdigest() == entry.index_sha256


def shard_problems(root: Path, shard: ShardEntry, spaces: Sequence[LabelSpace]) -> list[Problem]:
    """Return what is wrong with a shard and its index in `root`, and where the two contradict each other."""
    index_problem = _file_problem(root / shard.index_name, shard.index_bytes, shard.index_sha256)
    tar_problem = _file_problem(root / shard.name, shard.bytes, shard.sha256)
    problems = [index_problem] if index_problem else []
    if tar_problem is None:
        return problems or [*_contradictions(root, shard, spaces)][:_MOST_PER_SHARD]
    found = _localised(root, shard) if (root / shard.name).is_file() else []
    return problems + (found or [tar_problem])


def _contradictions(root: Path, shard: ShardEntry, spaces: Sequence[LabelSpace]) -> Iterator[Problem]:
    """Yield what a shard's samples say about themselves in their JSON and its index says otherwise."""
    try:
        table = decode_index((root / shard.index_name).read_bytes(), columns=_SAID_TWICE)
    except (OSError, ValueError, pa.ArrowException) as error:
        yield Problem(shard=shard.index_name, key="", what=f"not an index ({error}); convert again")
        return
    if table.num_rows != shard.num_samples:
        what = f"expected the shard table's {shard.num_samples} rows, found {table.num_rows}; convert again"
        yield Problem(shard=shard.index_name, key="", what=what)
    with (root / shard.name).open("rb") as file:
        for row in table.to_pylist():
            file.seek(row["json_offset"])
            where = f"{row['key']}.{MEMBER_SUFFIXES['json']}"
            try:
                said = parse_json(file.read(row["json_bytes"]), _Said, where=where)
            except DocumentError as error:
                yield Problem(shard=shard.name, key=row["key"], what=f"{error}; convert again")
                continue
            for name, here, there in _twice(row, said, spaces):
                if here != there:
                    what = f"{name}: {there!r} in the sample's JSON, {here!r} in the index; convert again"
                    yield Problem(shard=shard.index_name, key=row["key"], what=what)


def _twice(row: _Row, said: "_Said", spaces: Sequence[LabelSpace]) -> Iterator[tuple[str, Any, Any]]:
    """Yield what is said twice: its name, what the index says, what the JSON says."""
    labels = said.get("labels", {})
    lists = [label for label in labels.values() if isinstance(label, list)]
    if lists:  # several labels per sample, of the one space
        yield "labels", row["labels"], [label["index"] for label in lists[0]]
    elif "labels" in said:
        named = {space.name: label for space, label in zip(spaces, row["labels"], strict=False)}
        yield "labels", named, {name: label["index"] for name, label in labels.items() if not isinstance(label, list)}
    for space in spaces:
        found = labels.get(space.name, [])
        for label in found if isinstance(found, list) else [found]:
            if 0 <= label["index"] < len(space.classes):
                yield f"class of {space.name}", space.classes[label["index"]], label["name"]
    if "video" in said:
        yield "num_frames", row["num_frames"], said["video"]["num_frames"]
    if "audio" in said:
        yield "has_audio", row["has_audio"], said["audio"]["has_audio"]
    yield "key", row["key"], said.get("key", row["key"])
    yield "duration_seconds", row["duration_seconds"], said.get("duration_seconds", row["duration_seconds"])


def _file_problem(path: Path, num_bytes: int, sha256: str) -> Problem | None:
    try:
        found = path.stat().st_size
        if found != num_bytes:
            what = f"expected {num_bytes} bytes, found {found}; restore it or convert again"
            return Problem(shard=path.name, key="", what=what)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return Problem(shard=path.name, key="", what=f"cannot be read: {error.strerror}; restore it or convert again")
    if digest != sha256:
        return Problem(shard=path.name, key="", what="sha256 differs from the manifest's; restore it or convert again")
    return None


def _localised(root: Path, shard: ShardEntry) -> list[Problem]:
    """Return where in a damaged tar the damage is, as far as the index tells."""
    found, end = list[tuple[str, str]](), 0
    try:
        rows = decode_index((root / shard.index_name).read_bytes()).to_pylist()
        with (root / shard.name).open("rb") as file:
            if (size := file.seek(0, os.SEEK_END)) != shard.bytes:
                found.append(("", f"expected {shard.bytes} bytes, found {size}; restore it or convert again"))
            for row, member in itertools.product(rows, MEMBERS):
                found += [(row["key"], what) for what in _member_damage(file, row, member)]
                end = row[f"{member}_offset"] + padded(row[f"{member}_bytes"])
            file.seek(end)
            if any(file.read()):
                found.append(("", "the empty blocks behind the last sample are not empty"))
    except (OSError, ValueError, pa.ArrowException):
        return []
    problems = [Problem(shard=shard.name, key=key, what=what) for key, what in found]
    if (more := len(problems) - _MOST_PER_SHARD) > 0:
        problems[_MOST_PER_SHARD:] = [Problem(shard=shard.name, key="", what=f"and {more} more in this shard")]
    return problems


def _member_damage(file: IO[bytes], row: _Row, member: str) -> Iterator[str]:
    name, offset, size = MEMBER_SUFFIXES[member], row[f"{member}_offset"], row[f"{member}_bytes"]
    file.seek(offset - tarfile.BLOCKSIZE)
    header, data = file.read(tarfile.BLOCKSIZE), file.read(size)
    padding = file.read(padded(size) - size)
    if header != member_header(row["key"], name, size):
        yield f"{name}: tar header at byte {offset - tarfile.BLOCKSIZE} differs"
    if len(data) < size:
        yield f"{name}: expected {size} bytes from byte {offset}, found {len(data)}"
    elif member_checksum(data) != row[f"{member}_xxh64"]:
        frames = _damaged_frames(data, row) if member == "video" and row["frame_bytes"] else ""
        yield f"{name}: bytes {offset} to {offset + size} differ{frames}"
    if any(padding):
        yield f"{name}: padding behind byte {offset + size} is not empty"


def _damaged_frames(data: bytes, row: _Row) -> str:
    """Return which frames of a damaged video differ, in words."""
    at, damaged = row["frame_data_offset"], []
    for number, (size, checksum) in enumerate(zip(row["frame_bytes"], row["frame_xxh32"], strict=True)):
        if frame_checksum(data[at : at + size]) != checksum:
            damaged.append(number)
        at += size
    if not damaged:
        return " (no frame: the container around them)"
    shown = ", ".join(map(str, damaged[:10])) + (", ..." if len(damaged) > 10 else "")
    return f" (frame {shown} of {len(row['frame_bytes'])})"


def verify_place(place: str, *, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Return everything that is wrong with the set in a folder or behind a URL; empty: every byte is as it was written.

    A URL needs room for one shard in the system's temporary folder (TMPDIR chooses another).

    Raises:
        UserInputError: a kind of URL that is not read.
        ManifestError: there is no manifest, or none that this version reads.
        EnvironmentFault: the server cannot be read, or the temporary folder not be written.
    """
    location = as_location(place)
    if isinstance(location, Path):
        return verify_shard_set(location, progress=progress)
    files = RemoteFiles(folder=location)
    with tempfile.TemporaryDirectory(prefix="ca2st-verify-") as scratch:
        root = Path(scratch)
        _fetch_small(files, MANIFEST_NAME, root)
        try:
            _fetch_small(files, read_manifest(root).table, root)
            shard_set = read_shard_set(root)
        except ManifestError as error:
            raise ManifestError(str(error).replace(str(root), files.folder.url)) from error
        except ShardDamageError as error:
            problem = _set_problem(error)
            return [replace(problem, what=problem.what.replace(str(root), files.folder.url))]
        return _problems_of_all(shard_set, files, progress)


def count_shards(place: str) -> int:
    """Return shards of the set at `place`, for a progress bar; 0 where its manifest cannot be read."""
    location = as_location(place)
    if isinstance(location, Path):
        return sum(1 for _ in location.glob("*.tar"))
    try:
        files = RemoteFiles(folder=location)
        return parse_manifest(files.read(MANIFEST_NAME), where=files.folder.file(MANIFEST_NAME)).num_shards
    except (RemoteFileMissingError, ManifestError, ShardDamageError):
        return 0


def remote_shard_problems(
    files: RemoteFiles, shard: ShardEntry, spaces: Sequence[LabelSpace], *, root: Path, listed: int
) -> list[Problem]:
    """Return what is wrong with a shard behind a URL that is `listed` with so many bytes; `root` is for its copy."""
    if listed != shard.bytes:
        what = f"expected {shard.bytes} bytes, found {listed}; copy it again"
        return [Problem(shard=shard.name, key="", what=what)]
    _fetch_small(files, shard.index_name, root)
    path = root / shard.name
    try:
        with path.open("wb") as file:
            for piece in files.ranges(shard.name, shard.bytes):
                file.write(piece)
    except RemoteFileMissingError:
        path.unlink()
    except EnvironmentFault as error:
        path.unlink()
        return [Problem(shard=shard.name, key="", what=str(error))]
    except OSError as error:
        if not is_environment_error(error):
            raise
        raise EnvironmentFault(f"{path}: {error.strerror}; set TMPDIR to a folder with room for a shard") from error
    problems = shard_problems(root, shard, spaces)
    path.unlink(missing_ok=True)
    return problems


def _fetch_small(files: RemoteFiles, name: str, root: Path) -> None:
    with contextlib.suppress(RemoteFileMissingError):  # the check of the copy names it
        (root / name).write_bytes(files.read(name))
