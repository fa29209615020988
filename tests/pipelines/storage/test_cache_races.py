"""Several readers of one cached shard: damage that another has repaired, and eviction under a reader."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipelines.errors import SampleDamageError
from pipelines.storage.remote import ShardCache, open_files
from pipelines.storage.samples import FetchedSample, SampleReader
from pipelines.threads import StatsRecorder
from sharding.format.remote import StorageConfig
from sharding.format.shard_set import ShardSet, read_shard_set
from support.fake_shards import flip_byte, make_samples, make_shard_set, members_of
from support.flaky_storage import put_in_memory

SHARD = "ca2st-000000.tar"
SIZE = 1000


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[ShardSet]:
    """3 samples in a shard behind a URL."""
    local = make_shard_set(tmp_path / "local", make_samples(3, num_frames=3, height=24, width=32))
    url = f"memory://{tmp_path.parent.name}-{tmp_path.name}/set"
    put_in_memory(local.root, url)
    yield read_shard_set(url, storage=StorageConfig(cache_dir=str(tmp_path / "cache")))
    fsspec.filesystem("memory").rm(url.removeprefix("memory:/"), recursive=True)


def test_p1_who_read_a_damaged_copy_reads_again_although_a_neighbour_was_first_to_replace_it(
    remote: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = StatsRecorder()
    reader = SampleReader(remote, stats)
    entry = reader.indexes.entry(0, 1)
    expected = reader.fetch(entry, [0, 1])
    offset, size = members_of(remote.root / SHARD)["clip-0001.mel.npy"]
    flip_byte(remote.root / SHARD, offset + size // 2)
    check, neighbours = SampleReader._checked, list[threading.Thread]()

    def check_after_a_neighbour(self: SampleReader, *read: Any) -> FetchedSample:
        try:
            return check(self, *read)
        except SampleDamageError:
            if not neighbours:
                neighbours.append(threading.Thread(target=lambda: reader.fetch(entry, [0])))
                neighbours[0].start()
                neighbours[0].join()
            raise

    monkeypatch.setattr(SampleReader, "_checked", check_after_a_neighbour)
    assert reader.fetch(entry, [0, 1]).frames == expected.frames
    assert len(neighbours) == 1
    assert stats.snapshot().cache_misses == 3, "index, shard, and the shard once again: not once for each reader"


def test_p1_a_cached_copy_that_the_disk_damaged_is_fetched_again_where_whole_shards_are_hashed(
    remote: ShardSet,
) -> None:
    stats = StatsRecorder()
    files, shard = open_files(remote, stats, verify="sha256"), remote.shards[0]
    with files.opened(shard) as opened:
        expected = opened.read(0, shard.bytes)
    flip_byte(remote.root / SHARD, 700)
    with files.opened(shard) as opened:
        assert opened.read(0, shard.bytes) == expected
    assert stats.snapshot().cache_misses == 2


_EVICTS = """
import os, pathlib, sys
from pipelines.storage.remote import ShardCache
cache = ShardCache(pathlib.Path(sys.argv[1]), most_bytes=2000)
for number in range(1, 4):
    path = pathlib.Path(sys.argv[1]) / "set" / f"ca2st-{number:06d}.tar"
    os.close(cache.open(path, 1000, lambda descriptor: os.write(descriptor, b"y" * 1000) and None))
"""


def test_another_process_evicts_what_it_can_and_never_what_is_read_here(tmp_path: Path) -> None:
    cache, path = ShardCache(tmp_path, most_bytes=2 * SIZE), tmp_path / "set" / SHARD
    held = cache.open(path, SIZE, lambda descriptor: os.write(descriptor, b"x" * SIZE) and None)
    try:
        subprocess.run([sys.executable, "-c", _EVICTS, str(tmp_path)], check=True, cwd=Path(__file__).parents[3])
        assert sorted(file.name for file in (tmp_path / "set").iterdir()) == [SHARD, "ca2st-000003.tar"]
        assert os.pread(held, SIZE, 0) == b"x" * SIZE
    finally:
        os.close(held)
