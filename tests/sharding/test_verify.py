"""Verification names every damage (C19) and says where it is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sharding.conversion import convert
from sharding.errors import ManifestError
from sharding.folder import LOCK_NAME
from sharding.format.index import decode_index
from sharding.format.shard_set import read_shard_set
from sharding.settings import RejectBudget
from sharding.verify import Problem, verify_shard_set
from support.media import Sound, damage, make_clip
from support.shards import sample, small_config, source_list


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of three shards with sound, silence and a reject."""
    folder = tmp_path_factory.mktemp("set")
    sounds = (Sound(seconds=0.2), None, Sound(seconds=0.1), None, None)
    clips = [
        make_clip(folder / f"clip_{number}.mp4", seconds=0.1, size=(32, 32), sound=sound)
        for number, sound in enumerate(sounds)
    ]
    bad = damage(clips[1], folder / "bad.mp4", "text")
    source = source_list([sample(path) for path in [*clips[:2], bad, *clips[2:]]])
    config = small_config(audio_policy="optional", shard_bytes=14_000_000, max_rejects=RejectBudget(count=1))
    report = convert(source, folder / "out", config)
    assert report.num_shards >= 2
    assert verify_shard_set(folder / "out") == []
    return folder / "out"


@pytest.fixture
def restored(root: Path) -> Iterator[Path]:
    """The set; whatever the test does to it is undone."""
    before = {path: path.read_bytes() for path in root.iterdir()}
    yield root
    for path in set(root.iterdir()) - set(before):
        path.unlink()
    for path, data in before.items():
        path.write_bytes(data)


def one_row(root: Path, number: int = 0) -> dict[str, object]:
    return decode_index((root / "ca2st-000000.index.parquet").read_bytes()).to_pylist()[number]


def check_one_changed_byte(root: Path, place: float, change: int) -> None:
    """Change the byte at `place` (0..1 of the set), verify, restore."""
    files = sorted(root.iterdir())
    at = int(place * sum(path.stat().st_size for path in files))
    for path in files:
        if at < path.stat().st_size:
            break
        at -= path.stat().st_size
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
    try:
        problems = verify_shard_set(root)
    finally:
        path.write_bytes(whole)
    assert path.name in {problem.shard for problem in problems}


PLACES = st.floats(0, 1, exclude_max=True)
CHANGES = st.integers(1, 255)


@settings(max_examples=250, deadline=None)
@given(place=PLACES, change=CHANGES)
@example(place=0.0, change=1)
def test_c19_one_changed_byte_anywhere_in_any_file_is_found_and_its_file_named(
    root: Path, place: float, change: int
) -> None:
    check_one_changed_byte(root, place, change)


@pytest.mark.soak
@settings(max_examples=1000, deadline=None)
@given(place=PLACES, change=CHANGES)
def test_c19_a_thousand_of_a_thousand(root: Path, place: float, change: int) -> None:
    check_one_changed_byte(root, place, change)


@pytest.mark.parametrize("name", [b'"sha256"', b'"rejects"', b"conversion"])
def test_a_changed_name_in_an_indexs_metadata_is_found(restored: Path, name: bytes) -> None:
    """What stands there in plain text: the writer's own notes, which a resume reads."""
    path = restored / "ca2st-000000.index.parquet"
    whole = path.read_bytes()
    assert name in whole
    path.write_bytes(whole.replace(name, name[:3] + b"x" + name[4:], 1))
    assert path.name in {problem.shard for problem in verify_shard_set(restored)}


@pytest.mark.parametrize("name", ["manifest.json", "shards.parquet"])
def test_every_byte_of_the_manifest_and_the_shard_table_counts(restored: Path, name: str) -> None:
    path = restored / name
    whole = path.read_bytes()
    for at in range(0, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert [problem.shard for problem in verify_shard_set(restored)] == [name]
        path.write_bytes(whole)


def test_a_flipped_byte_of_a_frame_is_named_by_shard_key_and_frame(restored: Path) -> None:
    row = one_row(restored)
    tar = restored / "ca2st-000000.tar"
    data = bytearray(tar.read_bytes())
    data[row["video_offset"] + row["frame_data_offset"] + row["frame_bytes"][0] + 20] ^= 0x10
    tar.write_bytes(data)
    [problem] = verify_shard_set(restored)
    assert (problem.shard, problem.key) == ("ca2st-000000.tar", row["key"])
    assert "mp4: bytes" in problem.what
    assert "(frame 1 of 3)" in problem.what


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("video_header", "mp4: tar header"),
        ("video_container", "(no frame: the container around them)"),
        ("mel", "mel.npy: bytes"),
        ("json", "json: bytes"),
        ("json_padding", "json: padding behind byte"),
    ],
)
def test_damage_outside_the_frames_is_named_by_member(restored: Path, place: str, what: str) -> None:
    row = one_row(restored)
    at = {
        "video_header": row["video_offset"] - 400,
        "video_container": row["video_offset"] + row["video_bytes"] - 3,
        "mel": row["mel_offset"] + 130,
        "json": row["json_offset"] + 5,
        "json_padding": row["json_offset"] + row["json_bytes"],
    }[place]
    tar = restored / "ca2st-000000.tar"
    data = bytearray(tar.read_bytes())
    data[at] ^= 0xFF
    tar.write_bytes(data)
    [problem] = verify_shard_set(restored)
    assert (problem.shard, problem.key) == ("ca2st-000000.tar", row["key"])
    assert what in problem.what


def test_a_shard_cut_short_names_the_samples_it_lost(restored: Path) -> None:
    row = one_row(restored, 1)
    tar = restored / "ca2st-000000.tar"
    tar.write_bytes(tar.read_bytes()[: row["video_offset"] + 10])
    problems = verify_shard_set(restored)
    assert problems[0].what.startswith("expected ")
    assert row["key"] in {problem.key for problem in problems}
    assert one_row(restored)["key"] not in {problem.key for problem in problems}


def test_two_shards_in_each_others_place_are_found(restored: Path) -> None:
    first, second = restored / "ca2st-000000.tar", restored / "ca2st-000001.tar"
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1])
    second.write_bytes(data[0])
    assert {problem.shard for problem in verify_shard_set(restored)} >= {first.name, second.name}


@pytest.mark.parametrize("name", ["ca2st-000000.tar", "ca2st-000001.index.parquet", "rejects.jsonl"])
def test_a_missing_file_is_named(restored: Path, name: str) -> None:
    (restored / name).unlink()
    assert name in {problem.shard for problem in verify_shard_set(restored)}


def test_a_file_the_manifest_does_not_name_is_a_problem(restored: Path) -> None:
    (restored / "ca2st-000099.tar").write_bytes(b"")
    (restored / "notes.txt").write_text("mine")
    assert verify_shard_set(restored) == [
        Problem(shard="ca2st-000099.tar", key="", what="not named by the manifest; remove it"),
        Problem(shard="notes.txt", key="", what="not named by the manifest; remove it"),
    ]


def test_a_file_that_goes_while_its_folder_is_listed_is_no_fault(
    restored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterdir = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: iter([*iterdir(self), self / ".gone.tmp"]))
    assert verify_shard_set(restored) == []


def test_the_lock_of_a_converter_killed_at_its_very_end_is_no_damage(restored: Path) -> None:
    (restored / LOCK_NAME).write_text('{"pid": 1, "host": "gone"}')
    assert verify_shard_set(restored) == []


def test_a_damaged_manifest_is_a_problem_and_a_missing_one_is_refused_as_everywhere(restored: Path) -> None:
    for data in (b"", b"{", b"[]", b'{"format": "ca2st-shards"}', b"\xff\xfe\x00", b'{"format": "other"}'):
        (restored / "manifest.json").write_bytes(data)
        assert [problem.shard for problem in verify_shard_set(restored)] == ["manifest.json"]
    (restored / "manifest.json").unlink()
    for read in (verify_shard_set, read_shard_set):
        with pytest.raises(ManifestError, match=r"manifest\.json: no such file; the conversion has not finished"):
            read(restored)


def test_damage_everywhere_is_summed_up(restored: Path) -> None:
    tar = restored / "ca2st-000000.tar"
    tar.write_bytes(bytes(byte ^ 1 for byte in tar.read_bytes()))
    problems = verify_shard_set(restored)
    assert 1 < len(problems) <= 21


def test_progress_counts_the_shards(root: Path) -> None:
    seen: list[tuple[int, int]] = []
    verify_shard_set(root, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number + 1, seen[-1][1]) for number in range(len(seen))]


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"expected a folder with manifest\.json, found none"):
        verify_shard_set(tmp_path / "nowhere")
