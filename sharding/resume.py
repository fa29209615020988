"""What an unfinished conversion left in its folder, and whether the one at hand may continue it."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa

from ca2st.checked_json import DocumentError, checked, parse_json
from ca2st.durable import fsync_folder
from sharding.errors import ConversionRefusedError, ShardDamageError
from sharding.folder_lock import LOCK_NAME
from sharding.index import decode_index
from sharding.keys import sample_key
from sharding.manifest import MANIFEST_NAME
from sharding.rejects import REJECTS_NAME, Reject
from sharding.shard_set import SHARDS_NAME, ShardEntry, index_name
from sharding.source import SourceList
from sharding.source_states import SOURCES_NAME
from sharding.writer import ShardRange, shard_name

_OURS = re.compile(r"ca2st-\d{6}\.(tar|index\.parquet)")
_OTHERS_OF_OURS = (MANIFEST_NAME, SHARDS_NAME, REJECTS_NAME, SOURCES_NAME, LOCK_NAME)


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


def refuse_another_conversion(root: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise ConversionRefusedError with every field that differs, if any does."""
    before, now = (_flat({"clock": "first-frame"} | dict(one)) for one in (theirs, json.loads(json.dumps(ours))))
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
