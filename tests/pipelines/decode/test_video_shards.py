"""Shards of H.264, HEVC and VP9 through the loader: the frames that were filmed, checked, named when damaged (P1, P4,
P7, P14).
"""

import dataclasses
import logging
import random
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ca2st.batch import ClipBatch
from ca2st.errors import CA2STError, EnvironmentFault, UserInputError
from ca2st.spec import ClipSpec
from pipelines.augment.boxes import CropBox, ErasedBox
from pipelines.augment.rand_augment import ImageAugment, Operation
from pipelines.config import BackendName, EvaluationSetup, LoaderConfig, TrainSetup
from pipelines.decode import backends
from pipelines.decode.backends import RoutedBackend, choose_backend, make_backend
from pipelines.decode.dali import GraphBackend, dali_backend
from pipelines.decode.reference import ReferenceBackend, decode_frames, decode_video, packets_to_decode
from pipelines.errors import LoaderClosedError, SampleDamageError
from pipelines.loader import EvaluationLoader, TrainLoader
from pipelines.rendering import JpegFrames, RenderRequest, VideoMember
from pipelines.storage import samples
from pipelines.storage.index import SampleEntry
from pipelines.storage.samples import SampleReader, video_facts
from pipelines.threads import StatsRecorder
from pipelines.views import SamplingConfig
from sharding.format.shard_set import ShardSet, VideoParameters
from sharding.media.codecs import STORED_CODECS
from support.fake_shards import flip_byte, rewrite_manifest
from support.media import make_clip, read_number
from support.video_shards import encoded, video_shard_set

CLIP = ClipSpec(num_frames=8, crop_size=64, mel_rows=48)
VIDEO_CODECS = [name for name, codec in STORED_CODECS.items() if not codec.has_frame_ranges]
UNEVEN = [0.0, 0.02, 0.1, 0.13, 0.3, 0.31, 0.4, 0.55, 0.6, 0.7, 0.9, 1.0, 1.01, 1.2, 1.3, 1.4, 1.5, 1.52, 1.9]
TIMES = {"steady": [number / 25 for number in range(25)], "uneven": UNEVEN, "single": [0.0]}
LEAST_PSNR_DB = 30.0
"""Two codecs' pictures of the same clip, both compressed; wrong colours or frames give under 20."""
SIZE, FRAMES = 40, 6


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("media")
    return [make_clip(folder / f"{name}.mp4", times=times, size=(64, 64)) for name, times in TIMES.items()]


@pytest.fixture(scope="module")
def sets(media: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardSet]:
    folder = tmp_path_factory.mktemp("sets")
    return {codec: video_shard_set(folder / codec, media, codec) for codec in STORED_CODECS}


@pytest.fixture
def fresh(media: list[Path], tmp_path: Path) -> ShardSet:
    """A set of H.264, to be damaged."""
    return video_shard_set(tmp_path / "set", media, "h264")


def read(shard_set: ShardSet, backend: BackendName = "reference") -> ClipBatch:
    setup = EvaluationSetup(
        shard_set=shard_set,
        clip=CLIP,
        targets=("label",),
        sampling=SamplingConfig(scheme="uniform"),
        loader=LoaderConfig(backend=backend, prefetch_steps=0, decode_threads=2),
        global_batch_size=3,
        num_lanes=1,
    )
    with EvaluationLoader(setup) as loader:
        (batch,) = loader.batches()
    return batch


def psnr_db(a: torch.Tensor, b: torch.Tensor) -> float:
    error = (a.double() - b.double()).square().mean().item()
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


# What arrives.


@pytest.mark.parametrize(("codec", "backend"), [*((codec, "reference") for codec in VIDEO_CODECS), ("vp9", "dali")])
def test_every_frame_that_arrives_shows_its_own_number_and_carries_its_own_time(
    sets: dict[str, ShardSet], codec: str, backend: BackendName
) -> None:
    batch = read(sets[codec], backend)
    for row, times in enumerate(TIMES.values()):
        shown_at = np.array(times) - times[0]
        duration = shown_at[-1] + (np.median(np.diff(shown_at)) if len(times) > 1 else 0.04)
        moments = [(2 * k + 1) * duration / 16 + 1e-6 for k in range(8)]  # middles of eight equal parts of the clip
        wanted = [int(place) for place in np.searchsorted(shown_at, moments, side="right") - 1]
        shown = [read_number(picture) for picture in batch.video[row].permute(1, 2, 3, 0).numpy()]
        assert shown == wanted
        expected = np.array([times[k] for k in wanted]).reshape(4, 2)
        assert np.allclose(batch.intervals_seconds[row, 1:].numpy(), expected, atol=2e-4)


@pytest.mark.parametrize("codec", VIDEO_CODECS)
def test_every_codec_gives_nearly_the_pixels_that_mjpeg_gives(sets: dict[str, ShardSet], codec: str) -> None:
    ours, theirs = read(sets[codec]), read(sets["mjpeg"])
    assert ours.sample_ids == theirs.sample_ids
    assert all(psnr_db(a, b) >= LEAST_PSNR_DB for a, b in zip(ours.video, theirs.video, strict=True))


def test_a_set_of_several_codecs_is_rendered_clip_by_clip_and_put_back_in_order(media: list[Path]) -> None:
    requests = [request(media[number % 2], codec) for number, codec in enumerate(["vp9", "h264", "vp9", "hevc"])]
    one = ReferenceBackend(crop_size=SIZE, stats=StatsRecorder())
    routed = RoutedBackend({codec: ReferenceBackend(crop_size=SIZE, stats=StatsRecorder()) for codec in VIDEO_CODECS})
    assert torch.equal(routed.render(requests), one.render(requests))
    assert routed.name == "h264: reference, hevc: reference, vp9: reference"


def test_p10_training_from_videos_resumes_at_any_step_to_the_same_pixels(sets: dict[str, ShardSet]) -> None:
    setup = TrainSetup(
        shard_sets=[sets["h264"]],
        clip=CLIP,
        targets=("label",),
        sampling=SamplingConfig(scheme="uniform"),
        loader=LoaderConfig(backend="reference"),
        seed=3,
        global_batch_size=1,
    )
    with TrainLoader(setup) as loader:
        whole, rest = list(loader.batches(1)), list(loader.batches(1, first_step=1))
    assert [batch.sample_ids for batch in rest] == [batch.sample_ids for batch in whole[1:]]
    assert all(torch.equal(a.video, b.video) for a, b in zip(rest, whole[1:], strict=True))


# Decoding by index.


def member(path: Path, codec: str, frame_indices: tuple[int, ...]) -> VideoMember:
    return VideoMember(encoded(path, codec=codec).video.mp4, codec, frame_indices)


def request(path: Path, codec: str, *, boxes: tuple[CropBox, ...] | None = None, flip: bool = False) -> RenderRequest:
    frames = member(path, codec, (3, 3, 9, 10, 17, 1))
    whole = CropBox(top=0, left=0, height=64, width=64)
    return RenderRequest(frames=frames, boxes=boxes or (whole,), flip=flip, where="ca2st-000000.tar, sample x")


@pytest.mark.parametrize("codec", VIDEO_CODECS)
def test_frames_come_by_index_in_any_order_as_in_a_whole_decode(media: list[Path], codec: str) -> None:
    whole = decode_video(member(media[0], codec, tuple(range(25))), where="x")
    for indices in [(24,), (7, 8, 0), (23, 23, 2, 11), (0, 16)]:
        assert torch.equal(decode_video(member(media[0], codec, indices), where="x"), whole[list(indices)])
    assert [read_number(frame.permute(1, 2, 0).numpy()) for frame in whole] == list(range(25))


def test_only_groups_with_wanted_frames_are_decoded_and_those_no_further_than_needed() -> None:
    assert packets_to_decode([3, 5, 17], [0, 8, 16]) == [0, 1, 2, 3, 4, 5, 16, 17]
    assert packets_to_decode([8], [0, 8, 16]) == [8]
    assert packets_to_decode([0], [0]) == [0]


@given(wanted=st.sets(st.integers(0, 60), min_size=1), gop=st.integers(1, 20))
def test_what_is_decoded_holds_what_is_wanted_and_starts_at_key_frames(wanted: set[int], gop: int) -> None:
    decoded = packets_to_decode(sorted(wanted), list(range(0, 61, gop)))
    assert wanted <= set(decoded)
    assert decoded == sorted(set(decoded))
    for number in decoded:
        assert number % gop == 0 or number - 1 in decoded
        assert any(number <= later < (number // gop + 1) * gop for later in wanted)


# DALI on the CPU against the reference.


@pytest.fixture(scope="module")
def dali() -> GraphBackend:
    return dali_backend("vp9", num_frames=FRAMES, crop_size=SIZE, views_per_clip=1, threads=2, stats=StatsRecorder())


def box(top: int, left: int, height: int, width: int) -> tuple[CropBox, ...]:
    return (CropBox(top=top, left=left, height=height, width=width),)


def test_dali_decodes_vp9_bit_for_bit_as_the_reference_does(dali: GraphBackend, media: list[Path]) -> None:
    oracle = ReferenceBackend(crop_size=SIZE, stats=StatsRecorder())
    requests = [request(media[number], "vp9", boxes=box(number, 9, SIZE, SIZE)) for number in (0, 1)]
    assert torch.equal(dali.render(requests), oracle.render(requests))


def test_dali_resizes_flips_and_orders_views_of_videos_as_the_reference_does(media: list[Path]) -> None:
    boxes = (*box(0, 0, 64, 64), *box(3, 10, 50, 30))
    requests = [request(media[0], "vp9", boxes=boxes, flip=True), request(media[1], "vp9", boxes=boxes)]
    backend = dali_backend("vp9", num_frames=FRAMES, crop_size=SIZE, views_per_clip=2, threads=1, stats=StatsRecorder())
    ours = backend.render(requests)
    oracle = ReferenceBackend(crop_size=SIZE, stats=StatsRecorder()).render(requests)
    assert ours.shape == (4, 3, FRAMES, SIZE, SIZE)
    assert (ours.int() - oracle.int()).abs().max() <= 1
    backend.close()
    with pytest.raises(LoaderClosedError, match="backend dali: closed"):
        backend.render(requests)


BARS = [[255, 255, 255], [255, 255, 0], [0, 255, 255], [0, 255, 0], [255, 0, 255], [255, 0, 0], [0, 0, 255], [0, 0, 0]]


def test_colour_bars_of_a_bt709_source_come_out_of_dali_and_the_reference_with_their_colours(
    dali: GraphBackend, tmp_path: Path
) -> None:
    def bars(_: int, width: int, height: int) -> np.ndarray:
        return np.repeat(np.repeat(np.array([BARS], np.uint8), height, axis=0), width // 8, axis=1)

    path = make_clip(tmp_path / "a.mp4", size=(64, 64), draw=bars, colour=(1, 1), pixel_format="yuv444p")
    one = request(path, "vp9", boxes=box(0, 0, 64, 64))
    for backend in (dali, ReferenceBackend(crop_size=SIZE, stats=StatsRecorder())):
        picture = backend.render([one])[0, :, 0]
        seen = picture[:, SIZE // 2, SIZE // 16 :: SIZE // 8].T.int()
        assert (seen - torch.tensor(BARS)).abs().max() <= 12


def test_a_video_is_augmented_and_erased_as_the_reference_does(dali: GraphBackend, media: list[Path]) -> None:
    operations = (Operation(name="Rotate", argument=9.0), Operation(name="Equalize"))
    erased = (ErasedBox(box=CropBox(top=4, left=5, height=9, width=7), colour=(9, 99, 199), noise=()),)
    plain = request(media[0], "vp9", boxes=box(2, 3, SIZE, SIZE))
    one = dataclasses.replace(plain, augment=ImageAugment(operations), erased=erased)
    found = dali.render([one, plain])
    assert torch.equal(found, ReferenceBackend(crop_size=SIZE, stats=StatsRecorder()).render([one, plain]))
    assert not torch.equal(found[0], found[1])


# P1: flipped bytes.


def reader(shard_set: ShardSet, row: int = 0) -> tuple[SampleReader, SampleEntry]:
    reader = SampleReader(shard_set)
    return reader, reader.indexes.entry(0, row)


def test_p1_a_flipped_byte_anywhere_in_a_video_is_named_with_shard_key_and_offset(fresh: ShardSet) -> None:
    fetcher, entry = reader(fresh)
    chance, path = random.Random(0), fresh.root / entry.shard.name
    for _ in range(20):
        offset = entry.video_offset + chance.randrange(entry.video_bytes)
        flip_byte(path, offset)
        expected = f"ca2st-000000.tar, sample {entry.key}, mp4 at byte {entry.video_offset} .*expected xxh3-64"
        with pytest.raises(SampleDamageError, match=expected):
            fetcher.fetch(entry, [0])
        flip_byte(path, offset)
    assert fetcher.fetch(entry, [0]).member is not None


def test_the_whole_video_is_read_and_counted(fresh: ShardSet) -> None:
    stats = StatsRecorder()
    _, entry = reader(fresh)
    sample = SampleReader(fresh, stats).fetch(entry, [3])
    assert (sample.height, sample.width, sample.frames) == (64, 64, {})
    assert sample.clip_frames((3, 1)) == VideoMember(sample.member or b"", "h264", (3, 1))
    assert stats.snapshot().bytes_read == entry.video_bytes + entry.mel_bytes


def test_a_video_too_large_to_be_read_whole_is_refused(fresh: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    fetcher, entry = reader(fresh)
    monkeypatch.setattr(samples, "MOST_MEMBER_BYTES", 100)
    with pytest.raises(SampleDamageError, match=r"a video of at most 100 bytes, found \d+; .*--codec mjpeg"):
        fetcher.fetch(entry, [0])


# P4: an index that contradicts the video.


def test_p4_a_video_of_another_number_of_frames_than_the_index_says_is_refused(fresh: ShardSet) -> None:
    fetcher, entry = reader(fresh)
    longer = dataclasses.replace(entry, frame_ticks=np.arange(30, dtype=np.int32))
    with pytest.raises(SampleDamageError, match=f"sample {entry.key}: expected a video of 30 frames, found 25"):
        fetcher.fetch(longer, [0])


def test_p4_frame_ranges_where_the_codec_has_none_are_refused(sets: dict[str, ShardSet], tmp_path: Path) -> None:
    jpegs = sets["mjpeg"]
    for path in jpegs.root.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    mislabelled = rewrite_manifest(tmp_path, jpegs.shards, video=VideoParameters(codec="h264", num_gop_frames=8))
    with pytest.raises(SampleDamageError, match=r"as many sizes, times .* \(times alone for h264\)"):
        reader(mislabelled)


# P7: passes its checksum, does not decode.


def spoilt(good: RenderRequest, where: str) -> RenderRequest:
    """The same video with its coded pictures overwritten, its boxes whole."""
    assert isinstance(good.frames, VideoMember)
    data = bytearray(good.frames.data)
    at = data.index(b"mdat") + 4
    size = int.from_bytes(data[at - 8 : at - 4], "big") - 8
    data[at : at + size] = bytes(size)
    return dataclasses.replace(good, frames=dataclasses.replace(good.frames, data=bytes(data)), where=where)


@pytest.mark.parametrize("codec", VIDEO_CODECS)
def test_p7_a_video_that_cannot_be_decoded_is_named(media: list[Path], codec: str) -> None:
    bad = spoilt(request(media[0], codec), "ca2st-000009.tar, sample bad")
    with pytest.raises(
        SampleDamageError, match=rf"ca2st-000009.tar, sample bad: the {codec} video has the right check"
    ):
        decode_frames(bad)


def test_p7_the_video_that_fails_a_whole_run_of_dali_is_found_and_the_backend_lives_on(
    dali: GraphBackend, media: list[Path]
) -> None:
    good = request(media[0], "vp9")
    before = dali.render([good])
    with pytest.raises(SampleDamageError, match=r"ca2st-000009.tar, sample bad: .*cannot be decoded"):
        dali.render([good, spoilt(good, "ca2st-000009.tar, sample bad"), good])
    assert torch.equal(dali.render([good]), before)


def test_a_frame_behind_the_end_of_a_video_is_an_error_and_never_black(media: list[Path]) -> None:
    with pytest.raises(SampleDamageError, match=r"x: the vp9 video .*expected frame 25, found 25 frames"):
        decode_video(member(media[0], "vp9", (0, 25)), where="x")


def test_single_frames_never_reach_the_graph_for_videos(dali: GraphBackend, media: list[Path]) -> None:
    wrong = dataclasses.replace(request(media[0], "vp9"), frames=JpegFrames((b"",) * FRAMES))
    with pytest.raises(CA2STError, match="sample x: expected a video, found single frames"):
        dali.render([wrong])


# P14: hostile boxes.


def test_p14_boxes_that_make_no_sense_are_refused_before_any_decoder_sees_them(media: list[Path]) -> None:
    data, h264 = encoded(media[0], codec="h264").video.mp4, STORED_CODECS["h264"]
    assert video_facts(data, h264, where="x").num_frames == 25
    entry = data.rindex(b"avc1")
    huge = data[: entry + 28] + b"\xff\xff\xff\xff" + data[entry + 32 :]
    refusals = {
        "expected an MP4 with a box moov": [b"", b"no video at all", data[: data.index(b"moov") - 4], b"\0" * 64],
        "expected an MP4 with a box stbl": [data.replace(b"stbl", b"stbx")],
        "expected a track of h264, found b'vp09'": [data[:entry] + b"vp09" + data[entry + 4 :]],
        "pixels, found 65535 x 65535": [huge],
    }
    for message, members in refusals.items():
        for one in members:
            with pytest.raises(SampleDamageError, match=f"^here: .*{message}"):
                video_facts(one, h264, where="here")


def test_p14_a_picture_of_another_size_than_its_boxes_say_is_refused(media: list[Path]) -> None:
    data = encoded(media[0], codec="h264").video.mp4
    entry = data.rindex(b"avc1")
    lying = data[: entry + 28] + (32).to_bytes(2, "big") + data[entry + 30 :]
    with pytest.raises(
        SampleDamageError, match=r"x: expected frames of 64 x 32 in the h264 video, found \[\(64, 64\)\]"
    ):
        decode_video(VideoMember(lying, "h264", (0,)), where="x")


# Manifest and choice.


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (VideoParameters(codec="av1"), "expected codec mjpeg or h264 or hevc or vp9, found av1"),
        (VideoParameters(codec="h264", colour="bt709-limited"), "expected colours bt601-limited for h264"),
    ],
)
def test_a_set_of_an_unknown_codec_or_colour_is_refused(fresh: ShardSet, video: VideoParameters, message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        read(rewrite_manifest(fresh.root, fresh.shards, video=video))


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_auto_without_a_gpu_reads_h264_and_hevc_by_the_reference_and_names_the_faster_codec(
    codec: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = make_backend(
        "auto", codecs=[codec], num_frames=4, crop_size=8, views_per_clip=1, threads=1, stats=StatsRecorder()
    )
    assert backend.name == "reference"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"DALI decodes {codec} on a GPU only; slow: on a CPU train from shards of --codec mjpeg" in record.message
    with pytest.raises(EnvironmentFault, match=f"backend dali: decodes {codec} on a GPU only"):
        choose_backend("dali", codec, dali_installed=True)


def test_auto_reads_vp9_by_dali_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=backends.__name__):
        backend = make_backend(
            "auto", codecs=["vp9"], num_frames=4, crop_size=8, views_per_clip=1, threads=1, stats=StatsRecorder()
        )
    assert backend.name == "dali"
    backend.close()
    assert caplog.messages == [
        "backend dali: chosen by auto, nvidia-dali is installed; VP9 videos are decoded on the CPU"
    ]


def test_the_decoder_of_every_stored_codec_is_there() -> None:
    assert {codec: av.codec.Codec(codec, "r").name for codec in STORED_CODECS} == {
        "mjpeg": "mjpeg",
        "h264": "h264",
        "hevc": "hevc",
        "vp9": "vp9",
    }
