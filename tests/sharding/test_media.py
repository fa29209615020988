"""Probing, strict decoding and the reasons of rejects (C4, C5.5, C7, C13)."""

import math
from fractions import Fraction
from pathlib import Path

import pytest

from ca2st.errors import UserInputError
from sharding import decode_child
from sharding.conversion import ConversionConfig
from sharding.decode_child import EncodedClip, encode_clip
from sharding.errors import MediaError
from sharding.media import REASONS, MediaLimits, check_unchanged, source_state
from sharding.source import SourceSample
from support.media import DAMAGES, Sound, damage, make_clip


def convert_one(path: Path, start: float | None = None, end: float | None = None, **options: object) -> EncodedClip:
    """Encode one segment in this process."""
    sample = SourceSample(
        sample_id=path.stem, path=path, start_seconds=start, end_seconds=end, labels=(0,), where="list.csv:1"
    )
    return encode_clip(ConversionConfig(**({"audio_policy": "optional"} | options)).job(sample))  # type: ignore[arg-type]  # test options


def reason_of(path: Path, start: float | None = None, end: float | None = None, **options: object) -> str:
    with pytest.raises(MediaError) as caught:
        convert_one(path, start, end, **options)
    assert caught.value.reason in REASONS
    assert str(path) not in str(caught.value), "a reject names no path, so that sets are the same everywhere"
    return caught.value.reason


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    return make_clip(folder / "whole.mp4", seconds=2, size=(160, 120), b_frames=2, sound=Sound(seconds=2))


EXPECTED = {
    "zero_byte": "empty_file",
    "text": "not_a_video",
    "no_moov": "no_index",
    "half": "truncated",
    "bit_flips": "decode_error",
    "zeroed_mdat": "decode_error",
    "bad_stco": "decode_error",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_rejected_with_its_own_reason(clip: Path, tmp_path: Path, kind: str) -> None:
    assert reason_of(damage(clip, tmp_path / "x.mp4", kind)) == EXPECTED[kind]


@pytest.mark.parametrize("movie_flags", ["faststart", "frag_keyframe+empty_moov"], ids=["index_in_front", "fragmented"])
def test_half_an_mp4_with_its_index_in_front_is_truncated(tmp_path: Path, movie_flags: str) -> None:
    whole = make_clip(tmp_path / "a.mp4", seconds=2, size=(160, 120), container_options={"movflags": movie_flags})
    assert len(convert_one(whole).video.frame_ticks) == 60
    assert reason_of(damage(whole, tmp_path / "b.mp4", "half")) == "truncated"


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.webm", "libvpx"), ("a.avi", "mpeg4")])
def test_half_a_matroska_or_avi_file_is_truncated(tmp_path: Path, name: str, codec: str) -> None:
    whole = make_clip(tmp_path / name, seconds=1, codec=codec, size=(160, 120))
    assert len(convert_one(whole).video.frame_ticks) == 30
    assert reason_of(damage(whole, tmp_path / f"half_{name}", "half")) == "truncated"


def test_frames_that_an_index_promises_behind_the_data_are_missed(clip: Path, tmp_path: Path) -> None:
    whole = make_clip(tmp_path / "a.mp4", seconds=2, size=(160, 120), container_options={"movflags": "faststart"})
    data = bytearray(whole.read_bytes())
    cut = len(data) * 3 // 4
    at = data.index(b"mdat") - 4
    data[at : at + 4] = (cut - at).to_bytes(4, "big")  # a box that claims no more than is there
    (tmp_path / "b.mp4").write_bytes(data[:cut])
    assert reason_of(tmp_path / "b.mp4") in ("truncated", "decode_error")


def test_a_wrong_suffix_does_not_matter_and_a_playlist_is_no_video(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "clip.avi").write_bytes(clip.read_bytes())
    assert len(convert_one(tmp_path / "clip.avi").video.frame_ticks) == 60
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {clip}\n")
    assert reason_of(tmp_path / "list.mp4") == "not_a_video"


def test_names_that_look_like_protocols_or_options_are_only_names(clip: Path, tmp_path: Path) -> None:
    for name in ("concat:a|b.mp4", "-y.mp4", "naïve 映像 %d.mp4"):
        (tmp_path / name).write_bytes(clip.read_bytes())
        assert len(convert_one(tmp_path / name).video.frame_ticks) == 60


def test_a_missing_file_and_a_folder_are_missing(tmp_path: Path) -> None:
    assert reason_of(tmp_path / "nowhere.mp4") == "missing_file"
    assert reason_of(tmp_path) == "missing_file"


def test_sound_without_a_picture_is_no_video(tmp_path: Path, clip: Path) -> None:
    import av

    with av.open(str(clip)) as source, av.open(str(tmp_path / "sound.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert reason_of(tmp_path / "sound.mp4") == "no_video_stream"


@pytest.mark.parametrize(
    "limits",
    [
        {"max_file_bytes": 1000},
        {"max_frames": 59},
        {"max_duration_seconds": 0.5},
        {"max_frame_pixels": 160 * 119},
        {"max_decoded_pixels": 160 * 120 * 59},
    ],
    ids=lambda limits: next(iter(limits)),
)
def test_each_limit_rejects_what_goes_beyond_it(clip: Path, limits: dict[str, int]) -> None:
    assert reason_of(clip, limits=MediaLimits(**limits)) == "too_large"


def test_a_limit_that_is_not_positive_is_refused() -> None:
    with pytest.raises(UserInputError, match=r"MediaLimits.max_frames: expected a positive number, found 0"):
        MediaLimits(max_frames=0)


def test_a_picture_of_60000_pixels_is_rejected(tmp_path: Path) -> None:
    whole = make_clip(tmp_path / "a.avi", seconds=0.2, codec="mjpeg", pixel_format="yuvj420p", size=(64, 48))
    huge = whole.read_bytes().replace(
        (48).to_bytes(2, "big") + (64).to_bytes(2, "big"), (60_000).to_bytes(2, "big") * 2
    )
    assert huge != whole.read_bytes()
    (tmp_path / "huge.avi").write_bytes(huge)
    assert reason_of(tmp_path / "huge.avi") in ("too_large", "decode_error")


def test_a_source_that_changes_while_it_is_read_is_rejected(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip.read_bytes())
    real = decode_child.open_media

    def touching(target: Path):
        path.write_bytes(clip.read_bytes() + b"\0" * 16)
        return real(target)

    monkeypatch.setattr(decode_child, "open_media", touching)
    assert reason_of(path) == "source_changed"


def test_a_source_that_vanishes_while_it_is_read_counts_as_changed(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"x")
    before = source_state(path)
    path.unlink()
    with pytest.raises(MediaError, match="expected the same size and time") as caught:
        check_unchanged(path, before)
    assert caught.value.reason == "source_changed"


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_title_in_another_encoding_than_utf_8_does_not_matter(tmp_path: Path, name: str) -> None:
    path = make_clip(tmp_path / name, seconds=0.2, title="caf__ at noon")
    path.write_bytes(path.read_bytes().replace(b"caf__", b"caf\xe9!"))
    assert b"caf\xe9!" in path.read_bytes()
    assert len(convert_one(path).video.frame_ticks) == 6


def test_a_codec_without_a_decoder_is_named(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(clip.read_bytes().replace(b"avc1", b"zz99"))
    assert reason_of(tmp_path / "x.mp4") == "decode_error"
    with pytest.raises(MediaError, match="expected a video codec that PyAV decodes, found an unknown one"):
        convert_one(tmp_path / "x.mp4")


def test_every_reason_has_a_meaning() -> None:
    assert all(len(meaning) > 10 for meaning in REASONS.values())


def test_facts_of_the_source_are_kept(clip: Path) -> None:
    result = convert_one(clip)
    assert result.source_size == (160, 120)
    assert result.source_bytes == clip.stat().st_size
    assert result.source_codec == "h264"
    assert math.isclose(result.source_frames_per_second, 30)
    assert math.isclose(result.duration_seconds, 2)
    assert Fraction(result.video.frame_ticks[-1], 90_000) == Fraction(59, 30)
