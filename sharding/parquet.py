"""Small Parquet files held in memory, read without any thread of Arrow's.

Arrow starts its thread pools at the first threaded read and leaves them to the process's end, where a busy machine
now and then aborted an otherwise finished command ("terminate called without an active exception"). Indexes are a
few megabytes: nothing is gained by threads.
"""

import io

import pyarrow as pa
import pyarrow.parquet as pq


def read_parquet(data: bytes) -> pa.Table:
    """The table of a Parquet file's bytes.

    Raises:
        pa.ArrowException: the bytes are not Parquet.
    """
    return pq.ParquetFile(io.BytesIO(data), pre_buffer=False).read(use_threads=False)
