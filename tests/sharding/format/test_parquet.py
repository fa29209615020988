"""The one Parquet reader: no threads, and no table larger than its bounds, whatever a file claims."""

import io
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharding.format.index import parquet_batches, parquet_columns, read_parquet


def parquet(table: pa.Table, **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


TABLE = pa.table(
    {"key": ["b", "a", "b"], "values": [[1, 2], [], [3]], "share": [0.5, None, 1.0]}
).replace_schema_metadata({"who": "us"})


def test_a_table_comes_back_as_it_was_written_whole_or_by_columns(tmp_path: Path) -> None:
    data = parquet(TABLE)
    assert read_parquet(data).to_pydict() == TABLE.to_pydict()
    assert read_parquet(data).schema.metadata == {b"who": b"us"}
    assert read_parquet(data, columns=["share", "key"]).to_pydict() == TABLE.select(["share", "key"]).to_pydict()
    (tmp_path / "t.parquet").write_bytes(data)
    assert read_parquet(tmp_path / "t.parquet", num_rows=3, schema=TABLE.schema).num_rows == 3
    assert parquet_columns(tmp_path / "t.parquet") == ["key", "values", "share"]
    batches = parquet_batches(tmp_path / "t.parquet", columns=["key"], batch_rows=2)
    assert [batch.column(0).to_pylist() for batch in batches] == [["b", "a"], ["b"]]


def test_other_rows_columns_or_types_than_expected_are_refused() -> None:
    data = parquet(TABLE)
    with pytest.raises(ValueError, match="expected 2 rows, found 3"):
        read_parquet(data, num_rows=2)
    with pytest.raises(ValueError, match="expected the columns kez, found no kez"):
        read_parquet(data, columns=["kez"])
    with pytest.raises(ValueError, match=r"expected the columns \['key'\], found \['key', 'values', 'share'\]"):
        read_parquet(data, schema=pa.schema([("key", pa.string())]))
    with pytest.raises(pa.ArrowException):
        read_parquet(data[:-3])


def repeated_text() -> pa.Table:
    """10 GB of text."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * 100_000]))
    return pa.table({"name": text})


def many_rows() -> pa.Table:
    """8 GB of numbers."""
    return pa.concat_tables([pa.table({"n": pa.array([7] * 1_000_000, pa.int8())})] * 1000)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (repeated_text, "texts of 10000000000"),
        (many_rows, "one that claims 8000000000"),
    ],
)
def test_a_small_file_that_unpacks_to_gigabytes_is_refused_before_it_does(make: object, words: str) -> None:
    assert callable(make)
    data = parquet(make(), compression="zstd")
    assert len(data) < 5_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"expected a table of at most 2147483648 bytes, found .*{words}"):
        read_parquet(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "KiB"


def test_reading_and_sorting_start_no_native_thread(tmp_path: Path) -> None:
    """Arrow's pools, once started, can abort a finished process at its exit."""
    (tmp_path / "t.parquet").write_bytes(parquet(pa.concat_tables([TABLE] * 1000)))
    script = (
        "import os, sys, pathlib; from sharding.format.index import *; path = pathlib.Path(sys.argv[1])\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "read_parquet(path); read_parquet(path.read_bytes(), columns=['key'])\n"
        "list(parquet_batches(path, columns=['values'], batch_rows=100))\n"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "t.parquet")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0"
