"""H.264, HEVC and VP9 as they are stored: groups of pictures, times, colours, sizes, the same bytes every time."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange

from ca2st.errors import UserInputError
from sharding.conversion import convert
from sharding.errors import ConversionRefusedError, MediaError
from sharding.folder import refuse_another_conversion
from sharding.forecast import forecast_of
from sharding.format.index import decode_index
from sharding.format.shard_set import VideoParameters, read_shard_set, write_shard_set
from sharding.media.codecs import STORED_CODECS
from sharding.media.encode import GOP_ENCODINGS, EncodedVideo
from sharding.settings import ConversionConfig, conversion_identity
from sharding.verify import verify_shard_set
from support.media import make_clip, read_number
from support.noise import encoded_noise, hashes_of_noise, noise_frames
from support.processes import python_path
from support.shards import SPACE, file_hashes, sample, small_clips, small_config, source_list
from support.video_shards import encoded

TICK = 90_000
CODECS = list(GOP_ENCODINGS)
BT601 = (5, 6)
"""The matrix goes by two numbers, for 625 and 525 lines."""


def packets_of(mp4: bytes) -> list[Any]:
    with av.open(io.BytesIO(mp4)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def pictures(mp4: bytes) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(mp4)) as container:
        return list(container.decode(video=0))


def numbers(video: EncodedVideo) -> list[int]:
    return [read_number(frame.to_ndarray(format="rgb24")) for frame in pictures(video.mp4)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its own key frames and B-frames lie elsewhere than those that are asked for."""
    return make_clip(tmp_path_factory.mktemp("clips") / "a.mp4", seconds=1.2, size=(96, 64), gop=5, b_frames=2)


@pytest.fixture(scope="module", params=CODECS)
def video(request: pytest.FixtureRequest, clip: Path) -> EncodedVideo:
    return encoded(clip, codec=request.param).video


def test_every_frame_is_kept_in_order_at_its_time_to_the_tick(video: EncodedVideo) -> None:
    assert numbers(video) == list(range(36))
    assert video.frame_ticks == tuple(3000 * number for number in range(36))
    packets = packets_of(video.mp4)
    assert tuple(packet.pts for packet in packets) == video.frame_ticks
    assert tuple(packet.dts for packet in packets) == video.frame_ticks
    assert (video.frame_bytes, video.frame_data_offset) == ((), 0)


def test_key_frames_are_regular_wherever_the_source_has_its_own(video: EncodedVideo) -> None:
    found = [number for number, packet in enumerate(packets_of(video.mp4)) if packet.is_keyframe]
    assert found == [0, 8, 16, 24, 32]


def test_a_group_decodes_without_any_other(video: EncodedVideo) -> None:
    whole = [frame.to_ndarray() for frame in pictures(video.mp4)]
    with av.open(io.BytesIO(video.mp4)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size][16:24]
        alone = [frame for packet in packets for frame in stream.decode(packet)] + stream.decode(None)
    assert len(alone) == 8
    for frame, expected in zip(alone, whole[16:24], strict=True):
        assert np.array_equal(frame.to_ndarray(), expected)


def test_the_stream_says_what_its_pixels_are(video: EncodedVideo) -> None:
    (first, *_) = pictures(video.mp4)
    assert (first.format.name, first.color_range) == ("yuv420p", ColorRange.MPEG)
    assert first.colorspace in BT601
    with av.open(io.BytesIO(video.mp4)) as container:
        assert [stream.type for stream in container.streams] == ["video"]


@pytest.mark.parametrize("codec", CODECS)
def test_another_group_length_is_kept_to(clip: Path, codec: str) -> None:
    for gop in (1, 3):
        packets = packets_of(encoded(clip, codec=codec, num_gop_frames=gop).video.mp4)
        assert [packet.is_keyframe for packet in packets] == [number % gop == 0 for number in range(36)]


@pytest.mark.parametrize("codec", CODECS)
def test_variable_frame_rates_and_late_starts_are_kept_to_the_tick(tmp_path: Path, codec: str) -> None:
    times = [0, 0.04, 0.1, 0.5, 0.52, 0.9, 1.7, 1.75, 2.6, 2.64]
    path = make_clip(tmp_path / "a.mp4", times=times)
    video = encoded_segment(path, 0.03, 2.62, codec=codec)
    assert video.frame_ticks == tuple(round((time - 0.03) * TICK) for time in times[1:9])
    assert video.frame_ticks[0] > 0
    assert tuple(packet.pts for packet in packets_of(video.mp4)) == video.frame_ticks
    assert numbers(video) == list(range(1, 9))


def encoded_segment(path: Path, start: float, end: float, **options: object) -> EncodedVideo:
    from sharding.media.encode import encode_clip

    return encode_clip(small_config(**options).job(sample(path, start=start, end=end))).video


@pytest.mark.parametrize("codec", CODECS)
def test_one_frame_odd_sizes_and_turned_phones_are_stored_too(tmp_path: Path, codec: str) -> None:
    one = encoded(make_clip(tmp_path / "one.mp4", seconds=1 / 30), codec=codec).video
    assert (numbers(one), one.frame_ticks) == ([0], (0,))
    odd = make_clip(tmp_path / "odd.mkv", seconds=0.1, size=(175, 143), pixel_format="yuv444p")
    video = encoded(odd, codec=codec).video
    assert (video.width, video.height, numbers(video)) == (176, 144, [0, 1, 2])
    turned = encoded(make_clip(tmp_path / "t.mp4", seconds=0.1, size=(64, 48), rotation=90), codec=codec).video
    upright = [np.rot90(frame.to_ndarray(format="rgb24"), -1) for frame in pictures(turned.mp4)]
    assert (turned.width, turned.height) == (48, 64)
    assert [read_number(image) for image in upright] == [0, 1, 2]


def test_frames_smaller_than_a_codec_takes_are_a_reject_with_the_sizes(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mkv", seconds=0.1, size=(64, 8), codec="ffv1")
    with pytest.raises(MediaError, match="expected at least 16 pixels per side for hevc, found 64x8") as caught:
        encoded(path, codec="hevc", side_multiple=None)
    assert caught.value.reason == "too_small"
    for codec in ("h264", "vp9"):
        assert encoded(path, codec=codec, side_multiple=None).video.height == 8
        assert encoded(path, codec=codec).video.height == 16


# Colours.

BARS = np.array(
    [[255, 255, 255], [255, 255, 0], [0, 255, 255], [0, 255, 0], [255, 0, 255], [255, 0, 0], [0, 0, 255], [0, 0, 0]],
    np.uint8,
)
MOST_LEVELS = 12
"""How far a bar may be off: two roundings to limited range, and compression."""


def bars(_: int, width: int, height: int) -> np.ndarray:
    return np.repeat(np.repeat(BARS[None], height, axis=0), width // len(BARS), axis=1)


def bars_seen(mp4: bytes, *, blue: float, red: float, black: int = 16, white: int = 235) -> np.ndarray:
    """The bars' colours by a matrix (its weights of blue and red) and range written out here, tags unread."""
    planes = pictures(mp4)[0].reformat(format="yuv444p").to_ndarray()
    middle = planes[:, planes.shape[1] // 2]
    y, cb, cr = middle[:, ((np.arange(8) + 0.5) * middle.shape[1] / 8).astype(int)].astype(float)
    luma = (y - black) / (white - black)
    cb, cr = ((chroma - 128) / (224 if black else 255) for chroma in (cb, cr))
    r, b = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
    g = (luma - red * r - blue * b) / (1 - red - blue)
    return 255 * np.stack([r, g, b], axis=-1).clip(0, 1)


def most_off(colours: np.ndarray) -> float:
    return float(np.abs(colours.astype(float) - BARS).max())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("colour", [(1, 1), (5, 2)], ids=["from_709", "from_601_full"])
def test_colour_bars_keep_their_colours_by_tags_and_by_the_stated_matrix(
    tmp_path: Path, codec: str, colour: tuple[int, int]
) -> None:
    path = make_clip(
        tmp_path / "a.mp4", seconds=0.1, size=(1024, 640), draw=bars, colour=colour, pixel_format="yuv444p"
    )
    mp4 = encoded(path, codec=codec).video.mp4
    image = pictures(mp4)[0].to_ndarray(format="rgb24")
    centres = ((np.arange(8) + 0.5) * image.shape[1] / 8).astype(int)
    assert most_off(image[image.shape[0] // 2, centres]) <= MOST_LEVELS
    assert most_off(bars_seen(mp4, blue=0.114, red=0.299)) <= MOST_LEVELS


def test_the_colour_bars_would_show_another_matrix_or_range(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", seconds=0.1, size=(256, 64), draw=bars, colour=(1, 1), pixel_format="yuv444p")
    mp4 = encoded(path, codec="h264").video.mp4
    assert most_off(bars_seen(mp4, blue=0.0722, red=0.2126)) > 2 * MOST_LEVELS
    assert most_off(bars_seen(mp4, blue=0.114, red=0.299, black=0, white=255)) > MOST_LEVELS


# The same bytes.


def test_the_same_frames_give_the_same_bytes_in_every_process() -> None:
    here = hashes_of_noise()
    assert hashes_of_noise() == here
    for _ in range(2):
        command = [sys.executable, "-m", "support.noise"]
        found = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": python_path()},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        assert json.loads(found.stdout) == here


@pytest.mark.parametrize("codec", CODECS)
def test_a_better_quality_takes_more_bytes(codec: str) -> None:
    frames = noise_frames(64, 48, 8)
    sizes = [len(encoded_noise(codec, frames, quality=quality)) for quality in (10, 20, 30, 45)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


# Parameters, manifest, index.


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"codec": "h264", "quality": 52},
            r"quality: expected 1 \(best\) to 51, the constant rate factor \(x264\) of h264",
        ),
        ({"codec": "vp9", "quality": 0}, r"quality: expected 1 \(best\) to 63"),
        ({"codec": "h264", "num_gop_frames": 0}, "num_gop_frames: expected 1 to 600, found 0"),
    ],
)
def test_a_quality_or_group_length_out_of_range_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        ConversionConfig(**wrong)


@pytest.mark.parametrize("codec", STORED_CODECS)
def test_every_codec_expects_storage_of_its_own(codec: str) -> None:
    source = source_list([sample(Path("a.mp4"), start=0.0, end=10.0)])
    default = ConversionConfig(codec=codec, audio_policy="none")
    found = forecast_of(source, default, {}).video_bytes
    assert found == pytest.approx(300 * STORED_CODECS[codec].frame_bytes)
    worse = ConversionConfig(codec=codec, audio_policy="none", quality=STORED_CODECS[codec].default_quality + 3)
    assert forecast_of(source, worse, {}).video_bytes < found


OLD_VIDEO = {"codec": "mjpeg", "frames_per_second": None, "quality": 5, "short_side": 256}
"""What manifests said of the video when mjpeg was the only codec and pictures were stored as they were."""


def test_manifests_from_before_other_codecs_and_treated_pictures_are_read_and_not_added_to(tmp_path: Path) -> None:
    fields = {
        "dataset": "t",
        "split": "train",
        "label_spaces": (SPACE,),
        "targets": ("label",),
        "audio": ConversionConfig().audio,
        "video": VideoParameters(**OLD_VIDEO),
        "tool_versions": {},
        "source_list_sha256": "0" * 64,
        "rejected": {},
    }
    write_shard_set(tmp_path, fields, ())
    written = json.loads((tmp_path / "manifest.json").read_bytes())
    assert written["video"] == OLD_VIDEO
    assert written["video_sha256"] == "04746ea91c481e73daba28b2fb71b5270dfa98528a23b13480b2f55372140303"
    assert read_shard_set(tmp_path).manifest.video == VideoParameters(**OLD_VIDEO)
    now = conversion_identity(source_list([]), ConversionConfig())
    assert now["video"] == OLD_VIDEO | {"hdr": "tone-map", "interlaced": "deinterlace", "side_multiple": 16}
    with pytest.raises(ConversionRefusedError, match=r"video\.hdr: there None, now 'tone-map'; video\.interl"):
        refuse_another_conversion(tmp_path, now | {"video": OLD_VIDEO}, now)


@pytest.mark.parametrize("lost", ["unfinished", "finished"])
def test_a_set_of_even_sides_begun_earlier_goes_on_to_the_bytes_it_would_have_had(tmp_path: Path, lost: str) -> None:
    source, root = small_clips(tmp_path / "media", 3, size=(36, 34)), tmp_path / "out"
    convert(source, root, small_config(side_multiple=None))
    whole, manifest = file_hashes(root), read_shard_set(root).manifest
    assert (manifest.video.side_multiple, "side_multiple" in manifest.video.as_json()) == (None, False)
    for name in ("manifest.json", "shards.parquet", "ca2st-000001.tar") if lost == "unfinished" else ():
        (root / name).unlink()
    assert convert(source, root, small_config()).num_samples == 3
    assert file_hashes(root) == whole
    assert verify_shard_set(root) == []
    convert(source, tmp_path / "new", small_config())
    assert read_shard_set(tmp_path / "new").manifest.video.side_multiple == 16


def test_a_short_side_between_multiples_of_16_is_told_and_the_pictures_are_no_larger(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = small_clips(tmp_path / "media", 1, size=(64, 48))
    with caplog.at_level("WARNING"):
        convert(source, tmp_path / "out", small_config(short_side=40))
    assert "short side 40: sides are multiples of 16, so it is at most 32" in caplog.messages
    assert encoded(source.samples[0].path, codec="mjpeg", short_side=40).video.height == 32


def test_the_manifest_of_another_codec_says_how_its_video_is_decoded() -> None:
    h264 = ConversionConfig(codec="h264", num_gop_frames=4).video
    assert VideoParameters(**h264.as_json()) == h264
    assert (h264.quality, h264.num_gop_frames, h264.pixel_format, h264.colour) == (20, 4, "yuv420p", "bt601-limited")


def test_a_conversion_to_h264_resumes_to_the_same_bytes_and_its_damage_is_named(tmp_path: Path) -> None:
    source, root = small_clips(tmp_path / "media", 4), tmp_path / "out"
    config = small_config(codec="h264", shard_bytes=3_000_000)
    convert(source, root, config)
    whole, shards = file_hashes(root), read_shard_set(root).shards
    assert len(shards) > 1
    for name in ("manifest.json", "shards.parquet", shards[-1].name, shards[-1].index_name):
        (root / name).unlink()
    convert(source, root, config)
    assert file_hashes(root) == whole
    assert verify_shard_set(root) == []
    (row, *_) = decode_index((root / shards[0].index_name).read_bytes()).to_pylist()
    assert (row["frame_bytes"], row["frame_xxh32"]) == ([], [])
    assert row["frame_ticks"] == [3000 * number for number in range(row["num_frames"])]
    data = bytearray((root / shards[0].name).read_bytes())
    data[row["video_offset"] + 60] ^= 1
    (root / shards[0].name).write_bytes(data)
    (problem,) = verify_shard_set(root)
    assert (problem.shard, problem.key) == (shards[0].name, row["key"])
    assert problem.what == f"mp4: bytes {row['video_offset']} to {row['video_offset'] + row['video_bytes']} differ"
