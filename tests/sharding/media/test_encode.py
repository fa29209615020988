"""What is stored of a video: times, orientation, size, colours, bytes (C7, C8, C15)."""

import io
import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ca2st.errors import UserInputError
from sharding.errors import MediaError
from sharding.format.shard_set import VideoParameters
from sharding.media.codecs import STORED_CODECS
from sharding.media.encode import ClipEncoder, EncodedClip, EncodedVideo, encode_clip
from sharding.media.picture import PictureMaker, output_size
from sharding.media.video import TimedFrame, thinned
from sharding.settings import ConversionConfig
from sharding.source import SourceSample
from support.media import make_clip, numbered_frame, read_number

TICK = 90_000


def convert_one(path: Path, start: float | None = None, end: float | None = None, **options: object) -> EncodedClip:
    sample = SourceSample(
        sample_id=path.stem, path=path, start_seconds=start, end_seconds=end, labels=(0,), where="list.csv:1"
    )
    return encode_clip(ConversionConfig(**({"audio_policy": "none"} | options)).job(sample))  # type: ignore[arg-type]  # test options


def jpegs(video: EncodedVideo) -> list[np.ndarray]:
    """The stored frames, each from its own byte range, by another decoder than the encoder's."""
    at, images = video.frame_data_offset, []
    for size in video.frame_bytes:
        images.append(np.asarray(Image.open(io.BytesIO(video.mp4[at : at + size])).convert("RGB")))
        at += size
    return images


def numbers(video: EncodedVideo) -> list[int]:
    return [read_number(image) for image in jpegs(video)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clips") / "a.mp4", seconds=4, size=(96, 64), gop=12, b_frames=2)


def test_a_whole_file_keeps_every_frame_at_its_time(clip: Path) -> None:
    video = convert_one(clip).video
    assert numbers(video) == list(range(120))
    assert video.frame_ticks == tuple(3000 * number for number in range(120))


@pytest.mark.parametrize(
    ("start", "end", "first", "count"),
    [(0.0, 1.0, 0, 30), (0.5, 1.0, 15, 15), (1.234, 1.5, 38, 7), (2.9, 3.5, 87, 18), (3.5, 9.0, 105, 15)],
)
def test_a_segment_keeps_the_frames_from_its_start_to_before_its_end(
    clip: Path, start: float, end: float, first: int, count: int
) -> None:
    result = convert_one(clip, start, end)
    assert numbers(result.video) == list(range(first, first + count))
    assert result.video.frame_ticks == tuple(
        round((Fraction(number, 30) - Fraction(str(start))) * TICK) for number in range(first, first + count)
    )
    assert result.duration_seconds == pytest.approx(min(end, 4.0) - start)


def test_a_segment_between_two_frames_keeps_the_one_on_display(clip: Path) -> None:
    result = convert_one(clip, 3.01, 3.02)
    assert numbers(result.video) == [90]
    assert result.video.frame_ticks == (0,)
    assert result.duration_seconds == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_segment_inside_a_freeze_keeps_the_frame_on_display(tmp_path: Path, name: str) -> None:
    path = make_clip(tmp_path / name, times=[0, 1 / 30, 2 / 30, 3, 3 + 1 / 30])
    result = convert_one(path, 1.0, 2.0)
    assert numbers(result.video) == [2]
    assert result.video.frame_ticks == (0,)
    assert result.duration_seconds == pytest.approx(1.0)


OPEN_GROUPS = {"x264-params": "open-gop=1:keyint=24:scenecut=0"}


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("open.mp4", "libx264", OPEN_GROUPS),
        ("open.mkv", "libx264", OPEN_GROUPS),
        ("program_stream.mpg", "mpeg2video", {}),
        ("transport_stream.ts", "mpeg2video", {}),
        ("a.webm", "libvpx", {}),
        ("a.flv", "libx264", {}),
    ],
)
def test_wherever_a_segment_starts_its_own_frames_are_kept(
    tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    path = make_clip(tmp_path / name, seconds=6, size=(96, 64), gop=24, b_frames=3, codec=codec, codec_options=options)
    for start in (0.5, 2.1, 2.5, 3.3, 4.2, 5.0):
        result = convert_one(path, start, start + 0.3)
        first = math.ceil(start * 30 - 1e-6)
        assert numbers(result.video) == list(range(first, first + 9)), start
        wanted = [round((number / 30 - start) * TICK) for number in range(first, first + 9)]
        assert result.video.frame_ticks == pytest.approx(wanted, abs=100), start


def test_a_segment_behind_the_end_is_outside(clip: Path) -> None:
    for start in (4.0, 100.0):
        with pytest.raises(MediaError, match=r"found 4\.000 s of media") as caught:
            convert_one(clip, start, start + 1)
        assert caught.value.reason == "segment_outside"


def test_a_clip_of_one_frame_is_kept_as_one_frame(tmp_path: Path) -> None:
    video = convert_one(make_clip(tmp_path / "one.mp4", seconds=1 / 30)).video
    assert numbers(video) == [0]
    assert video.frame_ticks == (0,)


@pytest.mark.parametrize("rate", ["24000/1001", "50", "60000/1001", "90"])
def test_odd_frame_rates_keep_their_times(tmp_path: Path, rate: str) -> None:
    path = make_clip(tmp_path / "a.mp4", seconds=1, fps=Fraction(rate))
    ticks = convert_one(path).video.frame_ticks
    assert all(abs(tick - number * TICK / Fraction(rate)) <= 1 for number, tick in enumerate(ticks))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_frame_rates_are_cut_by_time_not_by_index(tmp_path: Path, name: str) -> None:
    times = [0, 0.04, 0.1, 0.5, 0.52, 0.9, 1.7, 1.75, 2.6, 2.64]
    path = make_clip(tmp_path / name, times=times)
    result = convert_one(path, 0.5, 1.72)
    assert numbers(result.video) == [3, 4, 5, 6]
    for tick, time in zip(result.video.frame_ticks, times[3:7], strict=True):
        assert abs(tick / TICK - (time - 0.5)) <= 0.0006


def test_a_first_timestamp_that_is_late_or_negative_is_the_zero_of_the_clock(tmp_path: Path) -> None:
    late = make_clip(tmp_path / "late.mkv", times=[5 + number / 30 for number in range(30)])
    assert convert_one(late).video.frame_ticks[:3] == pytest.approx((0, 3000, 6000), abs=60)
    assert numbers(convert_one(late, 0.5, 0.6).video) == [15, 16, 17]
    source = make_clip(tmp_path / "plain.mp4", seconds=1)
    early = tmp_path / "early.mp4"
    with av.open(str(source)) as reader, av.open(str(early), "w", options={"avoid_negative_ts": "disabled"}) as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - 9000, packet.dts - 9000, stream
                writer.mux(packet)
    video = convert_one(early).video
    assert video.frame_ticks[0] == 0
    assert all(later - earlier == 3000 for earlier, later in pairwise(video.frame_ticks))


@pytest.mark.parametrize("turn", [90, -90, 180])
def test_rotation_metadata_is_applied(tmp_path: Path, turn: int) -> None:
    path = make_clip(tmp_path / "a.mp4", seconds=0.2, size=(64, 48), rotation=turn)
    video = convert_one(path).video
    upright = [np.rot90(image, -turn // 90) for image in jpegs(video)]
    assert (video.width, video.height) == ((64, 48) if turn == 180 else (48, 64))
    assert [read_number(image) for image in upright] == list(range(6))


def test_a_portrait_phone_video_is_turned_clockwise(tmp_path: Path) -> None:
    """By the track header's matrix as phones write it, whose meaning the file format defines: right becomes down."""
    data = bytearray(make_clip(tmp_path / "a.mp4", seconds=0.1, size=(64, 48)).read_bytes())
    matrix = data.index(b"tkhd") + 44
    words = (0, 0x10000, 0, -0x10000 % 2**32, 0, 0, 48 << 16, 0, 0x40000000)
    data[matrix : matrix + 36] = b"".join(word.to_bytes(4, "big") for word in words)
    (tmp_path / "phone.mp4").write_bytes(data)
    video = convert_one(tmp_path / "phone.mp4").video
    assert (video.width, video.height) == (48, 64)
    assert [read_number(np.rot90(image, 1)) for image in jpegs(video)] == [0, 1, 2]


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), short_side=st.integers(8, 300).map(lambda n: 2 * n))
def test_output_sizes_are_even_never_larger_and_keep_the_shape(width: int, height: int, short_side: int) -> None:
    out_width, out_height = output_size(width, height, short_side)
    assert out_width % 2 == 0
    assert out_height % 2 == 0
    assert out_width <= max(2, width)
    assert out_height <= max(2, height)
    assert min(out_width, out_height) <= max(2, short_side)
    scale = min(1.0, short_side / min(width, height))
    assert abs(out_width - width * scale) <= 2
    assert abs(out_height - height * scale) <= 2


@pytest.mark.parametrize(
    ("size", "expected"),
    [((640, 480), (336, 256)), ((1920, 1080), (448, 256)), ((1080, 1920), (256, 448)), ((640, 272), (608, 256))],
)
def test_usual_shapes_in_multiples_of_16(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert output_size(*size, 256, multiple=16) == expected


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), short_side=st.integers(8, 300).map(lambda n: 2 * n))
def test_sides_in_multiples_of_16_are_those_nearest_to_the_shape(width: int, height: int, short_side: int) -> None:
    out = output_size(width, height, short_side, multiple=16)
    (short, long), (out_short, out_long) = sorted((width, height)), sorted(out)
    assert (out[0] % 16, out[1] % 16) == (0, 0)
    assert out_short <= max(16, short_side)
    assert out_short <= max(16, short + 8)
    if short >= 8:
        assert abs(out_short - min(short, short_side)) <= 16
        assert abs(out_long - out_short * long / short) <= 8
    assert out_long <= max(16, 2 * long + 8)


@pytest.mark.parametrize(
    ("size", "expected"), [((321, 241), (256, 192)), ((175, 143), (176, 144)), ((100, 400), (96, 384))]
)
def test_sizes_become_multiples_of_16_and_small_ones_stay_small(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    path = make_clip(tmp_path / "a.mkv", seconds=0.1, size=size, codec="libx264", pixel_format="yuv444p")
    video = convert_one(path, short_side=192).video
    assert (video.width, video.height) == expected
    assert jpegs(video)[0].shape == (expected[1], expected[0], 3)


@pytest.mark.parametrize("pixel_format", ["yuv422p", "yuv444p", "yuv420p10le", "yuvj420p", "gray"])
def test_other_pixel_formats_are_converted(tmp_path: Path, pixel_format: str) -> None:
    path = make_clip(tmp_path / "a.mkv", seconds=0.2, codec="libx264", pixel_format=pixel_format)
    assert numbers(convert_one(path).video) == list(range(6))


BARS = np.array(
    [[255, 255, 255], [255, 255, 0], [0, 255, 255], [0, 255, 0], [255, 0, 255], [255, 0, 0], [0, 0, 255], [0, 0, 0]],
    np.uint8,
)


def bars(_: int, width: int, height: int) -> np.ndarray:
    return np.repeat(np.repeat(BARS[None], height, axis=0), width // len(BARS), axis=1)


@pytest.mark.parametrize("size", [(256, 64), (1024, 640)], ids=["unscaled", "scaled"])
@pytest.mark.parametrize(
    "colour", [(1, 1), (1, 2), (5, 1), (5, 2), None], ids=["709", "709_full", "601", "601_full", "untagged"]
)
def test_colour_bars_keep_their_colours(tmp_path: Path, colour: tuple[int, int] | None, size: tuple[int, int]) -> None:
    path = make_clip(tmp_path / "a.mp4", seconds=0.1, size=size, draw=bars, colour=colour, pixel_format="yuv444p")
    image = jpegs(convert_one(path, quality=2).video)[0]
    centres = ((np.arange(8) + 0.5) * image.shape[1] / 8).astype(int)
    found = image[image.shape[0] // 2 - 2 : image.shape[0] // 2 + 2, centres].mean(axis=0)
    assert np.abs(found - BARS).max() <= 12


def test_thinning_keeps_frames_by_time_whatever_the_source_rate(clip: Path) -> None:
    assert numbers(convert_one(clip, frames_per_second=15).video) == list(range(0, 120, 2))
    assert numbers(convert_one(clip, frames_per_second=60).video) == list(range(120))
    assert len(convert_one(clip, frames_per_second=7.5).video.frame_ticks) == 30


@given(rate=st.integers(5, 120), wanted=st.floats(1, 60), jitter=st.floats(0, 0.2), seed=st.integers(0, 100))
def test_thinned_frames_are_never_denser_than_asked(rate: int, wanted: float, jitter: float, seed: int) -> None:
    noise = np.random.default_rng(seed).uniform(-jitter, jitter, 3 * rate)
    times = [Fraction(max(0.0, number + noise[number])).limit_denominator(10**6) / rate for number in range(3 * rate)]
    frames = [TimedFrame(av.VideoFrame(2, 2), time, Fraction(1, rate)) for time in sorted(set(times))]
    kept = list(thinned(iter(frames), wanted))
    assert kept[0] is frames[0]
    assert len(kept) <= 3 * wanted + 2
    if wanted >= 2 * rate:
        assert len(kept) == len(frames)


def test_the_mp4_says_the_same_times_as_the_ticks_and_plays(clip: Path) -> None:
    video = convert_one(clip, 0.51, 1.0).video
    assert video.frame_ticks[0] > 0
    with av.open(io.BytesIO(video.mp4)) as container:
        stream = container.streams.video[0]
        assert stream.time_base == Fraction(1, TICK)
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert tuple(packet.pts for packet in packets) == video.frame_ticks
        assert tuple(packet.size for packet in packets) == video.frame_bytes
        assert stream.codec_context.pix_fmt == "yuvj420p"
        assert len(container.streams) == 1


def test_the_same_clip_gives_the_same_bytes(clip: Path) -> None:
    assert convert_one(clip, 0.5, 2.5) == convert_one(clip, 0.5, 2.5)


def test_a_better_quality_takes_more_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (48, 64, 3), np.uint8)
    path = make_clip(tmp_path / "a.mp4", seconds=0.1, draw=lambda *_: noise)
    sizes = [len(convert_one(path, quality=quality).video.mp4) for quality in (2, 5, 12, 31)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_an_unknown_codec_lists_the_known_ones() -> None:
    known = "mjpeg, h264, hevc, vp9"
    with pytest.raises(
        UserInputError, match=rf"codec: expected one of {known}, found 'mjpg' \(did you mean 'mjpeg'\?\)"
    ):
        ConversionConfig(codec="mjpg")
    with pytest.raises(UserInputError, match=f"codec: expected one of {known}, found 'av1'"):
        ConversionConfig(codec="av1")


def new_encoder(name: str) -> ClipEncoder:
    codec = STORED_CODECS[name]
    gop = None if codec.has_frame_ranges else 8
    video = VideoParameters(codec=name, short_side=32, quality=codec.default_quality, num_gop_frames=gop)
    return ClipEncoder(video, PictureMaker(video))


@pytest.mark.parametrize("name", STORED_CODECS)
def test_every_codec_encodes(name: str) -> None:
    encoder = new_encoder(name)
    picture = av.VideoFrame.from_ndarray(numbered_frame(5, 64, 48), format="rgb24")
    encoder.add(TimedFrame(picture, Fraction(0), Fraction(1, 30)))
    (frame,) = av.open(io.BytesIO(encoder.finish().mp4)).decode(video=0)
    assert read_number(frame.to_ndarray(format="rgb24")) == 5


@pytest.mark.parametrize("name", STORED_CODECS)
def test_an_encoder_without_frames_refuses(name: str) -> None:
    with pytest.raises(MediaError, match="expected at least one frame"):
        new_encoder(name).finish()
