"""Drawn clips in memory, and the distance of the graphs to the reference: tried by the backends for the CPU."""

import pytest
import torch

from benchmarks.parity import (
    TOLERANCES,
    SpeedCase,
    StoredClip,
    augment_parity,
    backend_on,
    codec_parity,
    compare,
    measure_speed,
    plain,
    resize_parity,
    speed_cases,
    stored_clips,
    training_requests,
)
from ca2st.spec import ClipSpec
from pipelines.benchmark.clips import DrawnClips
from pipelines.decode.reference import decode_frames, packets_to_decode
from pipelines.rendering import JpegFrames, VideoMember
from sharding.media.codecs import STORED_CODECS

SPEC = ClipSpec(num_frames=4, crop_size=32, mel_rows=16)
DRAWN = DrawnClips(count=2, width=80, height=64, num_frames=20)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stored() -> dict[str, list[StoredClip]]:
    return {codec: stored_clips(codec, DRAWN, num_gop_frames=8, threads=2) for codec in STORED_CODECS}


def test_clips_of_every_codec_show_the_same_scene(stored: dict[str, list[StoredClip]]) -> None:
    frames = {}
    for codec, clips in stored.items():
        one = plain(training_requests(clips, SPEC, count=1, rand_augment=True)[0])
        assert isinstance(one.frames, JpegFrames if codec == "mjpeg" else VideoMember)
        frames[codec] = decode_frames(one).double()
    for codec, pixels in frames.items():
        assert pixels.shape == (4, 3, 64, 80)
        assert (pixels - frames["mjpeg"]).abs().mean() < 12, codec
    assert (frames["mjpeg"] - frames["mjpeg"].flip(0)).abs().mean() > 12, "scenes stand still: any frame would do"


def test_requests_are_training_views_that_differ(stored: dict[str, list[StoredClip]]) -> None:
    requests = training_requests(stored["mjpeg"], SPEC, count=6, rand_augment=True)
    assert len({one.boxes for one in requests}) == 6
    assert all(one.augment is not None for one in requests)
    assert all(one.augment is None for one in training_requests(stored["mjpeg"], SPEC, count=6, rand_augment=False))
    assert plain(requests[0]).augment is None


@pytest.mark.parametrize("codec", ["mjpeg", "vp9"])
def test_dali_on_the_cpu_decodes_within_the_tolerance_by_this_measure_too(
    stored: dict[str, list[StoredClip]], codec: str
) -> None:
    decoded, whole = codec_parity(stored[codec], SPEC, CPU, threads=2)
    assert (decoded.stage, decoded.is_within, decoded.psnr_db) == ("decode", True, None)
    assert (whole.stage, whole.is_within) == ("whole", None)


def test_stages_behind_the_decoder_are_measured_alone(stored: dict[str, list[StoredClip]]) -> None:
    resized = resize_parity(stored["h264"], SPEC, CPU)
    assert resized.is_within
    assert resized.max_levels <= 1
    augmented = augment_parity(stored["h264"], SPEC, CPU)
    assert {found.stage: found.max_levels for found in augmented} == {"pointwise": 0, "warp": 0}


def test_a_distance_is_measured_and_judged() -> None:
    oracle = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    ours = oracle.clone()
    ours[0, 0, 0, 0] = 103
    found = compare("h264", "pointwise", ours, oracle)
    assert (found.max_levels, found.is_within) == (3, False)
    assert found.mean_levels == pytest.approx(3 / 192)
    assert found.psnr_db == pytest.approx(61.4, abs=0.1)
    assert compare("h264", "resize", ours, oracle).is_within
    assert not compare("h264", "resize", ours + 9, oracle).is_within
    assert compare("h264", "decode", oracle, oracle).psnr_db is None
    assert TOLERANCES["whole"] is None


def test_speed_counts_what_was_rendered(stored: dict[str, list[StoredClip]]) -> None:
    case = SpeedCase(codec="mjpeg", num_gop_frames=None, threads=1, rand_augment=True)
    found = measure_speed(case, stored["mjpeg"], SPEC, CPU, batch=3, seconds=0.001)
    assert found.backend == "dali"
    assert found.num_clips % 3 == 0
    assert found.num_clips > 0
    assert found.decode_ms + found.augment_ms <= 1000 / found.clips_per_second


def test_cases_vary_one_thing_at_a_time_and_no_case_twice() -> None:
    cases = speed_cases(("h264", "mjpeg"), gops=(4, 8), threads=(1, 7), usual_gop=8, usual_threads=7)
    found = [(case.codec, case.num_gop_frames, case.threads, case.rand_augment, case.is_uneven) for case in cases]
    assert found == [
        ("h264", 4, 7, False, False),
        ("h264", 8, 7, False, False),
        ("h264", 8, 1, False, False),
        ("h264", 8, 7, False, True),
        ("h264", 8, 7, True, False),
        ("mjpeg", None, 7, False, False),
        ("mjpeg", None, 1, False, False),
        ("mjpeg", None, 7, True, False),
    ]


def test_key_frames_lie_where_the_case_wants_them(stored: dict[str, list[StoredClip]]) -> None:
    (clip, _) = stored_clips("h264", DRAWN, num_gop_frames=4, threads=2)
    assert clip.num_gop_frames == 4
    assert packets_to_decode([5], [0, 4, 8]) == [4, 5]
    assert len(clip.video.mp4) > len(stored["h264"][0].video.mp4)
    assert stored["mjpeg"][0].num_gop_frames is None


def test_a_backend_for_the_cpu_is_what_a_loader_takes() -> None:
    backend = backend_on(CPU, "mjpeg", SPEC, threads=1)
    assert backend.name == "dali"
    backend.close()
