"""The loaders with everything of the augmentation switched on. Row P10; and the backends, stage by stage."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ca2st.batch import MIXING_FIELDS, ClipBatch
from ca2st.errors import UserInputError
from ca2st.spec import MEL_ROW_SECONDS, ClipSpec
from pipelines.augment.boxes import CropBox, ErasedBox, ErasingConfig
from pipelines.augment.config import AugmentConfig
from pipelines.augment.formulas import augmented, erase_in_place
from pipelines.augment.mixing import MixingConfig
from pipelines.augment.rand_augment import ImageAugment, Operation
from pipelines.augment.spectrogram import SpectrogramConfig
from pipelines.config import LoaderConfig, TrainSetup
from pipelines.decode.dali import dali_backend
from pipelines.decode.reference import ReferenceBackend
from pipelines.loader import TrainLoader
from pipelines.rendering import JpegFrames, RenderRequest, ViewBackend
from pipelines.threads import StatsRecorder
from sharding.format.shard_set import ShardSet
from support.fake_shards import FakeSample, make_samples, make_shard_set

CLIP = ClipSpec(num_frames=8, crop_size=32, mel_rows=64)
BATCH = 8
EVERYTHING = AugmentConfig(
    rand_augment="rand-m7-n4-mstd0.5-inc1",
    erasing=ErasingConfig(probability=0.5, mode="pixel", most_boxes=2),
    spectrogram=SpectrogramConfig(time_masks=2, time_mask_rows=10, frequency_masks=2, roll_rows=9, noise_std=0.1),
    mixing=MixingConfig(probability=0.9, switch_probability=0.3),
)
FAST = LoaderConfig(backend="dali", shuffle_block=4, fetch_threads=2, decode_threads=2)


def batches(shard_set: ShardSet, loader: LoaderConfig = FAST, *, first_step: int = 0, **values: Any) -> list[ClipBatch]:
    fields: dict[str, Any] = {"augment": EVERYTHING, "seed": 3, "global_batch_size": BATCH} | values
    setup = TrainSetup(shard_sets=[shard_set], clip=CLIP, targets=("label",), loader=loader, **fields)
    with TrainLoader(setup) as source:
        return list(source.batches(1, first_step=first_step))


def assert_same(found: list[ClipBatch], expected: list[ClipBatch]) -> None:
    assert [one.sample_ids for one in found] == [one.sample_ids for one in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("video", "mel", "intervals_seconds", "labels", "has_audio"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        for name in MIXING_FIELDS:
            assert torch.equal(getattr(ours.mixing, name), getattr(theirs.mixing, name)), name


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """26 samples, every fourth without sound."""
    samples = make_samples(26)
    for index in range(0, 26, 4):
        samples[index] = replace(samples[index], mel_rows=0)
    return make_shard_set(tmp_path_factory.mktemp("augmented"), samples)


@pytest.fixture(scope="module")
def whole(shard_set: ShardSet) -> list[ClipBatch]:
    return batches(shard_set)


def test_p10_two_resumes_in_a_row_give_the_same_augmented_batches(shard_set: ShardSet, whole: list[ClipBatch]) -> None:
    assert len(whole) == 3
    for first_step in (1, 1, 2):
        assert_same(batches(shard_set, first_step=first_step), whole[first_step:])


def test_p10_other_threads_change_no_augmented_number(shard_set: ShardSet, whole: list[ClipBatch]) -> None:
    other = replace(FAST, fetch_threads=5, decode_threads=4, prefetch_steps=0)
    assert_same(batches(shard_set, other), whole)


@pytest.mark.parametrize("world_size", [2, 4])
def test_p10_any_world_size_augments_and_mixes_alike(
    shard_set: ShardSet, whole: list[ClipBatch], world_size: int
) -> None:
    shares = [batches(shard_set, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, expected in enumerate(whole):
        parts = [share[step] for share in shares]
        for name in ("video", "mel", "intervals_seconds"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(expected, name)), name
        for name in MIXING_FIELDS:
            assert torch.equal(
                torch.cat([getattr(part.mixing, name) for part in parts]), getattr(expected.mixing, name)
            )


def test_everything_that_is_switched_on_shows(shard_set: ShardSet, whole: list[ClipBatch]) -> None:
    plain = batches(shard_set, augment=AugmentConfig())
    changed = [
        not torch.equal(*pair)
        for ours, theirs in zip(whole, plain, strict=True)
        for pair in zip(ours.video, theirs.video, strict=True)
    ]
    assert sum(changed) / len(changed) > 0.8
    for ours, theirs in zip(whole, plain, strict=True):
        assert theirs.mixing is None
        assert ours.mixing is not None
        assert (ours.mixing.label_share < 1).any()
        assert not ours.mel[~ours.has_audio].any()
        assert (ours.mel == 0).double().mean() > (theirs.mel == 0).double().mean()


def test_times_follow_a_spectrogram_that_is_rolled(shard_set: ShardSet) -> None:
    rolled = batches(shard_set, augment=AugmentConfig(spectrogram=SpectrogramConfig(roll_rows=9)))
    shifts = set()
    for ours, theirs in zip(rolled, batches(shard_set, augment=AugmentConfig()), strict=True):
        rows = ((theirs.intervals_seconds - ours.intervals_seconds)[:, 0] / MEL_ROW_SECONDS).round().int()
        assert torch.equal(ours.intervals_seconds[:, 1:], theirs.intervals_seconds[:, 1:])
        for clip, (first, last) in enumerate(rows.tolist()):
            assert first == last
            assert torch.equal(ours.mel[clip], theirs.mel[clip].roll(first, dims=0))
            shifts.add(first)
    assert len(shifts) > 5


def test_an_odd_batch_is_refused_where_pairs_are_mixed(shard_set: ShardSet) -> None:
    with pytest.raises(UserInputError, match=r"training.global_batch_size: expected an even number .* found 7"):
        batches(shard_set, global_batch_size=7)


# The backends.

AUGMENT = ImageAugment(
    (Operation("ShearX", 0.2), Operation("Rotate", -20.0), Operation("Equalize"), Operation("SharpnessIncreasing", 1.6))
)
ERASED = (ErasedBox(box=CropBox(top=3, left=4, height=9, width=12), colour=None, noise=("noise", 1)),)
LEAST_PSNR_DB = 38.0
"""DALI's whole way against the reference's: its resize may round one level otherwise, which Equalize then spreads."""


def request(seed: int, **values: Any) -> RenderRequest:
    sample = FakeSample(key="s", seed=seed, num_frames=4, height=90, width=121)
    frames, box = JpegFrames(tuple(sample.frames())), CropBox(top=2, left=5, height=80, width=100)
    return RenderRequest(frames=frames, boxes=(box,), where="shard, sample s", **({"flip": False} | values))


@pytest.fixture(scope="module", params=["dali", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[ViewBackend]:
    made: ViewBackend
    if request.param == "dali":
        made = dali_backend("mjpeg", num_frames=4, crop_size=40, views_per_clip=1, threads=2, stats=StatsRecorder())
    else:
        made = ReferenceBackend(crop_size=40, stats=StatsRecorder())
    yield made
    made.close()


def test_a_backend_applies_the_formulas_to_its_own_views_to_the_byte(backend: ViewBackend) -> None:
    plain = backend.render([request(seed, flip=bool(seed % 2)) for seed in range(3)])
    found = backend.render([request(seed, flip=bool(seed % 2), augment=AUGMENT, erased=ERASED) for seed in range(3)])
    for ours, view in zip(found, plain, strict=True):
        expected = augmented(view, AUGMENT)
        erase_in_place(expected, ERASED)
        assert torch.equal(ours, expected)


def test_only_the_clips_that_have_operations_are_changed(backend: ViewBackend) -> None:
    plain = backend.render([request(0), request(1), request(2)])
    mixed = backend.render([request(0), request(1, augment=AUGMENT), request(2, erased=ERASED)])
    assert [torch.equal(*pair) for pair in zip(mixed, plain, strict=True)] == [True, False, False]


def test_the_whole_way_through_dali_is_that_of_the_reference_within_the_stated_bound(tmp_path: Path) -> None:
    dali = dali_backend("mjpeg", num_frames=4, crop_size=40, views_per_clip=1, threads=1, stats=StatsRecorder())
    reference = ReferenceBackend(crop_size=40, stats=StatsRecorder())
    requests = [request(seed, augment=AUGMENT, erased=ERASED) for seed in range(4)]
    ours, theirs = dali.render(requests), reference.render(requests)
    dali.close()
    error = (ours.double() - theirs.double()).square().mean()
    assert 10 * torch.log10(255**2 / error) >= LEAST_PSNR_DB
