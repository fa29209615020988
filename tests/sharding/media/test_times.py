"""Where a clip's frames stand in time: the clock of annotations, best-effort times, files that begin anywhere (C7)."""

import io
import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from ca2st.errors import UserInputError
from ca2st.spec import ClipSpec
from pipelines.config import EvaluationSetup, LoaderConfig
from pipelines.loader import EvaluationLoader
from pipelines.views import SamplingConfig
from sharding.conversion import convert
from sharding.errors import ConversionRefusedError, MediaError
from sharding.format.index import decode_index
from sharding.format.shard_set import MANIFEST_NAME, read_manifest, read_shard_set
from sharding.media.encode import EncodedClip, EncodedVideo, encode_clip
from sharding.settings import ConversionConfig, conversion_identity
from sharding.source import SourceSample
from support.media import Sound, make_clip, read_number
from support.shards import sample, source_list

TICK = 90_000
RATE = 16_000


def convert_one(path: Path, start: float | None = None, end: float | None = None, **options: object) -> EncodedClip:
    one = SourceSample(
        sample_id=path.stem, path=path, start_seconds=start, end_seconds=end, labels=(0,), where="list.csv:1"
    )
    return encode_clip(ConversionConfig(**({"audio_policy": "none"} | options)).job(one))  # type: ignore[arg-type]  # test options


def numbers(video: EncodedVideo) -> list[int]:
    with av.open(io.BytesIO(video.mp4)) as container:
        return [read_number(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def remuxed(
    source: Path,
    target: Path,
    *,
    later: Mapping[str, float] | None = None,
    first_packet: int = 0,
    options: Mapping[str, str] | None = None,
) -> Path:
    """Copy the packets, each kind of stream `later` by so many seconds, video from its packet `first_packet` on."""
    with av.open(str(source)) as reader, av.open(str(target), "w", options=dict(options or {})) as writer:
        streams = {stream.index: writer.add_stream_from_template(stream) for stream in reader.streams}
        num_video = 0
        for packet in reader.demux():
            if packet.dts is None or packet.pts is None or packet.time_base is None:
                continue
            if packet.stream.type == "video":
                num_video += 1
                if num_video <= first_packet:
                    continue
            shift = round((later or {}).get(packet.stream.type, 0) / packet.time_base)
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            packet.stream = streams[packet.stream.index]
            writer.mux(packet)
    return target


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seconds of numbered frames at 25 fps with a tone from the first on."""
    folder = tmp_path_factory.mktemp("clips")
    return make_clip(folder / "loud.mp4", seconds=4, fps=25, b_frames=2, sound=Sound(seconds=4))


@pytest.mark.parametrize(("name", "first"), [("late.mp4", 13), ("late.mkv", 12), ("late.ts", 12)])
def test_seconds_count_from_the_start_of_the_file_where_the_picture_starts_late(
    loud: Path, tmp_path: Path, name: str, first: int
) -> None:
    """Frame n is shown at 0.5 + n / 25 s: frame 13 at 1.02 s; one earlier where the sound's lead-in of 21 ms counts.

    The numbers are those of `ffmpeg -ss 1 -t 1`.
    """
    late = remuxed(loud, tmp_path / name, later={"video": 0.5})
    result = convert_one(late, 1.0, 2.0, audio_policy="required")
    assert numbers(result.video) == list(range(first, first + 25))
    assert result.video.frame_ticks[0] == pytest.approx({13: 1800, 12: 120}[first], abs=45)
    assert "picture starts late" in result.notes
    assert result.changes["picture_starts_seconds"] == pytest.approx(0.5, abs=0.03)
    assert result.audio is not None
    assert len(result.audio.pcm) == RATE


def test_seconds_count_from_the_first_picture_where_that_is_asked_for(loud: Path, tmp_path: Path) -> None:
    late = remuxed(loud, tmp_path / "late.mp4", later={"video": 0.5})
    result = convert_one(late, 1.0, 2.0, clock="first-frame")
    assert numbers(result.video) == list(range(25, 50))
    assert result.video.frame_ticks[0] == 0
    assert "picture starts late" in result.notes


def test_a_file_whose_streams_start_together_is_cut_alike_by_both_clocks(loud: Path) -> None:
    by_file, by_picture = (convert_one(loud, 1.0, 2.0, clock=clock) for clock in ("file", "first-frame"))
    assert by_file == by_picture
    assert numbers(by_file.video) == list(range(25, 50))
    assert by_file.notes == ()
    assert by_file.changes == {}


def test_a_segment_in_front_of_a_late_picture_is_outside(loud: Path, tmp_path: Path) -> None:
    late = remuxed(loud, tmp_path / "late.mp4", later={"video": 0.5})
    with pytest.raises(MediaError, match="expected the segment inside the media, found no frame there") as caught:
        convert_one(late, 0.1, 0.4)
    assert caught.value.reason == "segment_outside"
    result = convert_one(late, 0.3, 0.6)
    assert numbers(result.video) == [0, 1, 2]
    assert result.video.frame_ticks == (18_000, 21_600, 25_200)


def test_a_whole_file_starts_at_its_first_picture_and_sound_keeps_its_place(tmp_path: Path) -> None:
    """A tone that starts 0.75 s behind the first picture stays there, though the file starts 0.25 s before both."""
    loud = make_clip(tmp_path / "a.mkv", seconds=2, sound=Sound(seconds=1, delay_seconds=0.5, codec="flac"))
    late = remuxed(loud, tmp_path / "late.mkv", later={"video": 1.0})
    result = convert_one(late, audio_policy="required")
    assert result.video.frame_ticks[0] == 0
    assert result.audio is not None
    assert len(result.audio.pcm) == pytest.approx(0.5 * RATE, abs=20)
    assert "picture starts late" in result.notes
    whole = convert_one(loud, audio_policy="required")
    assert whole.audio is not None
    assert np.flatnonzero(np.abs(whole.audio.pcm) > 0.1)[0] == pytest.approx(0.5 * RATE, abs=20)
    assert "picture starts late" not in whole.notes


def test_a_transport_stream_that_starts_at_1_4_seconds_counts_from_there(loud: Path, tmp_path: Path) -> None:
    stream = remuxed(loud, tmp_path / "a.ts", later={"video": 1.4, "audio": 1.4})
    with av.open(str(stream)) as container:
        assert container.start_time is not None
        assert container.start_time > 1_000_000
    assert numbers(convert_one(stream, 1.0, 2.0).video)[0] in (24, 25)  # the sound leads by up to 23 ms
    assert len(convert_one(stream).video.frame_ticks) == 100


def test_a_start_on_a_frame_keeps_it_though_the_file_tells_its_start_in_microseconds(tmp_path: Path) -> None:
    """Starts of thirds of a second are rounded in the container's start time, up or down."""
    for first in (1 / 3, 2 / 3):
        path = make_clip(tmp_path / "a.ts", times=[first + number / 30 for number in range(60)])
        assert numbers(convert_one(path, 1.0, 1.1).video) == [30, 31, 32]


def test_an_mp4_with_a_negative_or_trimmed_start_counts_from_what_is_shown(tmp_path: Path) -> None:
    """An edit list that leaves out the first half second: the first frame shown is number 15."""
    plain = make_clip(tmp_path / "plain.mp4", seconds=2, gop=5)
    trimmed = remuxed(plain, tmp_path / "trimmed.mp4", later={"video": -0.5}, options={"use_editlist": "1"})
    first = numbers(convert_one(trimmed).video)[0]
    assert first in (0, 15)
    assert numbers(convert_one(trimmed, 0.5, 0.7).video) == [first + 15 + number for number in range(6)]


def test_h264_with_b_frames_in_avi_has_ffmpegs_best_effort_times(tmp_path: Path) -> None:
    """AVI stores no presentation times: by ffmpeg's best_effort_timestamp frames are 1 / 25 s apart."""
    path = make_clip(tmp_path / "a.avi", seconds=1, fps=25, b_frames=3)
    result = convert_one(path)
    assert numbers(result.video) == list(range(25))
    assert result.video.frame_ticks == tuple(3600 * number for number in range(25))
    assert result.duration_seconds == pytest.approx(1.0)
    with av.open(str(path)) as container:
        assert not all(frame.pts == number for number, frame in enumerate(container.decode(video=0))), "no help needed"


@pytest.mark.parametrize("open_groups", [False, True])
@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_a_transport_stream_that_begins_inside_a_group_of_pictures_begins_at_its_first_key_frame(
    tmp_path: Path, codec: str, open_groups: bool
) -> None:
    options = {"x264-params": f"open-gop={int(open_groups)}:keyint=24:scenecut=0"} if codec == "libx264" else {}
    whole = make_clip(tmp_path / "whole.ts", seconds=4, codec=codec, gop=24, b_frames=2, codec_options=options)
    data = whole.read_bytes()
    path = tmp_path / "a.ts"
    path.write_bytes(data[: 3 * 188] + data[len(data) // 5 // 188 * 188 :])  # behind the tables that name the streams
    # FFmpeg's parser of MPEG-2 gives nothing from before a sequence header
    require_begun_at_a_key_frame(path, num_frames=120, is_noticed=codec == "libx264")


@pytest.mark.parametrize("name", ["a.flv", "a.mkv"])
def test_a_recording_that_begins_inside_a_group_of_pictures_begins_at_its_first_key_frame(
    tmp_path: Path, name: str
) -> None:
    whole = make_clip(tmp_path / "whole.mkv", seconds=4, gop=24, b_frames=2)
    require_begun_at_a_key_frame(remuxed(whole, tmp_path / name, first_packet=10), num_frames=120)


def require_begun_at_a_key_frame(path: Path, *, num_frames: int, is_noticed: bool = True) -> None:
    result = convert_one(path)
    found = numbers(result.video)
    assert found == list(range(found[0], num_frames))
    assert 10 < found[0] <= 50
    assert np.diff(result.video.frame_ticks).tolist() == pytest.approx([3000] * (len(found) - 1), abs=91)
    if is_noticed:
        assert "began inside a group of pictures" in result.notes
        assert result.changes["skipped_packets_before_key_frame"] > 1
    later = numbers(convert_one(path, 2.2, 2.4).video)
    assert later == list(range(later[0], later[0] + 6)), "reached by a seek"


def test_a_file_without_any_key_frame_is_refused(tmp_path: Path) -> None:
    whole = make_clip(tmp_path / "whole.mkv", seconds=1, gop=60)
    with pytest.raises(MediaError, match="expected at least one frame, found none"):
        convert_one(remuxed(whole, tmp_path / "a.ts", first_packet=1))


def test_of_two_frames_at_one_time_the_later_stays_as_players_show(tmp_path: Path) -> None:
    """Milliseconds hold no two frames within 0.4 ms: Matroska gives both the same time."""
    path = make_clip(tmp_path / "a.mkv", times=[0, 0.1, 0.1001, 0.2, 0.3], gop=1)
    result = convert_one(path)
    assert numbers(result.video) == [0, 2, 3, 4]
    assert result.video.frame_ticks == (0, 9000, 18_000, 27_000)
    assert result.notes == ("frames at the same time",)
    assert result.changes == {"replaced_frames_at_the_same_time": 1}


@pytest.mark.parametrize(("end", "is_short"), [(31.0, True), (0.6, True), (0.53, False), (0.5, False), (0.4, False)])
def test_a_segment_that_the_media_does_not_fill_is_noted_as_shorter_than_annotated(
    tmp_path: Path, end: float, is_short: bool
) -> None:
    """Half a second of media at 30 fps; a frame or a twentieth of the segment is within an annotation's rounding."""
    result = convert_one(make_clip(tmp_path / "a.mp4", seconds=0.5), 0.0, end)
    assert result.notes == (("shorter than annotated",) if is_short else ())
    assert result.duration_seconds == pytest.approx(min(end, 0.5))


def test_the_clock_is_part_of_the_conversion_and_of_the_manifest(tmp_path: Path, loud: Path) -> None:
    source = source_list([sample(loud)])
    other = ConversionConfig(audio_policy="none", clock="first-frame")
    assert conversion_identity(source, other) != conversion_identity(source, ConversionConfig(audio_policy="none"))
    convert(source, tmp_path / "a", ConversionConfig(audio_policy="none"))
    convert(source, tmp_path / "b", other)
    assert read_manifest(tmp_path / "a").clock == "file"
    assert read_manifest(tmp_path / "b").clock == "first-frame"
    assert "clock" not in json.loads((tmp_path / "b" / MANIFEST_NAME).read_text()), "as sets from before have it"
    with pytest.raises(ConversionRefusedError, match="clock: there 'file', now 'first-frame'"):
        convert(source, tmp_path / "a", other)


def test_an_unknown_clock_lists_the_known_ones() -> None:
    with pytest.raises(UserInputError, match="clock: expected one of file, first-frame, found 'wall'"):
        ConversionConfig(clock="wall")


@pytest.mark.parametrize("first", [95_440.5, 95_443.0])
def test_a_transport_stream_whose_clock_of_33_bits_starts_over_keeps_its_times(
    loud: Path, tmp_path: Path, first: float
) -> None:
    stream = remuxed(loud, tmp_path / "a.ts", later={"video": first, "audio": first})
    whole = convert_one(stream, audio_policy="required")
    assert numbers(whole.video) == list(range(100))
    assert whole.video.frame_ticks == tuple(3600 * number for number in range(100))
    for start in (0.5, 2.5, 3.3):
        found = numbers(convert_one(stream, start, start + 0.4).video)
        assert abs(found[0] - start * 25) <= 1
        assert found == list(range(found[0], found[0] + 10))


def test_a_late_segment_of_a_program_stream_with_one_key_frame_is_reached(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mpg", seconds=4, codec="mpeg2video", gop=200)
    assert numbers(convert_one(path, 2.5, 2.7).video) == [75, 76, 77, 78, 79, 80]


def test_times_that_jump_ahead_are_a_freeze_and_times_that_go_back_are_refused(tmp_path: Path) -> None:
    ahead = make_clip(tmp_path / "ahead.flv", times=[*(n / 30 for n in range(30)), *(5 + n / 30 for n in range(30))])
    assert numbers(convert_one(ahead, 2.5, 3.0).video) == [29]
    assert numbers(convert_one(ahead, 5.0, 5.1).video) == [30, 31, 32]
    data = bytearray(ahead.read_bytes())
    with av.open(str(ahead)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.pos]
    for place in places[30:]:  # the time of a tag: three bytes and a fourth for the highest
        data[place + 4 : place + 8] = (100).to_bytes(3, "big") + b"\0"
    (tmp_path / "back.flv").write_bytes(data)
    with pytest.raises(MediaError, match=r"expected frame times that increase, found .* s behind") as caught:
        convert_one(tmp_path / "back.flv")
    assert caught.value.reason == "bad_timestamps"


FORMS = {
    "ntsc_film": {"fps": "24000/1001"},
    "50": {"fps": "50"},
    "59.94": {"fps": "60000/1001"},
    "90": {"fps": "90"},
    "vfr": {"times": [0, 0.04, 0.1, 0.5, 0.52, 0.9, 1.0, 1.03, 1.1, 1.2, 1.3, 1.35, 1.7, 1.75, 2.0]},
    "b_frames": {"fps": "30", "b_frames": 3},
    "odd_size": {"fps": "30", "size": (175, 143), "pixel_format": "yuv444p"},
    "yuv444": {"fps": "30", "pixel_format": "yuv444p"},
    "10_bit": {"fps": "30", "pixel_format": "yuv420p10le"},
    "rotated": {"fps": "30", "rotation": 180},
    "edit_list": {"fps": "30", "later": 0.35},
}
"""What row C7 of the list of failures asks for."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_c7_a_clip_is_within_half_a_frame_of_the_truth_by_presentation_time(
    tmp_path: Path, name: str, form: str
) -> None:
    options = {key: value for key, value in FORMS[form].items() if key not in ("later", "fps", "times")}
    rate = Fraction(str(FORMS[form].get("fps", 30)))
    times = FORMS[form].get("times", [float(number / rate) for number in range(int(2 * rate))])
    if "rotation" in options and name == "a.mkv":
        pytest.skip("PyAV writes no orientation into Matroska")
    path = make_clip(tmp_path / name, fps=rate, times=times, **options)  # type: ignore[arg-type]  # test options
    if "later" in FORMS[form]:
        path = remuxed(path, tmp_path / f"late_{name}", later={"video": 0.35})
    start, end = 0.51, 1.32
    truth = {number: time for number, time in enumerate(times) if start <= time < end}  # type: ignore[arg-type, operator]
    video = convert_one(path, start, end).video
    with av.open(io.BytesIO(video.mp4)) as container:
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    if "rotation" in options:
        images = [np.rot90(image, 2) for image in images]
    assert [read_number(image) for image in images] == list(truth)
    half_a_frame = 0.5 / float(rate)
    for tick, time in zip(video.frame_ticks, truth.values(), strict=True):
        assert abs(tick / TICK - (time - start)) < half_a_frame


@pytest.mark.parametrize("codec", ["mjpeg", "vp9"])
@pytest.mark.parametrize("num_frames", [1, 5])
def test_c8_a_clip_shorter_than_a_view_is_padded_with_its_own_frames_and_its_real_length_is_stored(
    tmp_path: Path, num_frames: int, codec: str
) -> None:
    path = make_clip(tmp_path / "a.mp4", seconds=num_frames / 30, size=(64, 64))
    config = ConversionConfig(audio_policy="none", codec=codec, workers=1)
    convert(source_list([sample(path)]), tmp_path / "set", config)
    shard_set = read_shard_set(tmp_path / "set")
    table = decode_index((tmp_path / "set" / shard_set.shards[0].index_name).read_bytes())
    assert table["num_frames"].to_pylist() == [num_frames]
    for scheme in ("uniform", "dense"):
        setup = EvaluationSetup(
            shard_set=shard_set,
            clip=ClipSpec(num_frames=8, crop_size=64, mel_rows=16),
            targets=("label",),
            sampling=SamplingConfig(scheme=scheme),  # type: ignore[arg-type]  # both schemes
            loader=LoaderConfig(backend="reference", verify="sha256"),
            global_batch_size=1,
        )
        with EvaluationLoader(setup) as loader:
            (batch,) = loader.batches()
        pictures = batch.video[0].permute(1, 2, 3, 0).numpy()
        found = [read_number(picture) for picture in pictures]
        assert len(found) == 8
        assert set(found) <= set(range(num_frames))
        assert found == sorted(found)
        assert found[-1] == num_frames - 1
        assert min(picture[40:].mean() for picture in pictures) > 100, "the ramp below the number, never black"
