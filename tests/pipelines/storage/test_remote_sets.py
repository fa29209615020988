"""Shard sets behind a URL: the batches of the local set, through a cache that may be smaller than the data."""

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from ca2st.errors import EnvironmentFault, UserInputError
from ca2st.spec import ClipSpec
from pipelines.config import EvaluationSetup, LoaderConfig, TrainSetup
from pipelines.errors import SampleDamageError, ShardSetDamageError
from pipelines.loader import EvaluationLoader, TrainLoader
from pipelines.storage.remote import CachedShards
from pipelines.threads import StageStats, StatsRecorder
from sharding.errors import ManifestError, ShardDamageError
from sharding.format.remote import RemoteFiles, RemoteFolder, Retrier, RetryConfig, StorageConfig
from sharding.format.shard_set import ShardSet, read_shard_set
from sharding.verify import count_shards, verify_place
from support.fake_shards import flip_byte, make_samples, make_shard_set, members_of
from support.flaky_storage import FakeTime, FlakyStorage, http_server, put_in_memory

TINY: dict[str, Any] = {"num_frames": 3, "height": 24, "width": 32}
NO_PAUSE = RetryConfig(first_pause_seconds=0.0)


@pytest.fixture
def clip() -> ClipSpec:
    return ClipSpec(num_frames=2, crop_size=16, mel_rows=16)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """24 samples in 8 shards."""
    return make_shard_set(tmp_path_factory.mktemp("local"), make_samples(24, **TINY), samples_per_shard=3)


@pytest.fixture
def url(local: ShardSet, tmp_path: Path) -> Iterator[str]:
    place = f"memory://{tmp_path.parent.name}-{tmp_path.name}/set"
    put_in_memory(local.root, place)
    yield place
    fsspec.filesystem("memory").rm(place.removeprefix("memory:/"), recursive=True)


def largest(shard_set: ShardSet) -> int:
    return max(shard.bytes + shard.index_bytes for shard in shard_set.shards)


def storage(tmp_path: Path, cache_bytes: int | None = None) -> StorageConfig:
    return StorageConfig(cache_dir=str(tmp_path / "cache"), cache_bytes=cache_bytes, retry=NO_PAUSE)


def trained(
    shard_set: ShardSet, clip: ClipSpec, **config: Any
) -> tuple[list[tuple[tuple[str, ...], torch.Tensor]], StageStats]:
    """Keys and pixels of an epoch, and what the loader counted."""
    settings = LoaderConfig(backend="reference", num_lanes=2, shuffle_block=6, **config)
    setup = TrainSetup(
        shard_sets=[shard_set], clip=clip, targets=("label",), loader=settings, seed=3, global_batch_size=4
    )
    with TrainLoader(setup) as loader:
        batches = [(batch.sample_ids, batch.video) for batch in loader.batches(0)]
        return batches, loader.stats


def scored(shard_set: ShardSet, clip: ClipSpec) -> list[str]:
    settings = LoaderConfig(backend="reference", fetch_threads=2)
    setup = EvaluationSetup(shard_set=shard_set, clip=clip, targets=("label",), loader=settings, global_batch_size=4)
    with EvaluationLoader(setup) as loader:
        assert loader.sample_ids() == [f"clip-{number:04d}" for number in range(24)]
        return [key for batch in loader.batches() for key in batch.sample_ids]


@pytest.mark.parametrize("shards_that_fit", [1.1, 3.0, 100.0])
def test_batches_equal_those_of_the_local_set_whatever_the_cache_holds(
    local: ShardSet, url: str, clip: ClipSpec, tmp_path: Path, shards_that_fit: float
) -> None:
    cache_bytes = int(shards_that_fit * largest(local))
    remote = read_shard_set(url, storage=storage(tmp_path, cache_bytes))
    assert (str(remote.origin), remote.shards, remote.manifest) == (url, local.shards, local.manifest)
    expected, _ = trained(local, clip)
    found, stats = trained(remote, clip)
    assert [keys for keys, _ in found] == [keys for keys, _ in expected]
    assert all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in zip(found, expected, strict=True))
    total = sum(shard.bytes + shard.index_bytes for shard in local.shards)
    held = sum(path.stat().st_size for path in remote.root.iterdir() if path.name.startswith("ca2st-"))
    assert held <= cache_bytes
    assert stats.cache_hits > 0
    if cache_bytes > total:
        assert (stats.cache_misses, stats.downloaded_bytes) == (2 * len(local.shards), total)
    else:
        assert stats.downloaded_bytes >= total > held
    assert not list(remote.root.glob("*.part"))


def test_an_evaluation_over_http_scores_every_sample(local: ShardSet, clip: ClipSpec, tmp_path: Path) -> None:
    with http_server(local.root) as url:
        assert scored(read_shard_set(url, storage=storage(tmp_path)), clip) == scored(local, clip)


def test_a_second_run_on_the_machine_fetches_nothing(local: ShardSet, url: str, clip: ClipSpec, tmp_path: Path) -> None:
    first, _ = trained(read_shard_set(url, storage=storage(tmp_path)), clip)
    second, stats = trained(read_shard_set(url, storage=storage(tmp_path)), clip)
    assert [keys for keys, _ in first] == [keys for keys, _ in second]
    assert (stats.cache_misses, stats.downloaded_bytes) == (0, 0)


def test_the_cache_of_another_manifest_is_never_used(url: str, clip: ClipSpec, tmp_path: Path) -> None:
    trained(before := read_shard_set(url, storage=storage(tmp_path)), clip)
    other = make_shard_set(tmp_path / "other", make_samples(24, **(TINY | {"height": 26})), samples_per_shard=3)
    put_in_memory(other.root, url)
    after = read_shard_set(url, storage=storage(tmp_path))
    assert after.root != before.root
    found, _ = trained(after, clip)
    expected, _ = trained(other, clip)
    assert all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in zip(found, expected, strict=True))


def test_a_cache_smaller_than_a_shard_is_refused_before_the_first_step(
    local: ShardSet, url: str, clip: ClipSpec, tmp_path: Path
) -> None:
    remote = read_shard_set(url, storage=storage(tmp_path, largest(local) - 1))
    message = (
        rf"cache_bytes: expected at least {largest(local)} bytes for the largest shard.*found {largest(local) - 1}"
    )
    with pytest.raises(UserInputError, match=message):
        trained(remote, clip)


# Damage and absence behind a URL.


def change(url: str, name: str, data: bytes | None) -> None:
    memory, path = fsspec.filesystem("memory"), f"{url.removeprefix('memory:/')}/{name}"
    memory.rm(path) if data is None else memory.pipe(path, data)


def test_p2_a_missing_remote_shard_is_named_before_the_first_step(url: str, clip: ClipSpec, tmp_path: Path) -> None:
    remote = read_shard_set(url, storage=storage(tmp_path))
    change(url, "ca2st-000003.tar", None)
    with pytest.raises(ShardSetDamageError, match=rf"{url}: ca2st-000003.tar: cannot be read .No such file"):
        trained(remote, clip)


def test_p2_a_remote_shard_that_vanishes_after_the_start_is_named(
    local: ShardSet, clip: ClipSpec, tmp_path: Path
) -> None:
    with http_server(local.root) as url:
        remote = read_shard_set(url, storage=storage(tmp_path))
        gone = replace(remote, shards=(*remote.shards[:-1], replace(remote.shards[-1], name="ca2st-000099.tar")))
        with pytest.raises(ShardSetDamageError, match=r"ca2st-000099.index.parquet: no such file; copy the set again"):
            trained(gone, clip)


def test_p1_a_remote_shard_of_another_size_is_named_before_the_first_step(
    local: ShardSet, url: str, clip: ClipSpec, tmp_path: Path
) -> None:
    change(url, "ca2st-000002.tar", b"<html>not found</html>")
    with pytest.raises(ShardSetDamageError, match=r"ca2st-000002.tar: expected \d+ bytes, found 22"):
        trained(read_shard_set(url, storage=storage(tmp_path)), clip)


def test_p1_a_shard_damaged_on_the_server_is_fetched_again_and_then_named(
    local: ShardSet, url: str, clip: ClipSpec, tmp_path: Path
) -> None:
    data = bytearray((local.root / "ca2st-000002.tar").read_bytes())
    data[700] ^= 1
    change(url, "ca2st-000002.tar", bytes(data))
    expected = rf"{url}/ca2st-000002.tar: sha256 differs from the shard table's in each of 3 downloads; copy it"
    with pytest.raises(ShardSetDamageError, match=expected):
        trained(read_shard_set(url, storage=storage(tmp_path)), clip)


def test_p3_an_index_damaged_on_the_server_is_named(url: str, clip: ClipSpec, local: ShardSet, tmp_path: Path) -> None:
    data = bytearray((local.root / "ca2st-000004.index.parquet").read_bytes())
    data[40] ^= 1
    change(url, "ca2st-000004.index.parquet", bytes(data))
    with pytest.raises(ShardSetDamageError, match=r"ca2st-000004.index.parquet: sha256 differs .* 3 downloads"):
        trained(read_shard_set(url, storage=storage(tmp_path)), clip)


def flaky_files(local: ShardSet, tmp_path: Path, **behaviour: Any) -> tuple[CachedShards, StatsRecorder, ShardSet]:
    """A set on storage that fails as it is asked to, without a pause."""
    files = {f"bucket/set/{path.name}": path.read_bytes() for path in local.root.iterdir()}
    time, stats, folder = FakeTime(), StatsRecorder(), RemoteFolder("s3://bucket/set")
    retrier = Retrier(on_retry=lambda: stats.add("retries", 1), clock=time.clock, sleep=time.sleep)
    reader = RemoteFiles(folder=folder, retrier=retrier, filesystem=FlakyStorage(files, **behaviour))
    remote = replace(local, root=tmp_path / "cache" / "set", origin=folder, storage=storage(tmp_path))
    return CachedShards(remote, stats, files=reader), stats, remote


def test_p9_a_set_on_storage_that_fails_one_read_in_twenty_arrives_whole(local: ShardSet, tmp_path: Path) -> None:
    files, stats, _ = flaky_files(local, tmp_path, fail=lambda call: None if call % 20 else ConnectionResetError())
    for _ in range(3):
        for shard in local.shards:
            with files.opened(shard) as opened:
                assert opened.read(0, shard.bytes) == (local.root / shard.name).read_bytes()
            assert files.read_index(shard) == (local.root / shard.index_name).read_bytes()
            files.release(shard)
    assert stats.snapshot().retries == 0, "16 reads"
    assert stats.snapshot().cache_hits == 32


def test_p9_a_download_with_a_flipped_bit_is_fetched_again_and_counted(local: ShardSet, tmp_path: Path) -> None:
    files, stats, _ = flaky_files(
        local, tmp_path, change=lambda call, data: bytes([data[0] ^ 1]) + data[1:] if call == 1 else data
    )
    with files.opened(local.shards[0]) as opened:
        assert opened.read(0, local.shards[0].bytes) == (local.root / local.shards[0].name).read_bytes()
    assert (stats.snapshot().retries, stats.snapshot().cache_misses) == (1, 1)


def test_p1_a_cached_copy_that_the_disk_damaged_is_fetched_again_and_the_run_goes_on(
    local: ShardSet, url: str, clip: ClipSpec, tmp_path: Path
) -> None:
    remote = read_shard_set(url, storage=storage(tmp_path))
    expected, _ = trained(remote, clip)
    for shard in remote.shards:
        offset, size = members_of(remote.root / shard.name)[f"clip-{int(shard.name[8:12]) * 3:04d}.mel.npy"]
        flip_byte(remote.root / shard.name, offset + size // 2)
    flip_byte(remote.root / remote.shards[0].index_name, 40)
    found, stats = trained(remote, clip)
    assert all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in zip(found, expected, strict=True))
    assert stats.cache_misses == len(remote.shards) + 1


def test_a_sample_that_was_written_damaged_is_named_although_every_hash_is_right(
    clip: ClipSpec, tmp_path: Path
) -> None:
    edits = {"clip-0001": {"mel_xxh64": 1}}
    written = make_shard_set(tmp_path / "set", make_samples(4, **TINY), row_edits=edits)
    with http_server(written.root) as url, pytest.raises(SampleDamageError, match=r"sample clip-0001, mel.npy"):
        trained(read_shard_set(url, storage=storage(tmp_path)), clip)


def test_a_url_without_a_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"memory://nowhere/set/manifest.json: no such file; is it the URL"):
        read_shard_set("memory://nowhere/set", storage=storage(tmp_path))


def test_p1_a_damaged_remote_shard_table_is_named(url: str, tmp_path: Path) -> None:
    change(url, "shards.parquet", b"PAR1")
    with pytest.raises(ShardDamageError, match=r"set/shards.parquet: sha256 differs from the manifest's"):
        read_shard_set(url, storage=storage(tmp_path))
    change(url, "shards.parquet", None)
    with pytest.raises(ShardDamageError, match=r"set/shards.parquet: named by manifest.json but missing"):
        read_shard_set(url, storage=storage(tmp_path))


def test_a_cache_folder_that_cannot_be_made_is_named(url: str, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(EnvironmentFault, match=r"cannot be made .*set loader.cache_dir"):
        read_shard_set(url, storage=storage(tmp_path))


def test_p14_a_remote_shard_name_that_leads_elsewhere_is_refused(
    local: ShardSet, clip: ClipSpec, tmp_path: Path
) -> None:
    with http_server(local.root) as url:
        remote = read_shard_set(url, storage=storage(tmp_path))
        hostile = replace(remote, shards=(replace(remote.shards[0], name="../../etc/x.tar"), *remote.shards[1:]))
        with pytest.raises(ShardSetDamageError, match=r"'../../etc/x.tar' is not a plain file name"):
            trained(hostile, clip)


def test_nothing_secret_is_logged(
    local: ShardSet,
    url: str,
    clip: ClipSpec,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    with caplog.at_level(logging.DEBUG):
        trained(read_shard_set(url, storage=storage(tmp_path)), clip)
    assert "hush-hush" not in caplog.text


# Verification behind a URL.


def test_verification_of_an_intact_url_finds_nothing(url: str) -> None:
    assert (verify_place(url), count_shards(url)) == ([], 8)


def test_verification_of_a_url_names_the_sample_and_the_files(local: ShardSet, url: str) -> None:
    data = bytearray((local.root / "ca2st-000002.tar").read_bytes())
    offset, size = members_of(local.root / "ca2st-000002.tar")["clip-0007.mel.npy"]
    data[offset + size // 2] ^= 1
    change(url, "ca2st-000002.tar", bytes(data))
    change(url, "ca2st-000004.tar", None)
    change(url, "ca2st-000005.tar", b"short")
    change(url, "ca2st-000006.tar", (local.root / "ca2st-000006.tar").read_bytes() + b"more")
    change(url, "notes.txt", b"hello")
    problems = verify_place(url)
    assert {problem.shard for problem in problems} == {f"ca2st-00000{n}.tar" for n in (2, 4, 5, 6)} | {"notes.txt"}
    told = {(problem.shard, problem.key, problem.what.partition(" ")[0]) for problem in problems}
    assert ("ca2st-000002.tar", "clip-0007", "mel.npy:") in told
    what = {problem.shard: problem.what for problem in problems}
    assert "No such file" in what["ca2st-000004.tar"]
    assert "found 5; copy it again" in what["ca2st-000005.tar"]


def test_verification_of_a_url_without_a_manifest_is_refused(url: str) -> None:
    change(url, "manifest.json", None)
    assert count_shards(url) == 0
    with pytest.raises(ManifestError, match=f"^{re.escape(url)}/manifest.json: no such file"):
        verify_place(url)
