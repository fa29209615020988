"""The per-shard index (format v1), sample keys, and the one reader of Parquet files.

The index has a row per sample, with the place and checksum of every byte range. A reader needs it alone to fetch single
frames of an MJPEG clip: frame i of a sample starts at ``video_offset + frame_data_offset + sum(frame_bytes[:i])`` of
the tar and is ``frame_bytes[i]`` long. Frames of the other codecs depend on each other: ``frame_bytes`` and
``frame_xxh32`` are empty, ``frame_ticks`` has every frame's time, and a reader takes the whole member, for which
``video_xxh64`` vouches. Its key frames are every ``num_gop_frames``-th frame, as the manifest says.

Parquet is read without Arrow's threads, and within bounds that are checked before it reads. Arrow starts its thread
pools at the first threaded read and leaves them to the process's end, where a busy machine now and then aborted an
otherwise finished command ("terminate called without an active exception"). Indexes are a few megabytes: nothing is
gained by threads. And a small file can unpack to any size: its footer says how many values it claims, and repeated
texts are kept as numbers until it is known what they would fill.
"""

import io
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

MOST_BYTES = 2 << 30
"""A table that would fill more memory is refused; an index of a 1 GB shard fills a few megabytes."""
_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
_VALUE_BYTES = 8


def read_parquet(
    data: bytes | Path,
    *,
    columns: Sequence[str] | None = None,
    schema: pa.Schema | None = None,
    num_rows: int | None = None,
) -> pa.Table:
    """Return the table of a Parquet file, given by its bytes or its path.

    Args:
        data: The file.
        columns: Read these only; None: all.
        schema: Columns and types that the file must have; None: any.
        num_rows: Rows that it must have; None: any number within the bound.

    Raises:
        pa.ArrowException: not Parquet.
        ValueError: other rows than `num_rows`, another schema, a column is missing, or more than `MOST_BYTES`.
        OSError: the file cannot be read, or its pages are damaged.
    """
    file = _opened(data)
    footer, found = file.metadata, file.schema_arrow
    if num_rows is not None and footer.num_rows != num_rows:
        raise ValueError(f"expected {num_rows} rows, found {footer.num_rows}")
    # Not what its column chunks claim: of a damaged footer, asking for those aborts the process.
    if not 0 <= (claimed := footer.num_rows * footer.num_columns * _VALUE_BYTES) <= MOST_BYTES:
        raise ValueError(f"expected a table of at most {MOST_BYTES} bytes, found one that claims {claimed}")
    if schema is not None and not found.equals(schema):
        raise ValueError(f"expected the columns {schema.names}, found {found.names}, or other types")
    if missing := sorted(set(columns or ()) - set(found.names)):
        raise ValueError(f"expected the columns {', '.join(columns or ())}, found no {', '.join(missing)}")
    texts = [field.name for field in found if any(is_text(field.type) for is_text in _TEXTS)]
    if texts:  # as numbers into the different texts, which cost no more than the file's own pages
        file = _opened(data, texts)
    table = file.read(columns=columns, use_threads=False)
    filled = 0
    for column in table.columns:
        for chunk in column.chunks if pa.types.is_dictionary(column.type) else ():
            filled += pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0
    if filled > MOST_BYTES:
        raise ValueError(f"expected a table of at most {MOST_BYTES} bytes, found texts of {filled}")
    wanted = pa.schema([found.field(name) for name in table.schema.names])
    return table.cast(wanted.with_metadata(found.metadata))


def parquet_batches(data: Path, *, columns: Sequence[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a Parquet file that may be larger than memory; raises as `read_parquet`."""
    yield from _opened(data).iter_batches(batch_size=batch_rows, columns=list(columns), use_threads=False)


def parquet_columns(data: Path) -> list[str]:
    """Return names of a Parquet file's columns; raises as `read_parquet`."""
    return list(_opened(data).schema_arrow.names)


def parquet_metadata(data: Path) -> dict[bytes, bytes]:
    """Return a Parquet file's own metadata; raises as `read_parquet`."""
    return dict(_opened(data).schema_arrow.metadata or {})


def _opened(data: bytes | Path, texts: Sequence[str] = ()) -> pq.ParquetFile:
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    return pq.ParquetFile(source, pre_buffer=False, read_dictionary=list(texts), page_checksum_verification=True)


def sample_key(sample_id: str) -> str:
    """``<slug>-<xxh3-64 of the id>``: readable, at most 77 of ``[a-z0-9_-]``, one for one with the id.

    Dots would split the key, spaces and other alphabets break some readers; the original name stays in the JSON.
    """
    plain = unicodedata.normalize("NFKD", sample_id).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9_]+", "-", plain).strip("-")[:60].strip("-")
    return f"{slug or 'sample'}-{id_hash(sample_id):016x}"


def id_hash(sample_id: str) -> int:
    """xxh3-64 of a sample's id, which its key ends with."""
    return xxhash.xxh3_64_intdigest(sample_id.encode("utf-8", "surrogateescape"))


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


def member_checksum(data: bytes) -> int:
    """xxh3-64 of a whole member."""
    return xxhash.xxh3_64_intdigest(data)


def frame_checksum(data: bytes | memoryview) -> int:
    """xxh32 of one frame's JPEG bytes."""
    return xxhash.xxh32_intdigest(data)


def encode_index(rows: Sequence[Mapping[str, Any]], metadata: Mapping[str, str]) -> bytes:
    """Return parquet bytes of the index of one shard; the same rows give the same bytes.

    `metadata` (text) goes into the Parquet schema: what the writer needs to resume behind this shard.
    """
    schema = INDEX_SCHEMA.with_metadata({name: value.encode() for name, value in metadata.items()})
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist([dict(row) for row in rows], schema=schema),
        sink,
        compression="zstd",
        use_dictionary=False,
        column_encoding=dict.fromkeys(("frame_bytes.list.element", "frame_ticks.list.element"), "DELTA_BINARY_PACKED"),
    )
    return sink.getvalue()


def decode_index(data: bytes, *, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the table of an index file's bytes, checked to have this format's schema; `columns` alone, or all.

    Raises:
        pa.ArrowException: the bytes are not Parquet.
        ValueError: another schema, or more than an index holds.
        OSError: its pages are damaged.
    """
    return read_parquet(data, schema=INDEX_SCHEMA, columns=columns)
