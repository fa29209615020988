"""Rows of an index: what was written, however the table is cut, and never with a place left empty."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.errors import SampleDamageError, ShardSetDamageError
from pipelines.storage.index import ShardIndex, ShardIndexCache
from pipelines.storage.shard_files import ShardFiles
from sharding.format.index import decode_index
from sharding.format.shard_set import ShardSet
from sharding.media.codecs import stored_codec
from support.fake_shards import FakeSample, make_samples, make_shard_set


@pytest.mark.parametrize("name", ["key", "has_audio", "num_frames", "mel_xxh64", "labels", "frame_bytes"])
def test_p4_an_index_with_a_row_that_has_no_value_is_refused(tmp_path: Path, name: str) -> None:
    shard_set = make_shard_set(tmp_path, make_samples(2), row_edits={"clip-0001": {name: None}})
    message = rf"000000.index.parquet: {name}: expected a value in every row, found 1 empty places; convert"
    with pytest.raises(ShardSetDamageError, match=message):
        ShardIndexCache(ShardFiles(shard_set), most_bytes=1 << 20).entry(0, 0)


@pytest.mark.parametrize("name", ["labels", "frame_bytes", "frame_ticks", "frame_xxh32"])
def test_p4_an_index_with_empty_places_in_a_list_is_refused(tmp_path: Path, name: str) -> None:
    shard_set = make_shard_set(tmp_path, make_samples(2), row_edits={"clip-0001": {name: [1, None, None]}})
    with pytest.raises(ShardSetDamageError, match=rf"{name}: expected a value in every row, found 2 empty places"):
        ShardIndexCache(ShardFiles(shard_set), most_bytes=1 << 20).entry(0, 0)


def index_of(shard_set: ShardSet, table: pa.Table) -> ShardIndex:
    return ShardIndex(shard_set.shards[0], table, num_labels=1, codec=stored_codec("mjpeg"))


def test_every_row_is_as_it_was_written_however_the_table_is_cut(tmp_path: Path) -> None:
    samples = [FakeSample(key=f"clip-{n}", labels=(n % 3,), num_frames=n + 1, seed=n) for n in range(5)]
    samples[3] = FakeSample(key="quiet", labels=(1,), num_frames=2, mel_rows=0)
    shard_set = make_shard_set(tmp_path, samples, samples_per_shard=5)
    table = decode_index((tmp_path / shard_set.shards[0].index_name).read_bytes())
    cut = pa.concat_tables([table.slice(0, 1), table.slice(1, 3), table.slice(4)])
    for index in (index_of(shard_set, table), index_of(shard_set, cut)):
        for row, written in enumerate(table.to_pylist()):
            entry = index.entry(row)
            scalars = {name: value for name, value in asdict(entry).items() if name in written}
            for name in ("labels", "frame_ticks", "frame_xxh32"):
                assert list(scalars.pop(name)) == written[name]
            assert {name: (value, type(value)) for name, value in scalars.items()} == {
                name: (written[name], type(written[name])) for name in scalars
            }
            assert len(scalars) == 9
            assert np.diff(entry.frame_offsets).tolist() == written["frame_bytes"]
            assert entry.frame_offsets[0] == written["video_offset"] + written["frame_data_offset"]
            assert not entry.frame_ticks.flags.writeable


def test_frame_times_that_go_back_by_more_than_31_bits_hold_are_refused(tmp_path: Path) -> None:
    edits: dict[str, Any] = {"clip-0001": {"frame_ticks": [0, *[2**31 - 1] * 18, -(2**31)]}}
    shard_set = make_shard_set(tmp_path, make_samples(2), row_edits=edits)
    with pytest.raises(SampleDamageError, match="expected frame times >= 0 that never go back; convert"):
        ShardIndexCache(ShardFiles(shard_set), most_bytes=1 << 20).entry(0, 1)


def test_sizes_that_only_together_pass_32_bits_are_added_up_rightly(tmp_path: Path) -> None:
    huge: dict[str, Any] = {"frame_bytes": [2**32 - 1] * 20}
    shard_set = make_shard_set(tmp_path, make_samples(2), row_edits={"clip-0001": huge})
    with pytest.raises(SampleDamageError, match="expected frames inside the video; convert"):
        ShardIndexCache(ShardFiles(shard_set), most_bytes=1 << 20).entry(0, 1)
