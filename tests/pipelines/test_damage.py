"""Rows P1 to P4 and P14: damaged, missing, contradictory or hostile shard sets are named, never read in silence."""

import ast
import dataclasses
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ca2st.errors import DataDamageError
from ca2st.spec import ClipSpec
from pipelines.config import EvaluationSetup, LoaderConfig
from pipelines.errors import SampleDamageError, ShardSetDamageError
from pipelines.loader import EvaluationLoader
from pipelines.storage.index import ShardIndexCache
from pipelines.storage.samples import SampleReader, coalesce, jpeg_size, parse_mel
from pipelines.storage.shard_files import ShardFiles, Verify
from pipelines.threads import StatsRecorder
from sharding.format.shard_set import ShardSet
from support.fake_shards import FakeSample, flip_byte, make_samples, make_shard_set, members_of, rewrite_manifest

FIRST, SECOND = "ca2st-000000.tar", "ca2st-000001.tar"


def evaluation(shard_set: ShardSet, clip: ClipSpec, *, verify: Verify = "size") -> EvaluationLoader:
    config = LoaderConfig(backend="reference", verify=verify, fetch_threads=2)
    return EvaluationLoader(
        EvaluationSetup(shard_set=shard_set, clip=clip, targets=("label",), loader=config, global_batch_size=4)
    )


def read_all(shard_set: ShardSet, clip: ClipSpec, *, verify: Verify = "size") -> list[str]:
    with evaluation(shard_set, clip, verify=verify) as loader:
        return [
            key
            for batch in loader.batches()
            for key, padding in zip(batch.sample_ids, batch.is_padding.tolist(), strict=True)
            if not padding
        ]


def overwrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


# P1: every damage of the table that changes the size of a shard is found before the first step.


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[: len(data) // 1024 * 512],
        lambda data: data[:-1],
        lambda data: data[:700],
        lambda data: b"<html>not found</html>",
        lambda data: b"",
        lambda data: b"\0" * 1024,
        lambda data: data + data,
    ],
    ids=["cut in half", "one byte short", "cut in a header", "HTML page", "empty file", "empty archive", "doubled"],
)
def test_p1_a_shard_of_another_size_is_named_before_the_first_step(
    fresh_set: ShardSet, clip: ClipSpec, change: Callable[[bytes], bytes]
) -> None:
    overwrite(fresh_set.root / SECOND, change)
    with pytest.raises(ShardSetDamageError, match=rf"{SECOND}: expected \d+ bytes, found \d+.*shard verify"):
        evaluation(fresh_set, clip)


def test_p1_a_flipped_byte_in_a_frame_is_named_with_shard_key_frame_and_offset(fresh_set: ShardSet) -> None:
    reader = SampleReader(fresh_set)
    entry = reader.indexes.entry(1, 2)
    offset = int(entry.frame_offsets[5])
    flip_byte(fresh_set.root / SECOND, offset + 30)
    expected = f"{SECOND}, sample {entry.key}, frame 5 at byte {offset} .*expected xxh32 .*restore it"
    with pytest.raises(SampleDamageError, match=expected):
        reader.fetch(entry, [4, 5, 6])
    assert set(reader.fetch(entry, [4, 6]).frames) == {4, 6}


def test_p1_a_flipped_byte_in_a_spectrogram_is_named_with_shard_key_and_offset(
    fresh_set: ShardSet, clip: ClipSpec
) -> None:
    offset, size = members_of(fresh_set.root / FIRST)["clip-0001.mel.npy"]
    flip_byte(fresh_set.root / FIRST, offset + size // 2)
    with pytest.raises(
        SampleDamageError, match=f"{FIRST}, sample clip-0001, mel.npy at byte {offset} .*xxh3-64"
    ) as found:
        read_all(fresh_set, clip)
    assert found.value.__notes__ == ["raised by the loader of rank 0 of 1"]


@pytest.fixture(scope="module")
def flipped_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """As `fresh_set`; whoever damages it repairs it."""
    return make_shard_set(tmp_path_factory.mktemp("flipped"), make_samples(8, num_frames=12))


@settings(max_examples=60)
@given(shard=st.integers(0, 1), row=st.integers(0, 3), part=st.sampled_from(["frames", "mel"]), place=st.floats(0, 1))
def test_p1_any_flipped_byte_of_what_is_read_is_found(
    flipped_set: ShardSet, shard: int, row: int, part: str, place: float
) -> None:
    reader = SampleReader(flipped_set)
    entry = reader.indexes.entry(shard, row)
    first, end = (int(entry.frame_offsets[0]), int(entry.frame_offsets[-1]))
    if part == "mel":
        first, end = entry.mel_offset, entry.mel_offset + entry.mel_bytes
    path, offset = flipped_set.root / entry.shard.name, first + int(place * (end - 1 - first))
    flip_byte(path, offset)
    try:
        with pytest.raises(SampleDamageError, match=entry.key):
            reader.fetch(entry, range(entry.num_frames))
    finally:
        flip_byte(path, offset)
    reader.fetch(entry, range(entry.num_frames))


def test_p1_a_flipped_bit_in_a_tar_header_loses_no_sample_and_is_named_where_sha256_is_asked(
    fresh_set: ShardSet, clip: ClipSpec
) -> None:
    whole = read_all(fresh_set, clip)
    flip_byte(fresh_set.root / SECOND, 3)
    assert read_all(fresh_set, clip) == whole
    with pytest.raises(ShardSetDamageError, match=f"{SECOND}: sha256 differs"):
        read_all(fresh_set, clip, verify="sha256")


def test_p1_sha256_accepts_an_intact_set_and_hashes_a_shard_once(
    fresh_set: ShardSet, clip: ClipSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []
    real = __import__("hashlib").file_digest
    monkeypatch.setattr("hashlib.file_digest", lambda *args: hashed.append(1) or real(*args))
    assert len(read_all(fresh_set, clip, verify="sha256")) == 8
    assert len(hashed) == 2


# P2: shards that vanish or shrink.


def test_p2_a_missing_shard_is_named_before_the_first_step(fresh_set: ShardSet, clip: ClipSpec) -> None:
    (fresh_set.root / SECOND).unlink()
    with pytest.raises(ShardSetDamageError, match=f"{SECOND}: cannot be read .No such file"):
        evaluation(fresh_set, clip)


def test_p2_a_shard_removed_after_the_start_is_named(fresh_set: ShardSet, clip: ClipSpec) -> None:
    with evaluation(fresh_set, clip) as loader:
        (fresh_set.root / SECOND).unlink()
        with pytest.raises(ShardSetDamageError, match=f"{SECOND}: cannot be opened .No such file"):
            list(loader.batches())


def test_p2_a_shard_cut_while_open_is_an_error_and_no_crash(fresh_set: ShardSet) -> None:
    reader = SampleReader(fresh_set)
    entry = reader.indexes.entry(1, 3)
    reader.fetch(entry, [0])
    with (fresh_set.root / SECOND).open("r+b") as file:
        file.truncate(entry.mel_offset + 10)
    with pytest.raises(
        ShardSetDamageError, match=rf"{SECOND}: expected \d+ bytes at byte {entry.mel_offset}, found 10"
    ):
        reader.fetch(entry, [0])


def test_only_the_first_problems_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    shard_set = make_shard_set(tmp_path, make_samples(8, num_frames=1), samples_per_shard=1)
    for shard in shard_set.shards:
        (tmp_path / shard.name).write_bytes(b"")
    with pytest.raises(ShardSetDamageError, match=r"ca2st-000004.tar.*and 3 more"):
        ShardFiles(shard_set).check()


# P3: indexes that are not the shard's.


def test_p3_a_damaged_index_is_named(fresh_set: ShardSet, clip: ClipSpec) -> None:
    flip_byte(fresh_set.root / "ca2st-000001.index.parquet", 40)
    with pytest.raises(ShardSetDamageError, match=r"ca2st-000001.index.parquet: sha256 differs"):
        read_all(fresh_set, clip)


def test_p3_the_index_of_another_shard_is_refused(fresh_set: ShardSet, clip: ClipSpec) -> None:
    other = (fresh_set.root / "ca2st-000000.index.parquet").read_bytes()
    (fresh_set.root / "ca2st-000001.index.parquet").write_bytes(other)
    with pytest.raises(ShardSetDamageError, match=r"ca2st-000001.index.parquet: (sha256 differs|expected \d+ bytes)"):
        read_all(fresh_set, clip)


def test_p3_a_missing_index_is_named(fresh_set: ShardSet, clip: ClipSpec) -> None:
    (fresh_set.root / "ca2st-000000.index.parquet").unlink()
    with pytest.raises(ShardSetDamageError, match=r"ca2st-000000.index.parquet: cannot be read"):
        evaluation(fresh_set, clip)


# P4: samples that contradict themselves although every hash is right: a faulty or hostile writer.


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"mel_bytes": 0}, "a spectrogram, not empty"),
        ({"mel_offset": 1 << 40}, "a spectrogram, not empty, inside the shard"),
        ({"video_bytes": 0}, "frames inside the video"),
        ({"video_offset": 1 << 40}, "a video inside the shard"),
        ({"video_offset": -1}, "byte ranges of whole numbers >= 0"),
        ({"frame_bytes": [], "frame_ticks": [], "frame_xxh32": [], "num_frames": 0}, "at least one frame"),
        ({"num_frames": 9}, "as many sizes, times and checksums as num_frames"),
        ({"frame_ticks": list(range(12, 0, -1))}, "frame times >= 0 that never go back"),
        ({"labels": [0, 1]}, "1 labels"),
        ({"key": "../../etc/passwd"}, "a key of"),
        ({"has_audio": False}, "spectrogram rows >= 0, and 0 without audio"),
    ],
)
def test_p4_an_index_row_that_contradicts_itself_is_refused_by_name(
    tmp_path: Path, clip: ClipSpec, edits: dict[str, Any], message: str
) -> None:
    samples = make_samples(4, num_frames=12)
    shard_set = make_shard_set(tmp_path, samples, row_edits={"clip-0002": edits})
    name = edits.get("key", "clip-0002")
    with pytest.raises(SampleDamageError, match=f"ca2st-000000.index.parquet, sample '{name}': expected .*{message}"):
        read_all(shard_set, clip)


@pytest.mark.parametrize("label", [3, -1])
def test_p4_a_label_outside_its_space_is_refused_by_name(tmp_path: Path, clip: ClipSpec, label: int) -> None:
    shard_set = make_shard_set(tmp_path, make_samples(2), row_edits={"clip-0001": {"labels": [label]}})
    with pytest.raises(SampleDamageError, match=f"sample clip-0001: expected a label of 0..2, found {label}"):
        read_all(shard_set, clip)


def test_p4_an_index_with_fewer_rows_than_the_table_says_is_refused(fresh_set: ShardSet, clip: ClipSpec) -> None:
    shards = (dataclasses.replace(fresh_set.shards[0], num_samples=5), fresh_set.shards[1])
    with pytest.raises(ShardSetDamageError, match=r"ca2st-000000.index.parquet: expected 5 rows, found 4"):
        read_all(rewrite_manifest(fresh_set.root, shards), clip)


@pytest.mark.parametrize("bins", [64, 129])
def test_p4_a_spectrogram_of_another_shape_is_refused_by_name(tmp_path: Path, clip: ClipSpec, bins: int) -> None:
    samples = [*make_samples(3), FakeSample(key="odd", num_mel_bins=bins)]
    with pytest.raises(SampleDamageError, match=r"sample odd, mel.npy: expected \(shape, dtype"):
        read_all(make_shard_set(tmp_path, samples), clip)


# P14: hostile content behind right checksums runs no code and reserves no memory.


def npy(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=allow_pickle)
    return sink.getvalue()


def header_only(shape: tuple[int, ...]) -> bytes:
    sink = io.BytesIO()
    np.lib.format.write_array_header_1_0(sink, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return sink.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        npy(np.array([{"code": 1}], dtype=object), allow_pickle=True),
        header_only((1_000_000, 1_000_000)),
        npy(np.zeros((4, 128), np.float32)),
        npy(np.zeros((5, 128), np.float16)),
        npy(np.zeros((4, 128), np.float16))[:-2],
        npy(np.asfortranarray(np.zeros((4, 128), np.float16))),
        b"\x93NUMPY\x01\x00\x04\x00" + b"(((",
        b"\x93NUMPY\x01\x00\x04\x00" + b"(((\n",
        b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"-" * 8998 + b"1\n",
        npy(np.zeros((4, 128), np.float16)).replace(b"NUMPY\x01", b"NUMPY\x02"),
        npy(np.zeros((4, 128), np.float16)).replace(b"NUMPY\x01\x00\x76", b"NUMPY\x01\x00\x75"),
        npy(np.zeros((4, 128), np.float16)).replace(b"(4, 128)", b"(4,128)"),
        npy(np.zeros(512, np.float16)),
        b"\x80\x04not npy",
        b"",
    ],
    ids=[
        "objects",
        "10^12 values",
        "float32",
        "5 rows",
        "cut",
        "Fortran",
        "no header",
        "open",
        "deep",
        "version 2",
        "another size of the header",
        "another spelling",
        "one dimension",
        "pickle",
        "empty",
    ],
)
def test_p14_a_member_that_is_no_float16_spectrogram_of_the_named_shape_is_refused(data: bytes) -> None:
    with pytest.raises(SampleDamageError, match=r"shard, sample x"):
        parse_mel(data, num_rows=4, num_bins=128, where="shard, sample x")


def test_a_right_spectrogram_is_read_unchanged() -> None:
    mel = np.arange(4 * 128, dtype=np.float16).reshape(4, 128)
    assert np.array_equal(parse_mel(npy(mel), num_rows=4, num_bins=128, where="x"), mel)


@pytest.mark.parametrize("shape", [(1, 128), (1000, 64), (0, 128)])
def test_a_header_is_read_without_pythons_parser_whose_state_threads_share(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = npy(np.ones(shape, np.float16))

    def refuse(*_: object) -> None:
        raise SystemError("AST constructor recursion depth mismatch")

    with monkeypatch.context() as patched:  # pytest parses too
        patched.setattr(ast, "literal_eval", refuse)
        found = parse_mel(data, num_rows=shape[0], num_bins=shape[1], where="x")
    assert np.array_equal(found, np.ones(shape, np.float16))


def jpeg_header(height: int, width: int, components: int = 3, marker: int = 0xC0) -> bytes:
    size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return (
        b"\xff\xd8\xff\xe0\x00\x04ab\xff" + bytes([marker]) + b"\x00\x11\x08" + size + bytes([components]) + b"\0" * 9
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (jpeg_header(60_000, 60_000), "at most 67108864 pixels, found 3 components and 60000 x 60000"),
        (jpeg_header(0, 64), "found 3 components and 64 x 0"),
        (jpeg_header(48, 64, components=4), "found 4 components"),
        (jpeg_header(48, 64, marker=0xC9), "without a baseline or progressive frame header"),
        (jpeg_header(48, 64)[:12], "ends inside its frame header"),
        (b"GIF89a", "expected a JPEG, found bytes 47494638"),
        (b"", "expected a JPEG"),
    ],
)
def test_p14_a_picture_too_large_or_no_jpeg_is_refused_before_any_decoder_sees_it(data: bytes, message: str) -> None:
    with pytest.raises(SampleDamageError, match=f"frame 3: .*{message}"):
        jpeg_size(data, where="frame 3")


def test_the_size_of_a_picture_is_read_from_its_header() -> None:
    assert jpeg_size(jpeg_header(48, 64), where="x") == (48, 64)
    assert jpeg_size(FakeSample(key="x", height=33, width=47, num_frames=1).frames()[0], where="x") == (33, 47)


@pytest.mark.parametrize("name", ["pipe:cat /etc/passwd.tar", "../other.tar", "/etc/x.tar", "a.zip"])
def test_p14_a_shard_name_that_is_no_plain_file_name_is_refused(fresh_set: ShardSet, clip: ClipSpec, name: str) -> None:
    shards = (dataclasses.replace(fresh_set.shards[0], name=name), fresh_set.shards[1])
    with pytest.raises(ShardSetDamageError, match=r"is not a plain file name ending in .tar"):
        evaluation(rewrite_manifest(fresh_set.root, shards), clip)


def test_every_damage_error_ends_a_command_with_exit_code_3() -> None:
    assert {SampleDamageError.exit_code, ShardSetDamageError.exit_code} == {DataDamageError.exit_code} == {3}


# Reading by range.


def test_frames_that_lie_together_are_read_together() -> None:
    offsets = np.arange(0, 11_000, 1000, dtype=np.int64)
    assert coalesce([0, 1, 2, 9], offsets, most_gap=0) == [[0, 1, 2], [9]]
    assert coalesce([0, 2, 9], offsets, most_gap=1000) == [[0, 2], [9]]
    assert coalesce([4], offsets) == [[4]]


def test_a_shard_that_grew_or_shrank_since_the_start_is_refused_at_its_opening(fresh_set: ShardSet) -> None:
    shard, path = fresh_set.shards[0], fresh_set.root / fresh_set.shards[0].name
    for change in (lambda data: data + bytes(512), lambda data: data[:-512]):
        whole = path.read_bytes()
        overwrite(path, change)
        message = rf"expected {shard.bytes} bytes, found {path.stat().st_size}"
        with pytest.raises(ShardSetDamageError, match=message), ShardFiles(fresh_set).opened(shard):
            pass
        path.write_bytes(whole)


def test_only_the_wanted_frames_are_read(fresh_set: ShardSet) -> None:
    stats = StatsRecorder()
    reader = SampleReader(fresh_set, stats)
    entry = reader.indexes.entry(0, 0)
    sample = reader.fetch(entry, [3, 3, 4])
    frames = FakeSample(key="clip-0000", num_frames=12).frames()
    assert sample.frames == {3: frames[3], 4: frames[4]}
    assert stats.snapshot().bytes_read == len(frames[3]) + len(frames[4]) + entry.mel_bytes
    reader.close()


def test_many_threads_share_few_open_files_without_mixing_shards(tmp_path: Path) -> None:
    shard_set = make_shard_set(tmp_path, make_samples(6, num_frames=2), samples_per_shard=1)
    reader = SampleReader(shard_set, index_cache_bytes=1)
    reader.files = ShardFiles(shard_set, most_open=1)

    def read(number: int) -> str:
        return reader.fetch(reader.indexes.entry(number % 6, 0), [0, 1]).entry.key

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(120))) == [f"clip-{number % 6:04d}" for number in range(120)]


def test_open_files_and_index_memory_stay_bounded(tmp_path: Path) -> None:
    shard_set = make_shard_set(tmp_path, make_samples(6, num_frames=2), samples_per_shard=1)
    files = ShardFiles(shard_set, most_open=2)
    indexes = ShardIndexCache(files, most_bytes=1)
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    for shard in range(6):
        entry = indexes.entry(shard, 0)
        with files.opened(entry.shard) as shard_file:
            shard_file.read(entry.mel_offset, entry.mel_bytes)
        assert len(indexes._held) == 1
        assert len(list(descriptors.iterdir())) <= before + 2
    files.close()
    assert len(list(descriptors.iterdir())) == before
