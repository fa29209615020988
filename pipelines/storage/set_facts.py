"""What a shard set holds, in numbers: read from its indexes alone, no video is opened."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.errors import ShardSetDamageError
from pipelines.storage.index import read_columns
from sharding.format.shard_set import LabelSpace, ShardEntry, ShardSet

_COLUMNS = ("labels", "num_frames", "duration_seconds", "has_audio", "mel_rows", "video_bytes", "mel_bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """How a quantity is spread over the samples."""

    least: float
    median: float
    mean: float
    most: float
    total: float

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> "Spread":
        """Of at least one value."""
        return cls(
            least=float(values.min()),
            median=float(np.median(values)),
            mean=float(values.mean()),
            most=float(values.max()),
            total=float(values.sum()),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SetFacts:
    """A shard set in numbers."""

    dataset: str
    split: str
    codec: str
    targets: tuple[str, ...]
    num_samples: int
    num_shards: int
    shard_bytes: int
    """All shards and indexes."""
    rejected: Mapping[str, int]
    """By reason, as the conversion counted them."""
    notes: Mapping[str, int]
    """What was unusual about the sources and accepted, by kind."""
    classes: Mapping[str, Mapping[str, int]]
    """Samples of each class, by label space."""
    duration_seconds: Spread
    num_frames: Spread
    frames_per_second: Spread
    """Frames of a sample by its duration."""
    num_with_audio: int
    mel_rows: Spread
    """Rows of 10 ms; 0 without sound."""
    video_bytes: Spread
    mel_bytes: Spread
    durations: tuple[float, ...]
    """Seconds, of every sample, in stored order."""


def set_facts(shard_set: ShardSet) -> SetFacts:
    """Read every index of `shard_set` and count.

    Raises:
        ShardSetDamageError: an index is missing, damaged, or has labels outside the manifest's classes.
    """
    manifest = shard_set.manifest
    counts: list[Counter[int]] = [Counter() for _ in manifest.label_spaces]
    columns: dict[str, list[NDArray[np.float64]]] = {name: [] for name in _COLUMNS if name != "labels"}
    for shard, table in read_columns(shard_set, _COLUMNS):
        for name, parts in columns.items():
            parts.append(table.column(name).to_numpy(zero_copy_only=False).astype(np.float64))
        _count_labels(counts, table, shard)
    values = {name: np.concatenate(parts) for name, parts in columns.items()}
    durations = values["duration_seconds"]
    return SetFacts(
        dataset=manifest.dataset,
        split=manifest.split,
        codec=manifest.video.codec,
        targets=manifest.targets,
        num_samples=manifest.num_samples,
        num_shards=manifest.num_shards,
        shard_bytes=sum(shard.bytes + shard.index_bytes for shard in shard_set.shards),
        rejected=dict(manifest.rejected),
        notes=dict(manifest.notes),
        classes={space.name: _named(space, found) for space, found in zip(manifest.label_spaces, counts, strict=True)},
        duration_seconds=Spread.of(durations),
        num_frames=Spread.of(values["num_frames"]),
        frames_per_second=Spread.of(values["num_frames"] / np.maximum(durations, 1e-9)),
        num_with_audio=int(values["has_audio"].sum()),
        mel_rows=Spread.of(values["mel_rows"]),
        video_bytes=Spread.of(values["video_bytes"]),
        mel_bytes=Spread.of(values["mel_bytes"]),
        durations=tuple(durations.tolist()),
    )


def _count_labels(counts: Sequence[Counter[int]], table: pa.Table, shard: ShardEntry) -> None:
    labels = table.column("labels").to_pylist()
    if any(len(row) != len(counts) for row in labels):
        raise ShardSetDamageError(f"{shard.index_name}: expected {len(counts)} labels a sample; convert the set again")
    for column, counter in enumerate(counts):
        counter.update(row[column] for row in labels)


def _named(space: LabelSpace, found: Counter[int]) -> dict[str, int]:
    if outside := sorted(set(found) - set(range(len(space.classes)))):
        raise ShardSetDamageError(
            f"label space {space.name!r}: expected labels of 0..{len(space.classes) - 1}, found {outside[0]}; "
            "convert the set again"
        )
    return {name: found[index] for index, name in enumerate(space.classes)}
