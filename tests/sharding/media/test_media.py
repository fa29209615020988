"""Probing, strict decoding and the reasons of rejects (C4, C5.5, C7, C13)."""

import math
import socket
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import av
import pytest

from ca2st.errors import UserInputError
from sharding.errors import MediaError, RejectReason
from sharding.media import claims
from sharding.media.claims import MediaLimits, check_unchanged, source_state
from sharding.media.encode import EncodedClip, encode_clip
from sharding.settings import ConversionConfig
from sharding.source import SourceSample
from support.media import DAMAGES, Sound, boxes, damage, make_clip


def convert_one(path: Path, start: float | None = None, end: float | None = None, **options: object) -> EncodedClip:
    """Encode one segment in this process."""
    sample = SourceSample(
        sample_id=path.stem, path=path, start_seconds=start, end_seconds=end, labels=(0,), where="list.csv:1"
    )
    return encode_clip(ConversionConfig(**({"audio_policy": "optional"} | options)).job(sample))  # type: ignore[arg-type]  # test options


def reason_of(path: Path, start: float | None = None, end: float | None = None, **options: object) -> str:
    with pytest.raises(MediaError) as caught:
        convert_one(path, start, end, **options)
    assert caught.value.reason in get_args(RejectReason)
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
    "bad_stsz": "decode_error",
    "picture_file": "not_a_video",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_c4_a_damaged_file_is_rejected_with_its_own_reason(clip: Path, tmp_path: Path, kind: str) -> None:
    assert reason_of(damage(clip, tmp_path / "x.mp4", kind)) == EXPECTED[kind]


@pytest.mark.parametrize("movie_flags", ["faststart", "frag_keyframe+empty_moov"], ids=["index_in_front", "fragmented"])
def test_c4_half_an_mp4_with_its_index_in_front_is_truncated(tmp_path: Path, movie_flags: str) -> None:
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


REFERENCES = {
    "concat": "ffconcat version 1.0\nfile part.mp4\n",
    "playlist": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.5,\npart.mp4\n#EXT-X-ENDLIST\n",
    "remote playlist": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.5,\n{server}/part.ts\n#EXT-X-ENDLIST\n",
    "remote concat": "ffconcat version 1.0\nfile {server}/part.mp4\n",
    "manifest": "<MPD xmlns='urn:mpeg:dash:schema:mpd:2011' type='static'><BaseURL>{server}/</BaseURL></MPD>",
    "session": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "redirection": "<ASX version='3.0'><Entry><Ref href='{server}/part.mp4'/></Entry></ASX>",
    "shortcut": "[Reference]\nRef1={server}/part.mp4\n",
}


@pytest.mark.parametrize("suffix", ["mp4", "m3u8", "ffconcat"])
@pytest.mark.parametrize("kind", REFERENCES)
def test_c4_a_file_that_only_names_other_files_is_no_video_and_none_of_them_is_opened(
    tmp_path: Path, kind: str, suffix: str
) -> None:
    make_clip(tmp_path / "part.mp4", seconds=0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        path = tmp_path / f"list.{suffix}"
        path.write_text(REFERENCES[kind].format(server=f"http://127.0.0.1:{server.getsockname()[1]}"))
        assert reason_of(path) == "not_a_video"
        with pytest.raises(BlockingIOError):
            server.accept()


def test_c4_a_movie_whose_pictures_lie_in_another_file_is_not_followed_there(clip: Path, tmp_path: Path) -> None:
    """`dref` as QuickTime writes it: an alias of another file instead of "in this file"."""
    data = clip.read_bytes()
    at = data.index(b"\x00\x00\x00\x0curl \x00\x00\x00\x01")
    name = str(tmp_path / "other.mp4").encode()
    alias = bytes(150) + (2).to_bytes(2, "big") + len(name).to_bytes(2, "big") + name + b"\xff\xff\0\0"
    entry = (12 + len(alias)).to_bytes(4, "big") + b"alis" + bytes(4) + alias
    added = len(entry) - 12
    moved = bytearray(data[:at] + entry + data[at + 12 :])
    for box in (b"dref", b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        place = moved.rindex(box, 0, at) - 4 if box != b"moov" else moved.index(box) - 4
        size = int.from_bytes(moved[place : place + 4], "big") + added
        moved[place : place + 4] = size.to_bytes(4, "big")
    (tmp_path / "other.mp4").write_bytes(data)
    (mdat,) = (box for box in boxes(data) if box[0] == "mdat")
    (moov,) = (box for box in boxes(data) if box[0] == "moov")
    assert moov[1] > mdat[1], "chunks do not move"
    moved[mdat[1] + 8 : mdat[1] + mdat[2]] = bytes(mdat[2] - 8)  # the pictures are in the other file alone
    (tmp_path / "x.mp4").write_bytes(moved)
    assert reason_of(tmp_path / "x.mp4") == "decode_error"


def test_only_plain_files_may_be_opened_whatever_a_container_names(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No demuxer that is allowed opens anything by itself today; one that did would find no other protocol."""
    asked: list[str | None] = []
    real = av.open

    def opened(name: object, mode: str, **named: Any) -> Any:
        if mode == "r":
            asked.append(named["options"].get("protocol_whitelist"))
        return real(name, mode, **named)

    monkeypatch.setattr(av, "open", opened)
    convert_one(clip)
    assert asked
    assert set(asked) == {"file"}


def test_names_that_look_like_protocols_or_options_are_only_names(clip: Path, tmp_path: Path) -> None:
    for name in ("concat:a|b.mp4", "-y.mp4", "naïve 映像 %d.mp4"):
        (tmp_path / name).write_bytes(clip.read_bytes())
        assert len(convert_one(tmp_path / name).video.frame_ticks) == 60


def test_a_missing_file_and_a_folder_are_missing(tmp_path: Path) -> None:
    assert reason_of(tmp_path / "nowhere.mp4") == "missing_file"
    assert reason_of(tmp_path) == "missing_file"


def test_sound_without_a_picture_is_no_video(tmp_path: Path, clip: Path) -> None:
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


@pytest.mark.parametrize(("side", "reason"), [(16_000, "too_large"), (60_000, "decode_error")])
def test_c4_a_picture_of_too_many_pixels_is_rejected(tmp_path: Path, side: int, reason: str) -> None:
    """The second is more than FFmpeg itself takes; both are told by the headers, before any memory is used."""
    whole = make_clip(tmp_path / "a.avi", seconds=0.2, codec="mjpeg", pixel_format="yuvj420p", size=(64, 48))
    huge = whole.read_bytes()
    for order, width, first, second in (("big", 2, 48, 64), ("little", 4, 64, 48)):  # in the JPEGs, in the AVI
        changed = huge.replace(
            first.to_bytes(width, order) + second.to_bytes(width, order), side.to_bytes(width, order) * 2
        )
        assert changed != huge
        huge = changed
    (tmp_path / "huge.avi").write_bytes(huge)
    assert reason_of(tmp_path / "huge.avi") == reason


@pytest.mark.parametrize("of", ["picture", "sound"])
def test_c4_an_encrypted_stream_is_named(clip: Path, tmp_path: Path, of: str) -> None:
    key = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "0f" * 16, "encryption_kid": "01" * 16}
    path = make_clip(tmp_path / "a.mp4", seconds=1, size=(160, 120), sound=Sound(), container_options=key)
    assert b"encv" in path.read_bytes()
    if of == "sound":
        path.write_bytes(clip.read_bytes().replace(b"mp4a", b"drms"))
    assert reason_of(path) == "encrypted"
    with pytest.raises(MediaError, match=f"expected a {'video' if of == 'picture' else 'audio'} stream in the clear"):
        convert_one(path)
    if of == "sound":
        assert len(convert_one(path, audio_policy="none").video.frame_ticks) == 60


def test_a_source_that_changes_while_it_is_read_is_rejected(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip.read_bytes())
    real = claims.open_media

    def touching(target: Path, **kind: bool):
        path.write_bytes(clip.read_bytes() + b"\0" * 16)
        return real(target, **kind)

    monkeypatch.setattr(claims, "open_media", touching)
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
    with pytest.raises(MediaError, match="expected the video in a codec that PyAV decodes, found an unknown one"):
        convert_one(tmp_path / "x.mp4")


def test_facts_of_the_source_are_kept(clip: Path) -> None:
    result = convert_one(clip)
    assert result.source_size == (160, 120)
    assert result.source_bytes == clip.stat().st_size
    assert result.source_codec == "h264"
    assert math.isclose(result.source_frames_per_second, 30)
    assert math.isclose(result.duration_seconds, 2)
    assert Fraction(result.video.frame_ticks[-1], 90_000) == Fraction(59, 30)
