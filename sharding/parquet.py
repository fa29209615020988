"""The one reader of Parquet files: without any thread of Arrow's, and within bounds that are checked before it reads.

Arrow starts its thread pools at the first threaded read and leaves them to the process's end, where a busy machine
now and then aborted an otherwise finished command ("terminate called without an active exception"). Indexes are a
few megabytes: nothing is gained by threads. And a small file can unpack to any size: its footer says how many values
it claims, and repeated texts are kept as numbers until it is known what they would fill.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

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
    most_bytes: int = MOST_BYTES,
) -> pa.Table:
    """The table of a Parquet file, given by its bytes or its path.

    Args:
        data: The file.
        columns: Read these only; None: all.
        schema: Columns and types that the file must have; None: any.
        num_rows: Rows that it must have; None: any number within the bound.
        most_bytes: Bound of the memory that the table may fill.

    Raises:
        pa.ArrowException: not Parquet.
        ValueError: other rows than `num_rows`, another schema, a column is missing, or more than `most_bytes`.
        OSError: the file cannot be read, or its pages are damaged.
    """
    file = _opened(data)
    _check_claims(file.metadata, num_rows=num_rows, most_bytes=most_bytes)
    found = file.schema_arrow
    if schema is not None and not found.equals(schema):
        raise ValueError(f"expected the columns {schema.names}, found {found.names}, or other types")
    if missing := sorted(set(columns or ()) - set(found.names)):
        raise ValueError(f"expected the columns {', '.join(columns or ())}, found no {', '.join(missing)}")
    texts = [field.name for field in found if any(is_text(field.type) for is_text in _TEXTS)]
    if texts:  # as numbers into the different texts, which cost no more than the file's own pages
        file = _opened(data, texts)
    table = file.read(columns=columns, use_threads=False)
    _check_texts(table, most_bytes=most_bytes)
    wanted = pa.schema([found.field(name) for name in table.schema.names])
    return table.cast(wanted.with_metadata(found.metadata))


def parquet_batches(data: Path, *, columns: Sequence[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file that may be larger than memory; raises as `read_parquet`."""
    yield from _opened(data).iter_batches(batch_size=batch_rows, columns=list(columns), use_threads=False)


def parquet_columns(data: Path) -> list[str]:
    """Names of a Parquet file's columns; raises as `read_parquet`."""
    return list(_opened(data).schema_arrow.names)


def _opened(data: bytes | Path, texts: Sequence[str] = ()) -> pq.ParquetFile:
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    return pq.ParquetFile(source, pre_buffer=False, read_dictionary=list(texts))


def _check_claims(footer: pq.FileMetaData, *, num_rows: int | None, most_bytes: int) -> None:
    if num_rows is not None and footer.num_rows != num_rows:
        raise ValueError(f"expected {num_rows} rows, found {footer.num_rows}")
    # Not what its column chunks claim: of a damaged footer, asking for those aborts the process.
    if not 0 <= (claimed := footer.num_rows * footer.num_columns * _VALUE_BYTES) <= most_bytes:
        raise ValueError(f"expected a table of at most {most_bytes} bytes, found one that claims {claimed}")


def _check_texts(table: pa.Table, *, most_bytes: int) -> None:
    filled = 0
    for column in table.columns:
        if pa.types.is_dictionary(column.type):
            for chunk in column.chunks:
                lengths = pc.binary_length(chunk.dictionary)
                filled += pc.sum(lengths.take(chunk.indices)).as_py() or 0
    if filled > most_bytes:
        raise ValueError(f"expected a table of at most {most_bytes} bytes, found texts of {filled}")
