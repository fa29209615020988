"""The graphs on a CUDA device: near the reference stage by stage, on the device to the end, alike in every run.

Clips are of the size that shards have: the video engines refuse pictures as small as other tests use.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.damage import DAMAGES, try_damages
from benchmarks.parity import (
    StoredClip,
    augment_parity,
    codec_parity,
    plain,
    resize_parity,
    stored_clips,
    training_requests,
)
from ca2st.batch import ClipBatch
from ca2st.spec import ClipSpec
from pipelines.benchmark.clips import DrawnClips
from pipelines.config import EvaluationSetup, LoaderConfig
from pipelines.decode.backends import cuda_decoders
from pipelines.decode.dali import GraphBackend, dali_backend
from pipelines.decode.reference import ReferenceBackend
from pipelines.errors import SampleDamageError
from pipelines.loader import EvaluationLoader
from pipelines.rendering import RenderRequest, VideoMember
from pipelines.threads import StatsRecorder
from pipelines.views import SamplingConfig
from sharding.media.codecs import STORED_CODECS
from support.gpu import require_gpu
from support.media import make_clip
from support.video_shards import video_shard_set

pytestmark = pytest.mark.gpu
SPEC = ClipSpec(num_frames=8, crop_size=224, mel_rows=48)
DRAWN = DrawnClips(count=3, width=340, height=256, num_frames=48)
VIDEO_CODECS = [name for name, codec in STORED_CODECS.items() if not codec.has_frame_ranges]
LEAST_DECODE_DB, MOST_MEAN_LEVELS = 35.0, 1.5
"""What decoders may differ by: interpolation and rounding of colours. Wrong frames, colours or ranges give less than
25 dB."""


@pytest.fixture(scope="module")
def device() -> torch.device:
    return require_gpu()


@pytest.fixture(scope="module")
def stored(device: torch.device) -> dict[str, list[StoredClip]]:
    return {codec: stored_clips(codec, DRAWN, num_gop_frames=8, threads=4) for codec in STORED_CODECS}


@pytest.fixture(params=list(STORED_CODECS))
def codec(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backend(codec: str, device: torch.device) -> Iterator[GraphBackend]:
    made = backend_of(codec, device)
    yield made
    made.close()


def backend_of(codec: str, device: torch.device, threads: int = 4) -> GraphBackend:
    return dali_backend(
        codec,
        device=device,
        num_frames=SPEC.num_frames,
        crop_size=SPEC.crop_size,
        views_per_clip=1,
        threads=threads,
        stats=StatsRecorder(),
    )


def requests_of(clips: list[StoredClip], count: int = 6, *, rand_augment: bool = True) -> list[RenderRequest]:
    return training_requests(clips, SPEC, count=count, rand_augment=rand_augment)


def test_the_driver_decodes_what_shards_are_stored_in(device: torch.device) -> None:
    found = cuda_decoders(device)
    assert found is not None
    assert {name: found.refusal(name, short_side=256) for name in STORED_CODECS} == dict.fromkeys(STORED_CODECS)


def test_decoding_lies_near_the_reference(
    codec: str, device: torch.device, stored: dict[str, list[StoredClip]]
) -> None:
    decoded, _ = codec_parity(stored[codec], SPEC, device, threads=4)
    assert decoded.stage == "decode"
    assert decoded.psnr_db is None or decoded.psnr_db >= LEAST_DECODE_DB, decoded
    assert decoded.mean_levels <= MOST_MEAN_LEVELS, decoded


def test_resizing_is_within_the_tolerance(device: torch.device, stored: dict[str, list[StoredClip]]) -> None:
    found = resize_parity(stored["mjpeg"], SPEC, device)
    assert found.is_within, found


def test_augmentation_is_that_of_the_cpu_to_the_byte(device: torch.device, stored: dict[str, list[StoredClip]]) -> None:
    for found in augment_parity(stored["mjpeg"], SPEC, device):
        assert found.max_levels == 0, found


def test_views_stay_on_the_device_and_are_contiguous(
    codec: str, backend: GraphBackend, device: torch.device, stored: dict[str, list[StoredClip]]
) -> None:
    views = backend.render(requests_of(stored[codec]))
    assert views.device.type == "cuda"
    assert views.is_contiguous()
    assert views.shape == (6, 3, SPEC.num_frames, SPEC.crop_size, SPEC.crop_size)


def test_a_flip_mirrors_the_view_exactly(
    codec: str, backend: GraphBackend, stored: dict[str, list[StoredClip]]
) -> None:
    one = plain(requests_of(stored[codec], 1)[0])
    straight, mirrored = backend.render([one]), backend.render([replace(one, flip=True)])
    assert torch.equal(mirrored, straight.flip(-1))


def test_pixels_depend_neither_on_the_run_nor_on_neighbours_nor_on_threads(
    codec: str, backend: GraphBackend, device: torch.device, stored: dict[str, list[StoredClip]]
) -> None:
    requests = requests_of(stored[codec])
    together = backend.render(requests)
    assert torch.equal(backend.render(requests), together)
    assert torch.equal(torch.cat([backend.render([one]) for one in requests]), together)
    other = backend_of(codec, device, threads=1)
    assert torch.equal(other.render(requests), together)
    other.close()


def test_views_survive_the_runs_that_follow(
    codec: str, backend: GraphBackend, stored: dict[str, list[StoredClip]]
) -> None:
    """DALI writes over its own memory: what was handed over must be ours."""
    requests = requests_of(stored[codec])
    views = backend.render(requests)
    before = views.cpu()
    for _ in range(4):
        backend.render(requests[::-1])
    assert torch.equal(views.cpu(), before)


@pytest.mark.parametrize("codec", VIDEO_CODECS)
def test_p7_a_video_that_cannot_be_decoded_is_named_and_the_backend_lives_on(
    codec: str, device: torch.device, stored: dict[str, list[StoredClip]]
) -> None:
    backend = backend_of(codec, device)
    good, other = requests_of(stored[codec], 2, rand_augment=False)
    assert isinstance(good.frames, VideoMember)
    member = replace(good.frames, data=DAMAGES["no_moov"](good.frames.data))
    bad = replace(good, frames=member, where="ca2st-000009.tar, sample bad")
    before = backend.render([other])
    with pytest.raises(SampleDamageError, match=r"ca2st-000009.tar, sample bad"):
        backend.render([other, bad])
    assert torch.equal(backend.render([other]), before)
    backend.close()


@pytest.mark.parametrize("codec", VIDEO_CODECS)
def test_p15_damaged_videos_neither_crash_nor_hang_nor_show_other_pictures_in_silence(
    codec: str, device: torch.device, stored: dict[str, list[StoredClip]], tmp_path: Path
) -> None:
    trials = try_damages(stored[codec][0], SPEC, tmp_path, device="cuda", seconds=60, at_once=4)
    assert [trial for trial in trials if not trial.is_sound] == []
    assert {trial.backend for trial in trials} <= {"dali-gpu", ""}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("media")
    return [make_clip(folder / f"{number}.mp4", seconds=2, size=(320, 256)) for number in range(3)]


def test_a_loaders_batch_is_on_the_device_and_going_there_copies_nothing(
    codec: str, device: torch.device, media: list[Path], tmp_path: Path
) -> None:
    shard_set = video_shard_set(tmp_path / codec, media, codec, short_side=256)
    batches: list[ClipBatch] = []
    setup = EvaluationSetup(
        shard_set=shard_set,
        clip=SPEC,
        targets=("label",),
        sampling=SamplingConfig(scheme="uniform"),
        loader=LoaderConfig(decode_threads=2),
        global_batch_size=3,
        num_lanes=1,
        device=device,
    )
    with EvaluationLoader(setup) as loader:
        assert loader.backend_name == "dali-gpu"
        batches += loader.batches()
    (batch,) = batches
    here = batch.to(torch.device("cuda", torch.cuda.current_device()))
    assert batch.video.device.type == "cuda"
    assert here.video.data_ptr() == batch.video.data_ptr()
    assert here.normalised_video().isfinite().all()


def test_the_whole_view_lies_near_the_references(
    codec: str, backend: GraphBackend, stored: dict[str, list[StoredClip]]
) -> None:
    requests = requests_of(stored[codec], rand_augment=False)
    oracle = ReferenceBackend(crop_size=SPEC.crop_size, stats=StatsRecorder()).render(requests)
    difference = (backend.render(requests).cpu().int() - oracle.int()).abs().double()
    assert difference.mean() <= MOST_MEAN_LEVELS
