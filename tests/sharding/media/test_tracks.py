"""Which of several pictures and sound tracks is taken."""

from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from sharding.errors import MediaError
from sharding.media.encode import EncodedClip
from support.media import Sound, Track, make_clip, with_tracks
from support.sound import RATE, convert_one

NONE = Disposition(0)
LOW, HIGH, SILENT, STEREO = "low", "high", "silent", "stereo"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pictures of two sizes, and sounds that differ in pitch, loudness or channels."""
    folder = tmp_path_factory.mktemp("parts")
    sounds = {
        LOW: Sound(hz=500, layout="mono"),
        HIGH: Sound(hz=3000, layout="mono"),
        SILENT: Sound(amplitude=0, layout="mono"),
        STEREO: Sound(hz=2000, layout="stereo"),
    }
    found = {name: make_clip(folder / f"{name}.mkv", sound=sound) for name, sound in sounds.items()}
    found |= {"large": make_clip(folder / "large.mkv", size=(160, 120))}
    return found | {"small": make_clip(folder / "small.mkv", size=(48, 32))}


def hz_of(clip: EncodedClip) -> float:
    assert clip.audio is not None
    spectrum = np.abs(np.fft.rfft(clip.audio.pcm))
    return float(spectrum.argmax() * RATE / len(clip.audio.pcm))


def clip_with(
    path: Path, parts: dict[str, Path], sounds: list[tuple[str, Disposition]], **options: object
) -> EncodedClip:
    picture = Track(source=parts["large"], kind="video", disposition=Disposition.default)
    tracks = [Track(source=parts[name], disposition=flags, language="eng") for name, flags in sounds]
    return convert_one(with_tracks(path, [picture, *tracks]), **({"audio_policy": "optional"} | options))


DEFAULT, COMMENT = Disposition.default, Disposition.comment


@pytest.mark.parametrize(
    ("sounds", "hz"),
    [
        ([(HIGH, NONE), (LOW, DEFAULT)], 500),
        ([(HIGH, DEFAULT), (LOW, NONE)], 3000),
        ([(HIGH, NONE), (LOW, NONE)], 3000),
        ([(SILENT, NONE), (LOW, NONE), (HIGH, NONE)], 500),
        ([(SILENT, NONE), (LOW, DEFAULT)], 500),
        ([(LOW, DEFAULT), (STEREO, DEFAULT)], 2000),
        ([(LOW, DEFAULT), (HIGH, DEFAULT)], 500),
        ([(SILENT, DEFAULT), (HIGH, DEFAULT)], 3000),
        ([(HIGH, COMMENT), (LOW, NONE)], 500),
        ([(HIGH, DEFAULT | COMMENT), (LOW, NONE)], 500),
        ([(HIGH, Disposition.visual_impaired), (LOW, NONE)], 500),
        ([(HIGH, Disposition.hearing_impaired), (LOW, NONE)], 500),
        ([(HIGH, COMMENT)], 3000),
    ],
)
def test_c6_the_default_sound_is_taken_else_the_first_that_is_not_silent_and_no_commentary(
    tmp_path: Path, parts: dict[str, Path], sounds: list[tuple[str, Disposition]], hz: float
) -> None:
    clip = clip_with(tmp_path / "a.mkv", parts, sounds)
    assert hz_of(clip) == pytest.approx(hz, abs=2)
    several = {"one of several sound tracks"} if len(sounds) > 1 else set()
    assert set(clip.notes) == several
    assert ("audio_track" in clip.changes) == bool(several)


def test_the_track_that_was_taken_is_recorded_with_its_language(tmp_path: Path, parts: dict[str, Path]) -> None:
    clip = clip_with(tmp_path / "a.mkv", parts, [(HIGH, NONE), (LOW, DEFAULT)])
    assert clip.changes == {"audio_track": {"index": 2, "of": 2, "language": "eng"}}
    assert "audio_track" not in clip_with(tmp_path / "b.mkv", parts, [(HIGH, NONE)]).changes
    assert clip_with(tmp_path / "c.mkv", parts, [(HIGH, NONE), (LOW, DEFAULT)], audio_policy="none").changes == {}


def test_a_silent_default_is_what_players_play_and_is_noted(tmp_path: Path, parts: dict[str, Path]) -> None:
    clip = clip_with(tmp_path / "a.mkv", parts, [(SILENT, DEFAULT), (LOW, NONE)])
    assert not clip.has_audio
    assert clip.notes == ("silent sound", "one of several sound tracks")
    assert clip.changes["audio_track"]["index"] == 1


def test_mp4_flags_one_track_and_it_is_taken(tmp_path: Path, parts: dict[str, Path]) -> None:
    clip = clip_with(tmp_path / "a.mp4", parts, [(SILENT, NONE), (LOW, DEFAULT)])
    assert hz_of(clip) == pytest.approx(500, abs=2)


def test_a_track_that_nobody_decodes_does_not_hide_one_that_is_read(tmp_path: Path, parts: dict[str, Path]) -> None:
    path = with_tracks(
        tmp_path / "a.mkv",
        [
            Track(source=parts["large"], kind="video", disposition=DEFAULT),
            Track(source=parts[HIGH], disposition=DEFAULT),
            Track(source=parts[LOW]),
        ],
    )
    data = path.read_bytes()
    path.write_bytes(data.replace(b"A_AAC", b"A_ZZZ", 1))
    with av.open(str(path)) as container:
        assert container.streams.audio[0].codec_context is None, "the file does not show what is tested"
    clip = convert_one(path)
    assert hz_of(clip) == pytest.approx(500, abs=2)
    assert clip.changes["audio_track"]["index"] == 2
    path.write_bytes(data.replace(b"A_AAC", b"A_ZZZ"))
    with pytest.raises(MediaError, match="expected the audio in a codec that PyAV decodes, found an unknown one"):
        convert_one(path)


@pytest.mark.parametrize(
    ("pictures", "size", "notes"),
    [
        ([("small", NONE), ("large", DEFAULT)], (160, 120), {"one of several pictures"}),
        ([("small", NONE), ("large", NONE)], (160, 120), {"one of several pictures"}),
        ([("small", DEFAULT), ("large", NONE)], (48, 32), {"one of several pictures"}),
        ([("small", DEFAULT), ("large", DEFAULT)], (160, 120), {"one of several pictures"}),
        ([("large", NONE), ("small", NONE)], (160, 120), {"one of several pictures"}),
        ([("small", NONE)], (48, 32), set()),
    ],
)
def test_the_default_picture_is_taken_else_the_largest(
    tmp_path: Path,
    parts: dict[str, Path],
    pictures: list[tuple[str, Disposition]],
    size: tuple[int, int],
    notes: set[str],
) -> None:
    tracks = [Track(source=parts[name], kind="video", disposition=flags) for name, flags in pictures]
    clip = convert_one(with_tracks(tmp_path / "a.mkv", tracks), audio_policy="optional")
    assert clip.source_size == size
    assert set(clip.notes) == notes
    assert ("video_track" in clip.changes) == bool(notes)


def test_a_cover_picture_is_never_taken_though_it_is_larger(tmp_path: Path, parts: dict[str, Path]) -> None:
    cover = make_clip(tmp_path / "cover.mkv", seconds=1 / 30, size=(320, 240), codec="mjpeg", pixel_format="yuvj420p")
    tracks = [
        Track(source=cover, kind="video", disposition=Disposition.attached_pic),
        Track(source=parts["small"], kind="video"),
    ]
    path = with_tracks(tmp_path / "a.mp4", tracks)
    with av.open(str(path)) as container:
        assert any(stream.disposition & Disposition.attached_pic for stream in container.streams.video)
    clip = convert_one(path, audio_policy="optional")
    assert clip.source_size == (48, 32)
    assert clip.notes == (), "a cover is no choice"
