"""The per-shard indexes: a `SampleEntry` per row, checked before anything trusts it; and what a set holds, counted."""

import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.errors import SampleDamageError, ShardSetDamageError
from pipelines.storage.remote import open_files
from pipelines.storage.shard_files import ShardFiles
from sharding.format.index import decode_index, read_parquet
from sharding.format.shard_set import LabelSpace, Manifest, ShardEntry, ShardSet
from sharding.media.codecs import StoredCodec, stored_codec

_KEY = re.compile(r"[a-z0-9_-]{1,80}")
_LISTS = ("labels", "frame_bytes", "frame_ticks", "frame_xxh32")
_RANGES = ("video_offset", "video_bytes", "frame_data_offset", "mel_offset", "mel_bytes")
_NUMBERS = (*_RANGES, "num_frames", "mel_rows", "mel_xxh64", "video_xxh64")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleEntry:
    """Where the bytes of one sample are, and what they must be."""

    shard: ShardEntry
    key: str
    labels: tuple[int, ...]
    """One per label space of the manifest; in a set of several labels per sample, those of its one space, ascending."""
    has_audio: bool
    mel_rows: int
    mel_offset: int
    mel_bytes: int
    mel_xxh64: int
    codec: StoredCodec
    video_offset: int
    video_bytes: int
    video_xxh64: int
    frame_offsets: NDArray[np.int64]
    """Start of every frame in the shard, and the end of the last; of no use where frames have no bytes of their own."""
    frame_ticks: NDArray[np.int32]
    """Time of every frame in 1/90000 s from the sample's first moment."""
    frame_xxh32: NDArray[np.uint32]
    """Empty where frames have no bytes of their own."""

    @property
    def num_frames(self) -> int:
        """Stored frames."""
        return len(self.frame_ticks)

    @property
    def where(self) -> str:
        """Shard and key, for messages."""
        return f"{self.shard.name}, sample {self.key}"


class ShardIndex:
    """The rows of one shard's index, held as the arrays of its table."""

    def __init__(self, shard: ShardEntry, table: pa.Table, *, num_labels: int | None, codec: StoredCodec) -> None:
        """Take the columns as NumPy arrays; by DLPack, as pyarrow's `to_numpy` would import pandas first.

        `num_labels` None: any number of labels per sample, ascending.

        Raises:
            ShardSetDamageError: it has another number of rows, or places with nothing in them.
        """
        if table.num_rows != shard.num_samples:
            raise ShardSetDamageError(
                f"{shard.index_name}: expected {shard.num_samples} rows, found {table.num_rows}; convert the set again"
            )
        self.nbytes = int(table.nbytes)
        self._shard, self._num_labels, self._codec = shard, num_labels, codec
        columns: dict[str, Any] = {name: table.column(name).combine_chunks() for name in table.column_names}
        for name, column in columns.items():
            if empty := column.null_count or (column.values.null_count if name in _LISTS else 0):
                raise ShardSetDamageError(
                    f"{shard.index_name}: {name}: expected a value in every row, found {empty} empty places; "
                    "convert the set again"
                )
        self._keys, self._has_audio = columns["key"], columns["has_audio"]
        self._numbers = {name: np.from_dlpack(columns[name]) for name in _NUMBERS}
        self._lists: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {
            name: (np.from_dlpack(columns[name].offsets), np.from_dlpack(columns[name].values)) for name in _LISTS
        }

    def entry(self, row: int) -> SampleEntry:
        """Return the sample of that row.

        Raises:
            SampleDamageError: the row contradicts itself, the manifest or the shard's size.
        """
        value: dict[str, Any] = {name: column.item(row) for name, column in self._numbers.items()}
        value |= {"key": self._keys[row].as_py(), "has_audio": self._has_audio[row].as_py()}
        arrays = {name: values[offsets[row] : offsets[row + 1]] for name, (offsets, values) in self._lists.items()}
        self._check(value, arrays)
        del value["num_frames"]
        first_frame = value["video_offset"] + value.pop("frame_data_offset")
        return SampleEntry(
            shard=self._shard,
            labels=tuple(arrays["labels"].tolist()),
            codec=self._codec,
            frame_offsets=first_frame + np.concatenate([[0], np.cumsum(arrays["frame_bytes"], dtype=np.int64)]),
            frame_ticks=arrays["frame_ticks"],
            frame_xxh32=arrays["frame_xxh32"],
            **value,
        )

    def sample_ids(self) -> list[str]:
        """Return the keys of all rows, in stored order."""
        return list(self._keys.to_pylist())

    def _check(self, value: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        frames, ticks, shard_bytes = arrays["frame_bytes"], arrays["frame_ticks"], self._shard.bytes
        num_ranges = value["num_frames"] if self._codec.has_frame_ranges else 0
        rules = {
            "a key of [a-z0-9_-], 1 to 80 characters": bool(_KEY.fullmatch(value["key"])),
            "ascending labels" if self._num_labels is None else f"{self._num_labels} labels": (
                bool((np.diff(arrays["labels"]) > 0).all())
                if self._num_labels is None
                else len(arrays["labels"]) == self._num_labels
            ),
            "byte ranges of whole numbers >= 0": all(value[name] >= 0 for name in _RANGES),
            "at least one frame, none empty": value["num_frames"] > 0 and bool((frames > 0).all()),
            "as many sizes, times and checksums as num_frames"
            + ("" if num_ranges else f" (times alone for {self._codec.name})"): (
                len(frames),
                len(ticks),
                len(arrays["frame_xxh32"]),
            )
            == (num_ranges, value["num_frames"], num_ranges),
            "frame times >= 0 that never go back": bool((ticks[:1] >= 0).all() and (ticks[1:] >= ticks[:-1]).all()),
            "frames inside the video": value["frame_data_offset"] + int(frames.sum(dtype=np.int64))
            <= value["video_bytes"],
            "a video inside the shard, not empty": 0 < value["video_bytes"] <= shard_bytes - value["video_offset"],
            "a spectrogram, not empty, inside the shard": 0 < value["mel_bytes"] <= shard_bytes - value["mel_offset"],
            "spectrogram rows >= 0, and 0 without audio": value["mel_rows"] >= 0
            and (value["has_audio"] or not value["mel_rows"]),
        }
        if broken := [rule for rule, holds in rules.items() if not holds]:
            raise SampleDamageError(
                f"{self._shard.index_name}, sample {value['key']!r}: expected {'; '.join(broken)}; "
                "convert the set again"
            )


class ShardIndexCache:
    """Indexes read on first use, the least recently used dropped beyond `most_bytes`."""

    def __init__(self, files: ShardFiles, *, most_bytes: int) -> None:
        self._files, self._most_bytes = files, most_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[int, ShardIndex] = OrderedDict()
        self._bytes = 0

    def entry(self, shard: int, row: int) -> SampleEntry:
        """Return the sample at `row` of the shard at `shard` in the shard table.

        Raises as `ShardIndex` and `ShardFiles.read_index`.
        """
        return self._index(shard).entry(row)

    def sample_ids(self) -> list[str]:
        """Return the keys of the whole set in stored order; raises as `entry`."""
        return [key for shard in range(len(self._files.shard_set.shards)) for key in self._index(shard).sample_ids()]

    def _index(self, shard: int) -> ShardIndex:
        with self._lock:
            index = self._held.get(shard)
            if index is None:
                entry, manifest = self._files.shard_set.shards[shard], self._files.shard_set.manifest
                data = self._files.read_index(entry)
                try:
                    table = decode_index(data)
                except (pa.ArrowException, ValueError) as error:
                    raise ShardSetDamageError(
                        f"{entry.index_name}: not an index ({error}); convert the set again"
                    ) from error
                codec = stored_codec(manifest.video.codec)
                index = ShardIndex(entry, table, num_labels=num_labels(manifest), codec=codec)
                self._held[shard] = index
                self._bytes += index.nbytes
            self._held.move_to_end(shard)
            while len(self._held) > 1 and self._bytes > self._most_bytes:
                self._bytes -= self._held.popitem(last=False)[1].nbytes
        return index


def num_labels(manifest: Manifest) -> int | None:
    """Return the labels of each sample; None where each has any number."""
    return {"one": len(manifest.label_spaces), "several": None, "none": 0}[manifest.labelling]


def read_columns(shard_set: ShardSet, columns: Sequence[str]) -> Iterator[tuple[ShardEntry, pa.Table]]:
    """Yield some columns of every index of a set, shard by shard, without keeping any.

    Raises:
        ShardSetDamageError: an index is missing, damaged, or another shard's.
    """
    files = open_files(shard_set)
    for shard in shard_set.shards:
        data = files.read_index(shard)
        try:
            yield shard, read_parquet(data, columns=columns, num_rows=shard.num_samples)
        except (pa.ArrowException, ValueError, OSError) as error:
            raise ShardSetDamageError(
                f"{shard.index_name}: not this shard's index ({error}); convert the set again"
            ) from error


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
        """Return the spread of at least one value."""
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
    """Samples of each class, by label space; without labels none."""
    labelling: str
    """How many labels a sample has: ``one`` of each label space, ``several`` or ``none``."""
    labels_per_sample: Spread
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
    num_of_each: list[int] = []
    columns: dict[str, list[NDArray[np.float64]]] = {name: [] for name in _COLUMNS if name != "labels"}
    for shard, table in read_columns(shard_set, _COLUMNS):
        for name, parts in columns.items():
            parts.append(_numbers(table, name, shard))
        num_of_each += _count_labels(counts, table, shard, num_labels(manifest))
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
        classes={
            space.name: _named(space, found)
            for space, found in zip(manifest.label_spaces, counts, strict=True)
            if manifest.labelling != "none"
        },
        labelling=manifest.labelling,
        labels_per_sample=Spread.of(np.array(num_of_each, np.float64)),
        duration_seconds=Spread.of(durations),
        num_frames=Spread.of(values["num_frames"]),
        frames_per_second=Spread.of(values["num_frames"] / np.maximum(durations, 1e-9)),
        num_with_audio=int(values["has_audio"].sum()),
        mel_rows=Spread.of(values["mel_rows"]),
        video_bytes=Spread.of(values["video_bytes"]),
        mel_bytes=Spread.of(values["mel_bytes"]),
        durations=tuple(durations.tolist()),
    )


def _numbers(table: pa.Table, name: str, shard: ShardEntry) -> NDArray[np.float64]:
    """A column as NumPy has it; by DLPack, as pyarrow's `to_numpy` would import pandas first, which takes seconds."""
    column = table.column(name).combine_chunks()
    if column.null_count:
        raise ShardSetDamageError(
            f"{shard.index_name}: expected a {name} in every row, found none in {column.null_count}; "
            "convert the set again"
        )
    return np.from_dlpack(column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column).astype(np.float64)


def _count_labels(
    counts: Sequence[Counter[int]], table: pa.Table, shard: ShardEntry, expected: int | None
) -> list[int]:
    """Count a shard's labels into `counts`; how many each sample has is returned."""
    labels = table.column("labels").to_pylist()
    sizes = [len(row) for row in labels]
    if expected is not None and any(size != expected for size in sizes):
        raise ShardSetDamageError(f"{shard.index_name}: expected {expected} labels per sample; convert the set again")
    for column, counter in enumerate(counts if expected != 0 else ()):
        counter.update(label for row in labels for label in (row if expected is None else [row[column]]))
    return sizes


def _named(space: LabelSpace, found: Counter[int]) -> dict[str, int]:
    if outside := sorted(set(found) - set(range(len(space.classes)))):
        raise ShardSetDamageError(
            f"label space {space.name!r}: expected labels of 0..{len(space.classes) - 1}, found {outside[0]}; "
            "convert the set again"
        )
    return {name: found[index] for index, name in enumerate(space.classes)}
