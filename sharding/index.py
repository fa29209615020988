"""The per-shard index (format v1): a Parquet row a sample, with the place and checksum of every byte range.

A reader needs the index alone to fetch single frames of an MJPEG clip: frame i of a sample starts at
``video_offset + frame_data_offset + sum(frame_bytes[:i])`` of the tar and is ``frame_bytes[i]`` long. Frames of the
other codecs depend on each other: ``frame_bytes`` and ``frame_xxh32`` are empty, ``frame_ticks`` has every frame's
time, and a reader takes the whole member, for which ``video_xxh64`` vouches. Its key frames are every
``num_gop_frames``-th frame, as the manifest says.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from sharding.parquet import read_parquet

TICKS_PER_SECOND = 90_000
"""Unit of frame times: 1/90 000 s, which holds 23.976, 25, 29.97, 30, 50, 59.94 and 60 fps well and 6 h in int32."""
MEMBERS = ("video", "mel", "json")
"""Names of a sample's members in index columns; their suffixes are in MEMBER_SUFFIXES."""
MEMBER_SUFFIXES = {"video": "mp4", "mel": "mel.npy", "json": "json"}

_INTERVALS = pa.list_(pa.uint32())
INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("labels", pa.list_(pa.int32())),
        pa.field("num_frames", pa.int32()),
        pa.field("duration_seconds", pa.float64()),
        pa.field("has_audio", pa.bool_()),
        pa.field("mel_rows", pa.int32()),
        *[
            pa.field(f"{member}_{what}", kind)
            for member in MEMBERS
            for what, kind in (("offset", pa.int64()), ("bytes", pa.int64()), ("xxh64", pa.uint64()))
        ],
        pa.field("frame_data_offset", pa.int64()),
        pa.field("frame_bytes", _INTERVALS),
        pa.field("frame_ticks", pa.list_(pa.int32())),
        pa.field("frame_xxh32", _INTERVALS),
    ]
)
_DELTA_PACKED = ("frame_bytes.list.element", "frame_ticks.list.element")


def member_checksum(data: bytes) -> int:
    """xxh3-64 of a whole member."""
    return xxhash.xxh3_64_intdigest(data)


def frame_checksum(data: bytes | memoryview) -> int:
    """xxh32 of one frame's JPEG bytes."""
    return xxhash.xxh32_intdigest(data)


def encode_index(rows: Sequence[Mapping[str, Any]], metadata: Mapping[str, str]) -> bytes:
    """Parquet bytes of the index of one shard; the same rows give the same bytes.

    `metadata` (text) goes into the Parquet schema: what the writer needs to resume behind this shard.
    """
    schema = INDEX_SCHEMA.with_metadata({name: value.encode() for name, value in metadata.items()})
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist([dict(row) for row in rows], schema=schema),
        sink,
        compression="zstd",
        use_dictionary=False,
        column_encoding=dict.fromkeys(_DELTA_PACKED, "DELTA_BINARY_PACKED"),
    )
    return sink.getvalue()


def decode_index(data: bytes, *, columns: Sequence[str] | None = None) -> pa.Table:
    """The table of an index file's bytes, checked to have this format's schema; `columns` alone, or all.

    Raises:
        pa.ArrowException: the bytes are not Parquet.
        ValueError: another schema, or more than an index holds.
        OSError: its pages are damaged.
    """
    return read_parquet(data, schema=INDEX_SCHEMA, columns=columns)
