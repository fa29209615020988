"""What an unfinished conversion left in its folder, and whether the one at hand may continue it."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ca2st.durable import fsync_folder
from sharding.errors import ConversionRefusedError
from sharding.folder_lock import LOCK_NAME
from sharding.index import decode_index
from sharding.manifest import MANIFEST_NAME
from sharding.rejects import REJECTS_NAME
from sharding.shard_set import SHARDS_NAME, ShardEntry, index_name
from sharding.writer import ShardRange, shard_name

_OURS = re.compile(r"ca2st-\d{6}\.(tar|index\.parquet)")
_OTHERS_OF_OURS = (MANIFEST_NAME, SHARDS_NAME, REJECTS_NAME, LOCK_NAME)


@dataclass(frozen=True, kw_only=True, slots=True)
class DoneShard:
    """A complete shard, as its index tells."""

    entry: ShardEntry
    covers: ShardRange
    conversion: Mapping[str, Any]
    num_with_audio: int
    notes: Mapping[str, int] = field(default_factory=dict)
    """Samples by the kinds of their notes."""


def read_done_shard(root: Path, number: int) -> DoneShard | None:
    """The shard of that number if its index is whole and its tar has the length the index says, else None."""
    name = shard_name(number)
    try:
        data = (root / index_name(name)).read_bytes()
        table = decode_index(data)
        metadata = {key: json.loads(value) for key, value in (table.schema.metadata or {}).items()}
        covers = ShardRange(**(metadata[b"range"] | {"rejects": tuple(metadata[b"range"]["rejects"])}))
        shard = metadata[b"shard"]
        if (root / name).stat().st_size != shard["bytes"]:
            return None
        conversion = dict(metadata[b"conversion"])
        notes = dict(metadata.get(b"notes", {}))
        entry = ShardEntry(
            name=name,
            bytes=shard["bytes"],
            sha256=shard["sha256"],
            index_bytes=len(data),
            index_sha256=hashlib.sha256(data).hexdigest(),
            num_samples=table.num_rows,
        )
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
    with_audio = pc.sum(table["has_audio"]).as_py() or 0
    return DoneShard(entry=entry, covers=covers, conversion=conversion, num_with_audio=with_audio, notes=notes)


def done_shards(root: Path, identity: Mapping[str, Any]) -> list[DoneShard]:
    """The unbroken chain of complete shards from number 0 on.

    Raises:
        ConversionRefusedError: one of them belongs to another conversion; the message shows the difference.
    """
    chain: list[DoneShard] = []
    while (shard := read_done_shard(root, len(chain))) is not None:
        refuse_another_conversion(root, shard.conversion, identity)
        if shard.covers.first != (chain[-1].covers.end if chain else 0):
            break
        chain.append(shard)
    return chain


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
