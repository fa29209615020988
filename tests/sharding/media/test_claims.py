"""What a container claims against what came out of it: half-arrived files, lost chunks, honest oddities (C4)."""

import re
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from sharding.errors import MediaError
from sharding.media.encode import EncodedClip, encode_clip
from sharding.settings import ConversionConfig
from sharding.source import SourceSample
from support.media import Sound, make_clip

CODECS = {
    "a.webm": ("libvpx", "libopus"),
    "a.mkv": ("libx264", "flac"),
    "a.flv": ("libx264", "aac"),
    "a.avi": ("mpeg4", "mp2"),
    "a.ogv": ("libtheora", "flac"),
    "a.ts": ("mpeg2video", "mp2"),
    "a.wmv": ("msmpeg4v2", "mp2"),
}
"""Picture and sound of a test file of each container."""


def convert_one(path: Path, start: float | None = None, end: float | None = None, **options: object) -> EncodedClip:
    one = SourceSample(
        sample_id=path.stem, path=path, start_seconds=start, end_seconds=end, labels=(0,), where="list.csv:1"
    )
    return encode_clip(ConversionConfig(**({"audio_policy": "optional"} | options)).job(one))  # type: ignore[arg-type]  # test options


def reason_of(path: Path, start: float | None = None, end: float | None = None) -> str:
    with pytest.raises(MediaError) as caught:
        convert_one(path, start, end)
    return caught.value.reason


def whole_file(path: Path, *, sound_seconds: float = 3.0) -> Path:
    """Three seconds of numbered frames at 30 fps with sound."""
    codec, sound_codec = CODECS[path.name]
    sound = Sound(seconds=sound_seconds, codec=sound_codec)
    if path.suffix == ".ogv":  # PyAV's own build encodes no Theora; VP8 in Ogg is the other picture FFmpeg writes
        codec = "libvpx"
    return make_clip(path, seconds=3, codec=codec, sound=sound, size=(96, 64))


def zeros_behind(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def the_front(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize("name", ["a.webm", "a.mkv", "a.flv", "a.avi", "a.ogv", "a.wmv"])
@pytest.mark.parametrize("loss", [zeros_behind, the_front])
def test_a_half_arrived_file_is_no_short_clip(tmp_path: Path, name: str, loss: Callable[[bytes], bytes]) -> None:
    whole = whole_file(tmp_path / name)
    assert len(convert_one(whole).video.frame_ticks) == 90
    half = tmp_path / f"half_{name}"
    half.write_bytes(loss(whole.read_bytes()))
    assert reason_of(half) in ("truncated", "decode_error")


def test_a_half_arrived_file_whose_packets_end_at_the_cut_is_truncated(tmp_path: Path) -> None:
    """Zeros from the end of a cluster on: nothing that is left fails to decode, the duration alone tells."""
    whole = whole_file(tmp_path / "a.flv")
    with av.open(str(whole)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.pos]
    cut = places[len(places) // 2]
    data = whole.read_bytes()
    for name, behind in (("zeros.flv", bytes(len(data) - cut)), ("cut.flv", b"")):
        (tmp_path / name).write_bytes(data[:cut] + behind)
        with pytest.raises(
            MediaError, match=r"expected frames to 3\.\d+ s as the file says, found them to 1\."
        ) as caught:
            convert_one(tmp_path / name)
        assert caught.value.reason == "truncated"


def test_a_segment_that_arrived_is_cut_and_one_that_did_not_is_truncated_not_outside(tmp_path: Path) -> None:
    whole = whole_file(tmp_path / "a.flv")
    half = tmp_path / "half.flv"
    half.write_bytes(zeros_behind(whole.read_bytes()))
    assert len(convert_one(half, 0.2, 0.7, audio_policy="none").video.frame_ticks) == 15
    assert reason_of(half, 2.0, 2.5) in ("truncated", "decode_error")
    assert reason_of(half, 2.6, 2.7) in ("truncated", "decode_error"), "though a seek finds nothing there"
    assert reason_of(half, 0.5, 9.0) in ("truncated", "decode_error")
    assert reason_of(whole, 4.0, 5.0) == "segment_outside"


def a_hole_inside(data: bytes) -> bytes:
    """One part of a download in several never came; where it lies a multiple of nothing in the file."""
    at, num_bytes = len(data) * 2 // 5, len(data) // 4
    return data[:at] + bytes(num_bytes) + data[at + num_bytes :]


@pytest.mark.parametrize("name", ["a.webm", "a.mkv", "a.flv", "a.avi", "a.ogv", "a.wmv"])
def test_a_hole_inside_a_file_is_noticed_and_what_lies_in_front_of_it_is_cut(tmp_path: Path, name: str) -> None:
    whole = whole_file(tmp_path / name)
    holed = tmp_path / f"hole_{name}"
    holed.write_bytes(a_hole_inside(whole.read_bytes()))
    assert reason_of(holed) in ("truncated", "decode_error")
    assert reason_of(holed, 0.1, 2.9) in ("truncated", "decode_error")
    if name != "a.avi":  # its sound is checked a second ahead
        assert len(convert_one(holed, 0.0, 0.1, audio_policy="none").video.frame_ticks) == 3


def test_a_lost_page_of_ogg_is_named_by_its_place(tmp_path: Path) -> None:
    data = whole_file(tmp_path / "a.ogv").read_bytes()
    pages = [at.start() for at in re.finditer(b"OggS", data)]
    middle = len(pages) // 2
    (tmp_path / "lost.ogv").write_bytes(data[: pages[middle]] + data[pages[middle + 1] :])
    with pytest.raises(MediaError, match=r"expected the next Ogg page at byte \d+") as caught:
        convert_one(tmp_path / "lost.ogv", audio_policy="none")
    assert caught.value.reason == "decode_error"


def test_ogg_that_ends_inside_the_header_of_a_page_is_a_damaged_file_and_no_fault_of_ours(tmp_path: Path) -> None:
    data = whole_file(tmp_path / "a.ogv").read_bytes()
    (tmp_path / "cut.ogv").write_bytes(data[: data.rindex(b"OggS") + 10])
    with pytest.raises(MediaError, match=r"expected the next Ogg page at byte \d+") as caught:
        convert_one(tmp_path / "cut.ogv", 0.0, 2.2, audio_policy="none")
    assert caught.value.reason == "decode_error"


def test_a_live_recording_may_end_inside_the_name_of_a_cluster(tmp_path: Path) -> None:
    whole = make_clip(tmp_path / "a.mkv", seconds=12, codec="libx264", size=(96, 64), container_options={"live": "1"})
    data = whole.read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: data.rindex(b"\x1f\x43\xb6\x75") + 2])
    assert 100 < len(convert_one(tmp_path / "cut.mkv", audio_policy="none").video.frame_ticks) < 360


@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.ogv"])
def test_zeros_for_what_never_arrived_are_truncated_whatever_the_decoder_stumbles_over(
    tmp_path: Path, name: str
) -> None:
    half = tmp_path / f"half_{name}"
    half.write_bytes(zeros_behind(whole_file(tmp_path / name).read_bytes()))
    assert reason_of(half) == "truncated"


@pytest.mark.parametrize("name", ["a.ts", "a.mpg"])
def test_zeros_at_the_end_of_packets_are_noticed(tmp_path: Path, name: str) -> None:
    whole = make_clip(tmp_path / name, seconds=3, codec="mpeg2video", size=(96, 64))
    assert len(convert_one(whole).video.frame_ticks) == 90
    (tmp_path / f"half_{name}").write_bytes(whole.read_bytes() + bytes(100_000))
    assert reason_of(tmp_path / f"half_{name}") in ("truncated", "decode_error")


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("sound_seconds", [1.0, 6.0])
def test_sound_shorter_or_longer_than_the_picture_makes_no_file_truncated(
    tmp_path: Path, name: str, sound_seconds: float
) -> None:
    assert len(convert_one(whole_file(tmp_path / name, sound_seconds=sound_seconds)).video.frame_ticks) == 90


@pytest.mark.parametrize("name", ["a.mkv", "a.flv", "a.webm", "a.mp4"])
def test_a_last_frame_that_lasts_long_or_a_first_that_comes_late_makes_no_file_truncated(
    tmp_path: Path, name: str
) -> None:
    codec = CODECS.get(name, ("libx264", ""))[0]
    times = [5 + number / 30 for number in range(30)] + [7.5]
    assert len(convert_one(make_clip(tmp_path / name, times=times, codec=codec)).video.frame_ticks) == 31


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.webm", {"live": "1"}), ("a.mkv", {"live": "1"}), ("a.flv", {"flvflags": "no_duration_filesize"})],
)
def test_a_live_recording_makes_no_claim_and_is_accepted_up_to_its_end(
    tmp_path: Path, name: str, options: dict[str, str]
) -> None:
    whole = make_clip(tmp_path / name, seconds=3, codec=CODECS[name][0], container_options=options)
    assert len(convert_one(whole).video.frame_ticks) == 90
    with av.open(str(whole)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.pos]
    data = whole.read_bytes()
    (tmp_path / f"cut_{name}").write_bytes(data[: places[60]])
    assert 55 <= len(convert_one(tmp_path / f"cut_{name}").video.frame_ticks) <= 60


@pytest.mark.parametrize("kind", [b"01wb", b"00dc"], ids=["sound", "picture"])
def test_a_lost_chunk_of_an_avi_is_damage_for_all_that_lies_behind_it(tmp_path: Path, kind: bytes) -> None:
    """AVI counts its sound: without this one chunk all behind it would sound 26 ms early, and nothing else tells."""
    data = bytearray(whole_file(tmp_path / "a.avi").read_bytes())
    middle = data.index(kind, data.index(b"movi") + (len(data) - data.index(b"movi")) // 2)
    data[middle : middle + 4] = b"JUNK"
    path = tmp_path / "lost.avi"
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"expected chunk \d+ \('0[01][a-z]{2}'\) where the index says") as caught:
        convert_one(path)
    assert caught.value.reason == "decode_error"
    early = convert_one(path, 0.0, 0.3)
    assert len(early.video.frame_ticks) == 9


def test_damaged_bytes_of_an_avi_never_move_its_sound(tmp_path: Path) -> None:
    whole = whole_file(tmp_path / "a.avi")
    data, good = whole.read_bytes(), convert_one(whole)
    assert good.audio is not None
    rng = np.random.default_rng(1)
    first = data.index(b"movi") + 4
    for _ in range(25):
        damaged = bytearray(data)
        at = int(rng.integers(first, data.index(b"idx1") - 2000))
        damaged[at : at + 8] = rng.integers(0, 256, 8, dtype=np.uint8).tobytes()
        (tmp_path / "b.avi").write_bytes(damaged)
        try:
            found = convert_one(tmp_path / "b.avi")
        except MediaError:
            continue
        assert found.audio is not None
        assert found.video.frame_ticks == good.video.frame_ticks
        assert len(found.audio.pcm) == len(good.audio.pcm)


def test_an_avi_whose_index_says_that_it_is_longer_than_the_file_is_read_with_what_is_there(tmp_path: Path) -> None:
    data = bytearray(whole_file(tmp_path / "a.avi").read_bytes())
    at = data.index(b"idx1")
    data[at + 4 : at + 8] = (int.from_bytes(data[at + 4 : at + 8], "little") + 2**20).to_bytes(4, "little")
    (tmp_path / "b.avi").write_bytes(data + b"odd")
    assert len(convert_one(tmp_path / "b.avi", 0.0, 0.3).video.frame_ticks) == 9


def test_a_matroska_header_of_an_absurd_length_is_a_cut_file(tmp_path: Path) -> None:
    data = bytearray(whole_file(tmp_path / "a.mkv").read_bytes())
    data[4:12] = b"\x01" + b"\x7f" * 7
    (tmp_path / "b.mkv").write_bytes(data)
    with pytest.raises(MediaError, match=r"expected \d{10,} bytes as its EBML header says, found \d+") as caught:
        convert_one(tmp_path / "b.mkv")
    assert caught.value.reason == "truncated"


def test_an_avi_whose_index_fits_nothing_or_is_missing_is_read_without_it(tmp_path: Path) -> None:
    data = whole_file(tmp_path / "a.avi").read_bytes()
    at = data.index(b"idx1")
    entries = bytearray(data[at + 8 :])
    for entry in range(8, len(entries) - 8, 16):
        entries[entry : entry + 4] = (int.from_bytes(entries[entry : entry + 4], "little") + 2).to_bytes(4, "little")
    (tmp_path / "other.avi").write_bytes(data[: at + 8] + entries)
    (tmp_path / "none.avi").write_bytes(data[:at] + b"JUNK" + data[at + 4 :])
    assert len(convert_one(tmp_path / "none.avi").video.frame_ticks) == 90
    assert len(convert_one(tmp_path / "other.avi").video.frame_ticks) in (89, 90)
