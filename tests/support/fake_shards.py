"""Small valid shard sets in well under a second: Pillow's JPEGs in a made-up mp4, true offsets and checksums.

The mp4 member is no playable file (a few bytes around the frames), which no reader of frames by range can tell;
everything else is as the converter writes it.
"""

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset import TarWriter

from ca2st.checked_json import sha256_of_json
from sharding.format.index import MEMBER_SUFFIXES, TICKS_PER_SECOND, encode_index, frame_checksum, member_checksum
from sharding.format.shard_set import (
    AudioParameters,
    LabelSpace,
    ShardEntry,
    ShardSet,
    VideoParameters,
    read_shard_set,
    write_shard_set,
)

_VIDEO_HEAD, _VIDEO_TAIL = b"\0" * 48, b"\1" * 32


@dataclass(frozen=True, kw_only=True)
class FakeSample:
    """What one sample holds; `make_samples` makes many."""

    key: str
    labels: tuple[int, ...] = (0,)
    num_frames: int = 20
    height: int = 48
    width: int = 64
    frames_per_second: float = 30.0
    mel_rows: int | None = None
    """None: as long as the video; 0: no audio."""
    num_mel_bins: int = 128
    seed: int = 0

    @property
    def rows(self) -> int:
        return int(self.num_frames / self.frames_per_second * 100) if self.mel_rows is None else self.mel_rows

    @property
    def ticks(self) -> list[int]:
        return [round(i * TICKS_PER_SECOND / self.frames_per_second) for i in range(self.num_frames)]

    def mel(self) -> np.ndarray:
        """Row r holds -r / 100, so that a crop tells where it was cut."""
        rows = np.arange(self.rows, dtype=np.float32)[:, None] / -100
        return (rows + np.zeros((1, self.num_mel_bins), np.float32)).astype(np.float16)

    def frames(self) -> list[bytes]:
        """A moving pattern with an edge in it: no two frames and no two samples look alike."""
        y, x = np.mgrid[: self.height, : self.width]
        return [_jpeg(self._pixels(x, y, index)) for index in range(self.num_frames)]

    def _pixels(self, x: np.ndarray, y: np.ndarray, index: int) -> np.ndarray:
        waves = 128 + 70 * np.sin(x / 9 + index / 3 + self.seed) + 40 * np.cos(y / 7 - self.seed)
        edge = np.where(x > (index * 3 + self.seed * 5) % self.width, 200, 40)
        return np.stack([waves, edge + y % 16, 255 * x / self.width], axis=-1).clip(0, 255).astype(np.uint8)


def make_samples(count: int, **values: Any) -> list[FakeSample]:
    """`count` samples named ``clip-0000`` and on; other values go to every one."""
    return [FakeSample(key=f"clip-{i:04d}", seed=i, labels=(i % 3,), **values) for i in range(count)]


def make_shard_set(
    root: Path,
    samples: list[FakeSample],
    *,
    samples_per_shard: int = 4,
    row_edits: dict[str, dict[str, Any]] | None = None,
    **manifest_values: Any,
) -> ShardSet:
    """Write `samples` as a shard set under `root`; `row_edits` overwrites index values by key, for refusals."""
    root.mkdir(parents=True, exist_ok=True)
    groups = [samples[i : i + samples_per_shard] for i in range(0, len(samples), samples_per_shard)]
    shards = tuple(_write_shard(root, number, group, row_edits or {}) for number, group in enumerate(groups))
    return rewrite_manifest(root, shards, **manifest_values)


def rewrite_manifest(root: Path, shards: tuple[ShardEntry, ...], **values: Any) -> ShardSet:
    """Name `shards` in a new manifest, some of its values replaced."""
    fields: dict[str, Any] = {
        "dataset": "fake",
        "split": "train",
        "label_spaces": (LabelSpace(name="label", classes=("red", "green", "blue")),),
        "targets": ("label",),
        "audio": AudioParameters(policy="optional"),
        "video": VideoParameters(),
        "tool_versions": {},
        "source_list_sha256": sha256_of_json([]),
        "rejected": {},
    }
    write_shard_set(root, fields | values, shards)
    return read_shard_set(root)


def _write_shard(root: Path, number: int, samples: list[FakeSample], edits: dict[str, dict[str, Any]]) -> ShardEntry:
    name = f"ca2st-{number:06d}.tar"
    sink = io.BytesIO()
    with TarWriter(sink, mtime=0.0, encoder=False) as writer:
        rows = [_write_sample(writer, sample) | edits.get(sample.key, {}) for sample in samples]
    shard, index = sink.getvalue(), encode_index(rows, {})
    (root / name).write_bytes(shard)
    entry = ShardEntry(
        name=name,
        bytes=len(shard),
        sha256=hashlib.sha256(shard).hexdigest(),
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
        num_samples=len(samples),
    )
    (root / entry.index_name).write_bytes(index)
    return entry


def _write_sample(writer: TarWriter, sample: FakeSample) -> dict[str, Any]:
    frames = sample.frames()
    members = {
        "video": _VIDEO_HEAD + b"".join(frames) + _VIDEO_TAIL,
        "mel": npy(sample.mel()),
        "json": json.dumps({"name": sample.key}).encode(),
    }
    row: dict[str, Any] = {
        "key": sample.key,
        "labels": list(sample.labels),
        "num_frames": sample.num_frames,
        "duration_seconds": sample.num_frames / sample.frames_per_second,
        "has_audio": sample.rows > 0,
        "mel_rows": sample.rows,
        "frame_data_offset": len(_VIDEO_HEAD),
        "frame_bytes": [len(frame) for frame in frames],
        "frame_ticks": sample.ticks,
        "frame_xxh32": [frame_checksum(frame) for frame in frames],
    }
    for member, data in members.items():
        writer.write({"__key__": sample.key, MEMBER_SUFFIXES[member]: data})
        row[f"{member}_offset"] = writer.tarstream.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        row[f"{member}_bytes"], row[f"{member}_xxh64"] = len(data), member_checksum(data)
    return row


def members_of(path: Path) -> dict[str, tuple[int, int]]:
    """(offset, size) of every member of a tar, by name."""
    with tarfile.open(path) as tar:
        return {member.name: (member.offset_data, member.size) for member in tar}


def flip_byte(path: Path, offset: int) -> None:
    """Damage one byte in place, the size kept."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def npy(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    """The bytes of an npy file."""
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=allow_pickle)
    return sink.getvalue()


def _jpeg(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=90)
    return sink.getvalue()
