"""One shard on disk: plain tar, fixed headers, an index that names every byte range."""

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from ca2st.durable import FaultPoints, InjectedFault
from sharding.errors import ShardDamageError
from sharding.folder import open_done_shard, read_done_shard
from sharding.format.index import decode_index, frame_checksum, member_checksum
from sharding.format.writer import ShardRange, StoredSample, member_header, write_shard
from support.shards import SPACE

COVERS = ShardRange(first=0, end=3, rejects=())


def stored(number: int) -> StoredSample:
    frames = [bytes([number, at]) * (10 + at) for at in range(4)]
    return StoredSample(
        key=f"clip-{number}",
        labels=(number % len(SPACE.classes),),
        video=b"head" + b"".join(frames) + b"tail",
        mel=b"mel" * (number + 1),
        json=b'{"a": 1}',
        num_frames=4,
        duration_seconds=0.5,
        has_audio=False,
        mel_rows=0,
        frame_data_offset=4,
        frame_bytes=tuple(len(frame) for frame in frames),
        frame_ticks=(0, 3000, 6000, 9000),
    )


def test_the_tar_holds_the_members_in_order_with_fixed_facts(tmp_path: Path) -> None:
    samples = [stored(number) for number in range(3)]
    entry = write_shard(tmp_path, 7, samples, covers=lambda: COVERS, conversion={})
    data = (tmp_path / "ca2st-000007.tar").read_bytes()
    assert (entry.name, entry.bytes, entry.num_samples) == ("ca2st-000007.tar", len(data), 3)
    assert entry.sha256 == hashlib.sha256(data).hexdigest()
    assert entry.index_sha256 == hashlib.sha256((tmp_path / entry.index_name).read_bytes()).hexdigest()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [
        f"clip-{number}.{suffix}" for number in range(3) for suffix in ("mp4", "mel.npy", "json")
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members} == {
        (0, 0, 0, "ca2st", "ca2st", 0o444, tarfile.REGTYPE)
    }
    assert all(not member.pax_headers for member in members)


def test_the_index_points_at_the_bytes_themselves(tmp_path: Path) -> None:
    samples = [stored(number) for number in range(3)]
    entry = write_shard(tmp_path, 0, samples, covers=lambda: COVERS, conversion={})
    data = (tmp_path / entry.name).read_bytes()
    rows = decode_index((tmp_path / entry.index_name).read_bytes()).to_pylist()
    for row, sample in zip(rows, samples, strict=True):
        for member in ("video", "mel", "json"):
            at, size = row[f"{member}_offset"], row[f"{member}_bytes"]
            assert data[at : at + size] == getattr(sample, member)
            assert row[f"{member}_xxh64"] == member_checksum(getattr(sample, member))
        at = row["video_offset"] + row["frame_data_offset"]
        for number, (size, checksum) in enumerate(zip(row["frame_bytes"], row["frame_xxh32"], strict=True)):
            frame = data[at : at + size]
            assert frame[1] == number
            assert frame_checksum(frame) == checksum
            at += size
        assert tuple(row["frame_ticks"]) == sample.frame_ticks


def test_the_same_samples_give_the_same_bytes_of_a_size_that_their_members_tell(tmp_path: Path) -> None:
    samples = [stored(number) for number in range(5)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name, 0, iter(samples), covers=lambda: COVERS, conversion={"x": 1})
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    members = [member for sample in samples for member in (sample.video, sample.mel, sample.json)]
    content = sum(512 + -(-len(member) // 512) * 512 for member in members) + 1024
    assert (tmp_path / "a" / "ca2st-000000.tar").stat().st_size == -(-content // 10240) * 10240


@pytest.mark.parametrize("point", ["index.written", "index.renamed", "shard.written"])
def test_until_the_tar_has_its_name_the_shard_does_not_exist(tmp_path: Path, point: str) -> None:
    with pytest.raises(InjectedFault):
        write_shard(
            tmp_path,
            0,
            [stored(0)],
            covers=lambda: COVERS,
            conversion={},
            faults=FaultPoints(point=point, kind="raise"),
        )
    assert not list(tmp_path.glob("*.tar"))
    assert not list(tmp_path.glob(".*"))
    assert read_done_shard(tmp_path, 0) is None


def test_an_exception_while_samples_arrive_leaves_nothing(tmp_path: Path) -> None:
    def samples():
        yield stored(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, 0, samples(), covers=lambda: COVERS, conversion={})
    assert list(tmp_path.iterdir()) == []


def test_a_done_shard_is_read_back_from_its_index(tmp_path: Path) -> None:
    covers = ShardRange(first=2, end=4, rejects=({"position": 3, "sample_id": "x", "reason": "timeout", "what": "w"},))
    entry = write_shard(tmp_path, 0, [stored(0)], covers=lambda: covers, conversion={"dataset": "d"})
    done = read_done_shard(tmp_path, 0)
    assert done is not None
    assert (done.entry, done.covers, done.conversion, done.num_with_audio) == (entry, covers, {"dataset": "d"}, 0)
    with (tmp_path / entry.name).open("ab") as file:
        file.write(b"x")
    assert read_done_shard(tmp_path, 0) is None


def test_a_shard_whose_range_has_sources_without_a_row_or_a_reject_is_not_done(tmp_path: Path) -> None:
    reject = {"position": 4, "sample_id": "x", "reason": "timeout", "what": "w"}
    covers = ShardRange(first=2, end=9, rejects=(reject,))
    write_shard(tmp_path, 0, [stored(0)], covers=lambda: covers, conversion={"dataset": "d"})
    assert read_done_shard(tmp_path, 0) is None
    with pytest.raises(ShardDamageError, match="a reject for each of its 7 sources, found 1 and 1"):
        open_done_shard(tmp_path, 0)


def test_member_headers_are_what_tarfile_reads(tmp_path: Path) -> None:
    info = tarfile.TarInfo.frombuf(member_header("clip-1", "mp4", 12_345), "utf-8", "strict")
    assert (info.name, info.size, info.isreg()) == ("clip-1.mp4", 12_345, True)
