"""Sound in a file of its own: read with the clip's times on one clock, checked like a video."""

import json
import tarfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from ca2st.errors import UserInputError
from sharding.conversion import convert
from sharding.datasets import DatasetRequest, read_dataset
from sharding.errors import AnnotationError, ConversionRefusedError, MediaError
from sharding.folder import SourcesFile, read_rejects
from sharding.media.encode import encode_clip
from sharding.settings import ConversionConfig, RejectBudget
from sharding.source import SourceList, SourceSample
from sharding.verify import verify_shard_set
from support.annotations import write_lines
from support.media import Sound, make_clip, remux
from support.sound import beeps_of

BEEPS = (0.5, 1.5, 2.5, 3.5)
RATE = 48_000


def write_beeps(path: Path, *, codec: str, seconds: float = 4.0) -> Path:
    """Sound alone: a tone of 1 kHz for 80 ms from each of BEEPS on."""
    moments = np.arange(round(seconds * RATE)) / RATE
    is_on = np.any([(moments >= beep) & (moments < beep + 0.08) for beep in BEEPS], axis=0)
    tone = (0.5 * np.sin(2 * np.pi * 1000 * moments) * is_on * 32767).astype(np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        fitting = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=RATE)
        for part in fitting.resample(frame):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path


def clip_with(video: Path, sound: Path, start: float | None = None, end: float | None = None, **options):
    one = SourceSample(
        sample_id="a",
        path=video,
        sound_path=sound,
        start_seconds=start,
        end_seconds=end,
        labels=(0,),
        where="list.csv:2",
    )
    return encode_clip(ConversionConfig(**options).job(one))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("silent") / "a.mp4", seconds=4, fps=10)


@pytest.mark.parametrize(
    ("ending", "codec"), [("wav", "pcm_s16le"), ("flac", "flac"), ("m4a", "aac"), ("ogg", "libopus")]
)
def test_sound_of_another_file_lies_at_the_times_of_the_clip(
    video: Path, tmp_path: Path, ending: str, codec: str
) -> None:
    sound = write_beeps(tmp_path / f"a.{ending}", codec=codec)
    whole = clip_with(video, sound)
    assert beeps_of(whole.audio.pcm) == pytest.approx(BEEPS, abs=0.003)
    part = clip_with(video, sound, 1.2, 3.0)
    assert beeps_of(part.audio.pcm, 1.2) == pytest.approx([1.5, 2.5], abs=0.003)
    assert (whole.has_audio, whole.sound_bytes) == (True, sound.stat().st_size)


def test_both_files_start_at_the_same_moment_when_the_first_picture_comes_later(tmp_path: Path) -> None:
    with_sound = make_clip(tmp_path / "a.mkv", seconds=3, fps=10, sound=Sound(seconds=3, codec="flac"))
    late = remux(with_sound, tmp_path / "late.mkv", lambda kind, at: at + 0.4 if kind == "video" else at)
    sound = write_beeps(tmp_path / "a.wav", codec="pcm_s16le")
    assert beeps_of(clip_with(late, sound, 0.2, 2.2).audio.pcm, 0.2) == pytest.approx([0.5, 1.5], abs=0.003)
    whole = clip_with(late, sound)  # begins with the first picture, 0.4 s behind the start
    assert beeps_of(whole.audio.pcm, 0.4)[:2] == pytest.approx([0.5, 1.5], abs=0.003)


def test_the_own_sound_of_the_video_is_not_heard_beside_the_other_file(tmp_path: Path) -> None:
    loud = make_clip(tmp_path / "loud.mp4", seconds=4, fps=10, sound=Sound(seconds=4, amplitude=0.9, hz=3000))
    sound = write_beeps(tmp_path / "a.wav", codec="pcm_s16le")
    pcm = clip_with(loud, sound).audio.pcm
    assert np.abs(pcm[: round(0.4 * 16_000)]).max() < 1e-3


def damaged(path: Path, kind: str) -> Path:
    data = path.read_bytes()
    if kind == "frames":  # cut between two packets: nothing in it is damaged
        with av.open(str(path)) as container:
            places = [packet.pos for packet in container.demux() if packet.size]
        path.write_bytes(data[: places[len(places) // 2]])
        return path
    if kind == "text":
        path.write_text("no sound at all, " * 50)
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(data[: len(data) // 2])
    return path


@pytest.mark.parametrize(
    ("ending", "codec", "kind", "reason"),
    [
        ("wav", "pcm_s16le", "text", "not_a_sound"),
        ("wav", "pcm_s16le", "empty", "empty_file"),
        ("wav", "pcm_s16le", "half", "truncated"),
        ("flac", "flac", "half", "decode_error"),
        ("flac", "flac", "frames", "truncated"),
        ("m4a", "aac", "half", "truncated"),
    ],
)
def test_c4_damage_of_the_sounds_own_file_has_its_reason_and_name(
    video: Path, tmp_path: Path, ending: str, codec: str, kind: str, reason: str
) -> None:
    sound = damaged(write_beeps(tmp_path / f"a.{ending}", codec=codec), kind)
    with pytest.raises(MediaError, match=rf"the sound's own file a\.{ending}: ") as caught:
        clip_with(video, sound)
    assert caught.value.reason in (reason, "no_index")


def test_a_sounds_own_file_without_sound_is_as_a_video_without(video: Path) -> None:
    with pytest.raises(MediaError, match="expected sound in the segment, found no audio stream"):
        clip_with(video, video)
    assert clip_with(video, video, audio_policy="optional").has_audio is False


def read(tmp_path: Path, rows: list[str], **options) -> SourceList:
    annotations = write_lines(tmp_path / "list.csv", ["path,label,audio", *rows])
    return read_dataset("csv", DatasetRequest(annotations=annotations, media=tmp_path / "media", **options))


def test_a_list_names_the_files_of_picture_and_sound(tmp_path: Path) -> None:
    for folder in ("media", "sound"):
        (tmp_path / folder).mkdir()
    for name in "abc":
        make_clip(tmp_path / "media" / f"{name}.mp4", seconds=1, fps=10, sound=Sound() if name == "c" else None)
    write_beeps(tmp_path / "sound/a.wav", codec="pcm_s16le")
    damaged(write_beeps(tmp_path / "sound/b.wav", codec="pcm_s16le"), "half")
    source = read(tmp_path, ["a.mp4,x,a.wav", "b.mp4,y,b.wav", "c.mp4,x,"], audio_root=tmp_path / "sound")
    out, config = tmp_path / "out", ConversionConfig(max_rejects=RejectBudget(count=1))
    report = convert(source, out, config)
    assert (report.num_with_audio, dict(report.rejected)) == (2, {"truncated": 1})
    assert "the sound's own file b.wav" in read_rejects(out)[0].what
    with tarfile.open(out / "ca2st-000000.tar") as tar:
        said = [json.loads(tar.extractfile(one).read())["audio"] for one in tar if one.name.endswith(".json")]
    size = (tmp_path / "sound/a.wav").stat().st_size
    assert (said[0]["source"], said[0]["source_bytes"], "source" in said[1]) == ("a.wav", size, False)
    assert verify_shard_set(out) == []
    known = SourcesFile(out).of("ca2st-000000.tar")
    assert known is not None
    assert [len(state) for state in known.states] == [4, 4, 2]
    write_beeps(tmp_path / "sound/a.wav", codec="pcm_s16le", seconds=3)
    with pytest.raises(ConversionRefusedError, match=r"1 source files \(.*sound/a\.wav: .* bytes, now"):
        convert(source, out, config)
    report = convert(source, out, replace(config, update=True))
    assert report.num_with_audio == 2


def test_another_sound_is_another_list(tmp_path: Path) -> None:
    lists = [read(tmp_path, [f"a.mp4,x{end}"], check_media=False) for end in (",", ",a.wav", ",b.wav")]
    assert len({one.sha256 for one in lists}) == 3


def test_a_missing_sound_is_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    for name in ("a.mp4", "b.mp4", "b.wav"):
        (tmp_path / "media" / name).write_bytes(b"x")
    rows = ["a.mp4,x,a.wav", "b.mp4,x,b.wav"]
    with pytest.raises(
        AnnotationError, match=r":2:9: audio: expected an existing file inside --media .*, found 'a\.wav'"
    ):
        read(tmp_path, rows)
    source = read(tmp_path, rows, max_missing=RejectBudget(fraction=0.5))
    assert [one.sample_id for one in source.samples] == ["b.mp4"]
    assert source.notes["samples without a media file"] == (f"{tmp_path / 'list.csv'}:2",)


def test_c12_a_sound_outside_its_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"audio: expected a file inside --audio-root .*, found '\.\./a\.wav'"):
        read(tmp_path, ["a.mp4,x,../a.wav"], check_media=False, audio_root=tmp_path / "sound")


def test_an_audio_root_without_a_use_is_refused(tmp_path: Path) -> None:
    annotations = write_lines(tmp_path / "list.csv", ["path,label", "a.mp4,x"])
    request = DatasetRequest(annotations=annotations, audio_root=tmp_path, check_media=False)
    with pytest.raises(UserInputError, match="--audio-root: expected a column audio in"):
        read_dataset("csv", request)
    with pytest.raises(UserInputError, match="--audio-root: --dataset folder does not use it, only csv does"):
        read_dataset("folder", request)
    (tmp_path / "media").mkdir()
    with pytest.raises(UserInputError, match=r"--audio-root .*nowhere: expected a folder, found none"):
        read(tmp_path, ["a.mp4,x,a.wav"], audio_root=tmp_path / "nowhere")
