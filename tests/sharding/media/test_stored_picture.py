"""What is done to a source's pictures: orientation, pixel aspect, interlacing, dynamic range, colours."""

import gc
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import product
from pathlib import Path

import av
import numpy as np
import pytest

from ca2st.errors import UserInputError
from sharding.errors import MediaError
from sharding.format.shard_set import VideoParameters
from sharding.media.encode import EncodedClip, EncodedVideo, encode_clip
from sharding.media.picture import Orientation, PictureMaker, orientation_of, output_size, standard_rgb, tone_curve
from sharding.media.video import TimedFrame, display_matrix
from sharding.settings import ConversionConfig
from sharding.source import SourceSample
from support.media import make_clip, read_number


def convert_one(path: Path, start: float | None = None, end: float | None = None, **options: object) -> EncodedClip:
    sample = SourceSample(
        sample_id=path.stem, path=path, start_seconds=start, end_seconds=end, labels=(0,), where="list.csv:1"
    )
    return encode_clip(ConversionConfig(**({"audio_policy": "none"} | options)).job(sample))  # type: ignore[arg-type]  # test options


def stored(video: EncodedVideo) -> list[np.ndarray]:
    return [frame.to_ndarray(format="rgb24") for frame in av.open(io.BytesIO(video.mp4)).decode(video=0)]


def decoded(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def timed(picture: av.VideoFrame) -> TimedFrame:
    return TimedFrame(picture, Fraction(0), Fraction(1, 25), display_matrix(picture))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((one.astype(float) - other) ** 2))))


def matrix_bytes(a: float, b: float, c: float, d: float) -> bytes:
    return np.array([a * 65536, b * 65536, 0, c * 65536, d * 65536, 0, 0, 0, 1 << 30]).astype(np.int32).tobytes()


def with_matrix(source: Path, target: Path, a: int, b: int, c: int, d: int) -> Path:
    """A copy whose track header says that point (p, q) is shown at (a p + c q, b p + d q)."""
    data = bytearray(source.read_bytes())
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = np.frombuffer(matrix_bytes(a, b, c, d), np.int32).astype(">i4").tobytes()
    target.write_bytes(data)
    return target


def shown(plane: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """The plane with every pixel where the matrix takes it, pixel by pixel."""
    rows, columns = plane.shape
    places = {(p, q): (a * p + c * q, b * p + d * q) for p, q in product(range(columns), range(rows))}
    left, top = min(x for x, _ in places.values()), min(y for _, y in places.values())
    out = np.zeros((columns, rows) if a == 0 else (rows, columns), plane.dtype)
    for (p, q), (x, y) in places.items():
        out[y - top, x - left] = plane[q, p]
    return out


EIGHT = [
    *((x, 0, 0, y) for x, y in product((1, -1), repeat=2)),
    *((0, x, y, 0) for x, y in product((1, -1), repeat=2)),
]


@pytest.mark.parametrize("matrix", EIGHT)
def test_each_of_the_eight_orientations_is_shown_as_the_track_header_says(
    tmp_path: Path, matrix: tuple[int, int, int, int]
) -> None:
    base = make_clip(tmp_path / "a.mp4", seconds=0.1, size=(64, 48))
    path = with_matrix(base, tmp_path / "b.mp4", *matrix)
    maker = PictureMaker(VideoParameters(codec="h264"))
    planes = maker.upright(timed(decoded(path)[1])).to_ndarray()
    plain = PictureMaker(VideoParameters(codec="h264")).upright(timed(decoded(base)[1])).to_ndarray()[:48]
    expected = shown(plain, *matrix)
    assert np.array_equal(planes[: expected.shape[0]], expected)
    is_mirrored = matrix[0] * matrix[3] - matrix[1] * matrix[2] < 0
    assert maker.notes == (("mirrored",) if is_mirrored else ())
    assert bool(maker.changes) == (matrix != (1, 0, 0, 1))


def test_all_planes_are_turned_and_the_clip_says_so(tmp_path: Path) -> None:
    def red_left(_: int, width: int, height: int) -> np.ndarray:
        image = np.full((height, width, 3), 128, np.uint8)
        image[: height // 2, : width // 2] = (220, 30, 30)
        return image

    base = make_clip(tmp_path / "a.mp4", seconds=0.1, size=(64, 48), draw=red_left)
    clip = convert_one(with_matrix(base, tmp_path / "b.mp4", 0, 1, 1, 0), quality=2)
    assert (clip.video.width, clip.video.height) == (48, 64)
    assert psnr(stored(clip.video)[0], red_left(0, 64, 48).transpose(1, 0, 2)) > 30
    assert (clip.changes, clip.notes) == ({"orientation": "transposed"}, ("mirrored",))


@pytest.mark.parametrize("is_turned", [False, True])
def test_frames_are_freed_without_waiting_for_the_garbage_collector(tmp_path: Path, is_turned: bool) -> None:
    path = make_clip(tmp_path / "clip.mp4", seconds=1.0, sound=None)
    if is_turned:
        path = with_matrix(path, tmp_path / "turned.mp4", 0, 1, -1, 0)
    gc.collect()
    gc.disable()
    try:
        clip = convert_one(path)
        num_left = sum(issubclass(type(one), av.VideoFrame) for one in gc.get_objects())
    finally:
        gc.enable()
    assert ("orientation" in clip.changes) == is_turned
    assert num_left < 4  # of 30: a hundred frames of 4K would be more than a child may have


def test_an_orientation_inside_the_stream_holds_for_all_that_follows(tmp_path: Path) -> None:
    base = make_clip(tmp_path / "a.mp4", seconds=1, size=(64, 48), gop=60)
    path = tmp_path / "b.mp4"
    with av.open(str(base)) as reader, av.open(str(path), "w") as writer:
        stream = reader.streams.video[0]
        out = writer.add_stream_from_template(stream)
        change = av.BitStreamFilterContext("h264_metadata=display_orientation=insert:flip=horizontal", stream, out)
        for packet in reader.demux(stream):
            for changed in change.filter(packet if packet.dts is not None else None):
                changed.stream = out
                writer.mux(changed)
    assert [display_matrix(picture) is not None for picture in decoded(path)] == [True, *[False] * 29]
    whole, cut = convert_one(path), convert_one(path, 0.5, 0.6)
    assert [read_number(image[:, ::-1]) for image in stored(whole.video)] == list(range(30))
    assert [read_number(image[:, ::-1]) for image in stored(cut.video)] == [15, 16, 17]
    assert (cut.changes, cut.notes) == ({"orientation": "left-right"}, ("mirrored",))


@pytest.mark.parametrize(
    ("degrees", "scale", "exact"), [(0.5, 1.0, True), (89.5, 3.0, True), (10.0, 1.0, False), (45.2, 1.0, False)]
)
def test_a_tilted_matrix_gives_the_nearest_orientation_and_a_note(degrees: float, scale: float, exact: bool) -> None:
    turn = scale * np.exp(1j * math.radians(degrees))
    found, is_exact = orientation_of(matrix_bytes(turn.real, turn.imag, -turn.imag, turn.real))
    assert found == (Orientation() if degrees < 45 else Orientation(transposed=True, left_right=True))
    assert is_exact is exact


def test_a_matrix_of_zeros_changes_nothing_and_is_noted() -> None:
    assert orientation_of(matrix_bytes(0, 0, 0, 0)) == (Orientation(), False)


def test_a_tilt_is_noted_on_the_clip(tmp_path: Path) -> None:
    base = make_clip(tmp_path / "a.mp4", seconds=0.1)
    data = bytearray(base.read_bytes())
    at = data.index(b"tkhd") + 44
    tilt = np.exp(1j * math.radians(10))
    words = np.frombuffer(matrix_bytes(tilt.real, tilt.imag, -tilt.imag, tilt.real), np.int32)
    data[at : at + 36] = words.astype(">i4").tobytes()
    (tmp_path / "b.mp4").write_bytes(data)
    clip = convert_one(tmp_path / "b.mp4")
    assert clip.notes == ("tilt not applied",)
    assert [read_number(image) for image in stored(clip.video)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("size", "aspect", "expected"),
    [
        ((720, 576), (64, 45), (456, 256)),  # PAL at 16:9
        ((720, 576), (16, 15), (342, 256)),  # PAL at 4:3
        ((704, 480), (10, 11), (342, 256)),  # NTSC at 4:3
        ((1440, 1080), (4, 3), (456, 256)),  # HDV
        ((480, 360), (4, 3), (456, 256)),
        ((176, 144), (12, 11), (192, 144)),  # no side is made longer but by the pixels' shape
        ((64, 128), (1, 2), (32, 128)),
    ],
)
def test_the_stored_size_has_the_shape_on_display(
    size: tuple[int, int], aspect: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert output_size(*size, 256, Fraction(*aspect)) == expected


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.ts", "libx264"), ("a.flv", "libx264"), ("a.mpg", "mpeg2video")]
)
def test_pixels_of_a_source_become_square(tmp_path: Path, name: str, codec: str) -> None:
    rate = 25 if codec == "mpeg2video" else 30
    path = make_clip(tmp_path / name, seconds=0.2, fps=rate, size=(96, 72), codec=codec, pixel_aspect=Fraction(4, 3))
    clip = convert_one(path)
    assert (clip.video.width, clip.video.height) == (144, 80)
    assert clip.changes == {"pixel_aspect": "4:3"}
    assert clip.source_size == (96, 72)
    assert [read_number(image) for image in stored(clip.video)] == list(range(round(0.2 * rate)))


def test_the_container_is_believed_before_the_stream_about_the_pixels(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", seconds=0.1, size=(72, 48), pixel_aspect=Fraction(2))
    data = bytearray(path.read_bytes())
    at = data.index(b"pasp") + 4
    data[at : at + 8] = (4).to_bytes(4, "big") + (3).to_bytes(4, "big")
    path.write_bytes(data)
    assert convert_one(path).changes == {"pixel_aspect": "4:3"}


def test_pixels_are_made_square_before_the_picture_is_turned(tmp_path: Path) -> None:
    base = make_clip(tmp_path / "a.mp4", seconds=0.1, size=(72, 48), pixel_aspect=Fraction(4, 3))
    video = convert_one(with_matrix(base, tmp_path / "b.mp4", 0, 1, -1, 0)).video
    assert (video.width, video.height) == (48, 96)
    assert [read_number(np.rot90(image)) for image in stored(video)] == [0, 1, 2]


def test_an_absurd_pixel_aspect_is_ignored_and_noted(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", seconds=0.1, pixel_aspect=Fraction(4, 3))
    data = bytearray(path.read_bytes())
    at = data.index(b"pasp") + 4
    data[at : at + 8] = (1000).to_bytes(4, "big") + (1).to_bytes(4, "big")
    path.write_bytes(data)
    clip = convert_one(path)
    assert (clip.video.width, clip.video.height) == (64, 48)
    assert (clip.changes, clip.notes) == ({}, ("absurd pixel aspect ignored",))


def test_a_later_frame_of_another_size_is_scaled_to_the_first_and_another_shape_is_counted() -> None:
    maker = PictureMaker(VideoParameters())
    sizes = [(64, 48), (128, 96), (96, 48), (96, 48)]
    pictures = [av.VideoFrame.from_ndarray(np.full((h, w, 3), 90, np.uint8), format="rgb24") for w, h in sizes]
    made = [maker.upright(timed(picture)) for picture in pictures]
    assert {(picture.width, picture.height) for picture in made} == {(64, 48)}
    assert (maker.changes, maker.notes) == ({"stretched_frames": 2}, ("shape changes inside the clip",))


def field(number: int, width: int, height: int) -> np.ndarray:
    """A pattern that moves three pixels a field."""
    x, y = np.arange(width)[None] + 3 * number, np.arange(height)[:, None]
    grey = 128 + 70 * np.sin(x / 9) * np.cos(y / 13) + 40 * ((x // 24) % 2)
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def woven(number: int, width: int, height: int) -> np.ndarray:
    """The odd rows of one moment and the even rows of the next: the bottom field is the first."""
    image = field(2 * number, width, height).copy()
    image[::2] = field(2 * number + 1, width, height)[::2]
    return image


def interlaced_clip(path: Path) -> Path:
    options = {"crf": "10", "x264-params": "bff=1"}
    return make_clip(path, seconds=0.4, fps=25, size=(160, 128), draw=woven, codec_options=options)


def mean_psnr(images: Sequence[np.ndarray]) -> float:
    return float(np.mean([psnr(image, field(2 * number, 160, 128)) for number, image in enumerate(images)]))


@pytest.mark.parametrize("codec", ["mjpeg", "h264"])
def test_interlaced_frames_are_deinterlaced_at_their_times(tmp_path: Path, codec: str) -> None:
    path = interlaced_clip(tmp_path / "a.mp4")
    clip = convert_one(path, codec=codec, quality=2)
    assert mean_psnr(stored(clip.video)) > 30
    assert clip.video.frame_ticks == tuple(3600 * number for number in range(10))
    assert (clip.changes, clip.notes) == ({"deinterlaced_frames": 10}, ("deinterlaced",))


def test_interlaced_frames_are_kept_by_option(tmp_path: Path) -> None:
    clip = convert_one(interlaced_clip(tmp_path / "a.mp4"), interlaced="keep", quality=2)
    images = stored(clip.video)
    assert mean_psnr(images) < 27
    assert np.mean([psnr(image, woven(number, 160, 128)) for number, image in enumerate(images)]) > 30
    assert (clip.changes, clip.notes) == ({"interlaced_frames_kept": 10}, ("interlaced, kept",))


def test_thinning_does_not_take_away_the_neighbours_of_interlaced_frames(tmp_path: Path) -> None:
    path = interlaced_clip(tmp_path / "a.mp4")
    every = stored(convert_one(path, codec="h264", quality=1).video)
    thinned = stored(convert_one(path, codec="h264", quality=1, frames_per_second=12.5).video)
    assert len(thinned) == 5
    assert all(psnr(one, other) > 40 for one, other in zip(thinned, every[::2], strict=True))


def test_only_marked_frames_are_deinterlaced_in_a_mixed_stream(tmp_path: Path) -> None:
    marked = decoded(interlaced_clip(tmp_path / "a.mp4"))
    plain = decoded(make_clip(tmp_path / "b.mp4", seconds=0.4, fps=25, size=(160, 128), draw=field))
    larger = decoded(make_clip(tmp_path / "c.mp4", seconds=0.1, size=(64, 48)))
    pictures = [*plain[:3], *marked[:4], *plain[3:5], *marked[4:6], *larger]
    frames = [TimedFrame(picture, Fraction(number), Fraction(1)) for number, picture in enumerate(pictures)]
    maker = PictureMaker(VideoParameters())
    found = list(maker.prepared(iter(frames)))
    assert [frame.seconds for frame in found] == list(range(len(frames)))
    same = [
        np.array_equal(one.picture.to_ndarray(), other.picture.to_ndarray())
        for one, other in zip(found, frames, strict=True)
    ]
    assert same == [not picture.interlaced_frame for picture in pictures]
    assert maker.changes == {"deinterlaced_frames": 6}


BARS = np.array([[255, 255, 255], [191, 191, 191], [191, 191, 0], [191, 0, 0], [40, 90, 160], [0, 0, 0]], np.uint8)
"""White, and colours of the middle range."""
TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
"""Of light, from BT.709; as BT.2087 prints it."""


def pq(nits: np.ndarray) -> np.ndarray:
    power = (nits / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(nits: np.ndarray) -> np.ndarray:
    scene = (nits / 1000) ** (1 / 1.2)
    upper = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), upper)


HDR = {16: pq, 18: hlg}


def hdr_clip(path: Path, transfer: int, codec: str = "ffv1", pixel_format: str = "yuv444p10le") -> Path:
    """BARS as ordinary video of 203 nits, in a high dynamic range."""
    signal = HDR[transfer](203 * (BARS / 255) ** 2.4 @ TO_BT2020.T)
    image = np.repeat(np.repeat((signal * 65_535).astype(np.uint16)[None], 64, axis=0), 32, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = *image.shape[:2], pixel_format
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = transfer, 9, 9, 1
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb48le").reformat(
            format=pixel_format, src_color_range="JPEG", dst_colorspace=9, dst_color_range="MPEG"
        )
        picture.color_trc, picture.color_primaries = transfer, 9
        container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def bar_colours(image: np.ndarray) -> np.ndarray:
    centres = ((np.arange(len(BARS)) + 0.5) * image.shape[1] / len(BARS)).astype(int)
    middle: np.ndarray = image[image.shape[0] // 2 - 2 : image.shape[0] // 2 + 2, centres].mean(axis=0)
    return middle


@pytest.mark.parametrize("codec", ["mjpeg", "h264"])
@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_ordinary_colours_come_back_from_a_high_dynamic_range(
    tmp_path: Path, codec: str, transfer: int, name: str
) -> None:
    clip = convert_one(hdr_clip(tmp_path / "a.mkv", transfer), codec=codec, quality=2)
    found = bar_colours(stored(clip.video)[0])
    assert np.abs(found[1:] - BARS[1:]).max() <= 16  # a level of zero is steep: 16 is 0.001 of the light
    assert np.abs(found[0] - 239).max() <= 4  # white is where the curve bends
    assert (clip.changes, clip.notes) == ({"tone_mapped": name}, ("tone-mapped",))


@pytest.mark.parametrize("transfer", HDR)
def test_a_high_dynamic_range_is_refused_by_option(tmp_path: Path, transfer: int) -> None:
    path = hdr_clip(tmp_path / "a.mp4", transfer, "libx264", "yuv420p10le")
    with pytest.raises(MediaError, match=r"expected standard dynamic range, found (PQ|HLG); --hdr tone-map") as caught:
        convert_one(path, hdr="refuse")
    assert caught.value.reason == "hdr"


def test_the_tone_curve_keeps_ordinary_light_and_bends_smoothly_to_white() -> None:
    light = np.linspace(0, 10_000 / 203, 20_001).astype(np.float32)
    curve = tone_curve(light)
    assert np.array_equal(curve[light <= 0.7], light[light <= 0.7])
    assert (np.diff(curve) >= -1e-6).all()
    assert curve.max() == pytest.approx(1.0)
    assert float(tone_curve(np.float32(1000 / 203))) == pytest.approx(1.0)
    slopes = np.diff(curve) / np.diff(light)
    assert np.abs(np.diff(slopes[: np.searchsorted(light, 4.5)])).max() < 0.02


def test_bright_colours_keep_their_hue() -> None:
    rgb = (pq(np.array([[[3000.0, 1500.0, 300.0]]]) @ TO_BT2020.T) * 65_535).astype(np.uint16)
    light = (standard_rgb(rgb, transfer=16, primaries=9)[0, 0] / 255.0) ** 2.4
    assert light / light[0] == pytest.approx([1, 0.5, 0.1], abs=0.02)


def test_a_wide_gamut_is_converted_by_the_published_matrix() -> None:
    maker = PictureMaker(VideoParameters(codec="h264"))
    inside = (BARS / 255.0) ** 2.4 @ TO_BT2020.T
    image = np.repeat(np.repeat((inside ** (1 / 2.4) * 255).round().astype(np.uint8)[None], 32, axis=0), 16, axis=1)
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    picture.color_primaries, picture.color_trc = 9, 14
    found = bar_colours(maker.upright(timed(picture)).to_ndarray(format="rgb24"))
    assert np.abs(found - BARS).max() <= 16  # a level of zero is steep: 16 is 0.001 of the light
    assert maker.changes == {"converted_primaries": "BT.2020"}
    assert maker.notes == ("wide gamut converted",)


def test_display_p3_keeps_greys_and_saturates_colours_as_its_primaries_say() -> None:
    rgb = (np.array([[[0.5, 0.5, 0.5], [0.8, 0.4, 0.4]]]) * 65_535).astype(np.uint16)
    grey, red = standard_rgb(rgb, transfer=1, primaries=12)[0].tolist()
    to_bt709 = np.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]])
    expected = 255 * (to_bt709 @ np.array([0.8, 0.4, 0.4]) ** 2.4) ** (1 / 2.4)
    assert grey == pytest.approx([128] * 3, abs=1)
    assert red == pytest.approx(expected, abs=1)


def bars(_: int, width: int, height: int) -> np.ndarray:
    return np.repeat(np.repeat(BARS[None], height, axis=0), width // len(BARS), axis=1)


@pytest.mark.parametrize(
    ("codec", "pixel_format"),
    [
        ("ffv1", "bgr0"),
        ("ffv1", "gbrp10le"),
        ("ffv1", "yuv422p10le"),
        ("ffv1", "gray"),
        ("png", "rgba"),
        ("prores_ks", "yuva444p10le"),
        ("libvpx-vp9", "yuva420p"),
        ("mjpeg", "yuvj444p"),
    ],
)
def test_colours_of_every_kind_of_pixel_are_those_of_ffmpegs_own_decoding(
    tmp_path: Path, codec: str, pixel_format: str
) -> None:
    path = tmp_path / ("a.mov" if codec in ("prores_ks", "png") else "a.mkv")
    make_clip(path, seconds=0.1, size=(192, 64), codec=codec, pixel_format=pixel_format, draw=bars)
    (own, *_) = (picture.to_ndarray(format="rgb24") for picture in decoded(path))
    clip = convert_one(path, quality=2)
    assert np.abs(bar_colours(stored(clip.video)[0]) - bar_colours(own)).max() <= 10
    assert (clip.changes, clip.notes) == ({}, ())


def test_a_large_picture_without_a_colour_matrix_is_taken_for_bt601_as_ffmpeg_does_and_noted(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", seconds=0.05, size=(1344, 720), draw=bars)
    clip = convert_one(path, quality=2)
    assert clip.notes == ("large picture without a colour matrix, taken for BT.601",)
    assert np.abs(bar_colours(stored(clip.video)[0]) - BARS).max() <= 10  # the test's encoder wrote BT.601
    tagged = make_clip(tmp_path / "b.mp4", seconds=0.05, size=(1344, 720), draw=bars, colour=(1, 1))
    assert convert_one(tagged).notes == ()


@pytest.mark.parametrize(("matrix", "primaries", "like"), [(12, 1, 1), (12, 9, 9), (12, 6, 5), (3, 1, 5), (2, 9, 9)])
def test_derived_and_reserved_matrices_are_read_as_what_they_stand_for(matrix: int, primaries: int, like: int) -> None:
    image = np.repeat(np.repeat(BARS[None], 32, axis=0), 16, axis=1)
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(
        format="yuv444p", src_color_range="JPEG", dst_colorspace=like, dst_color_range="MPEG"
    )
    picture.colorspace = picture.color_primaries = like
    expected = PictureMaker(VideoParameters(codec="h264")).upright(timed(picture)).to_ndarray()
    picture.colorspace, picture.color_primaries = matrix, primaries
    assert np.array_equal(PictureMaker(VideoParameters(codec="h264")).upright(timed(picture)).to_ndarray(), expected)


def test_a_colour_matrix_that_cannot_be_converted_is_a_reject() -> None:
    picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24").reformat(format="yuv420p")
    picture.colorspace = 8  # YCgCo
    with pytest.raises(MediaError, match=r"colour matrix 8 of H\.273: cannot be converted"):
        PictureMaker(VideoParameters()).upright(timed(picture))


def test_unknown_policies_list_the_known_ones() -> None:
    with pytest.raises(UserInputError, match="hdr: expected one of tone-map, refuse, found 'clip'"):
        ConversionConfig(hdr="clip")
    with pytest.raises(UserInputError, match="interlaced: expected one of deinterlace, keep, found 'bob'"):
        replace(ConversionConfig(), interlaced="bob")
