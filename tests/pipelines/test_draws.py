"""Draws and crops: keyed by the sample alone, inside the picture, with the asked distribution."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ca2st.errors import UserInputError
from ca2st.spec import ClipSpec
from pipelines.augment.boxes import CropBox, ErasingConfig, RandomCrop, SquareCrop
from pipelines.augment.config import AugmentConfig
from pipelines.augment.spectrogram import UNCHANGED, SpectrogramConfig
from pipelines.keyed_random import permutation, raw_words, uniforms
from pipelines.views import (
    ClipFacts,
    EvaluationDraws,
    EvaluationViews,
    Protocol,
    SamplingConfig,
    Scheme,
    TrainDraws,
    ViewDraw,
    rate_varies,
)
from support.refusals import forced

SPEC = ClipSpec(num_frames=16, crop_size=224, mel_rows=400)
sides = st.integers(1, 400)


def facts(key: str = "clip-1", *, frames: int = 300, rows: int = 1000) -> ClipFacts:
    return ClipFacts(key=key, frame_ticks=np.arange(frames, dtype=np.int32) * 3000, mel_rows=rows)


def train_view(key: str = "clip-1", *, seed: int = 0, epoch: int = 0, augment: AugmentConfig | None = None) -> ViewDraw:
    draws = TrainDraws(clip=SPEC, sampling=SamplingConfig(), augment=augment or AugmentConfig(), seed=seed, epoch=epoch)
    (view,) = draws.views(facts(key))
    return view


def test_random_words_of_a_key_never_change() -> None:
    assert raw_words(("x", 1), 2).tolist() == PINNED_WORDS
    assert permutation(("shards", 0, 0), 8).tolist() == PINNED_PERMUTATION


PINNED_WORDS = [8623517796109943755, 13145527796314271958]
PINNED_PERMUTATION = [3, 1, 0, 7, 4, 5, 6, 2]
"""Written down once: if they change, `selection.ORDER_VERSION` must rise."""


def test_uniform_numbers_are_even_over_the_unit_interval() -> None:
    numbers = uniforms(("test",), 20_000)
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(counts - 1000).max() < 150


def test_a_view_depends_on_seed_epoch_and_key_and_on_nothing_else() -> None:
    view = train_view()
    assert train_view() == view
    assert all(other != view for other in (train_view("clip-2"), train_view(seed=1), train_view(epoch=1)))


def test_the_draws_of_a_sample_are_pinned() -> None:
    """If they change, `selection.ORDER_VERSION` must rise, or resumed runs see other views."""
    view = train_view()
    assert view.frame_indices[:3] == (162, 166, 170)
    assert view.crop.box(height=256, width=340) == CropBox(top=42, left=36, height=194, width=203)
    assert (view.flip, view.mel_start_row) == (True, 258)


def test_the_draws_of_the_augmentation_are_pinned() -> None:
    """If they change, `selection.ORDER_VERSION` must rise."""
    view = train_view("clip-2", augment=EVERYTHING)
    assert view.augment is not None
    assert [(one.name, round(one.argument, 6)) for one in view.augment.operations] == PINNED_OPERATIONS
    assert [(one.box, one.colour) for one in view.erased] == PINNED_ERASED
    assert (view.spectrogram.roll, view.spectrogram.masked_rows, view.spectrogram.masked_bins) == PINNED_SPECTROGRAM


EVERYTHING = AugmentConfig(
    rand_augment="rand-m7-n4-mstd0.5-inc1",
    erasing=ErasingConfig(probability=1.0),
    spectrogram=SpectrogramConfig(time_masks=2, frequency_masks=2, roll_rows=10, noise_std=0.1),
)
PINNED_OPERATIONS = [("SolarizeIncreasing", 93.0), ("SolarizeAdd", 80.0)]
PINNED_ERASED = [(CropBox(top=21, left=49, height=98, width=153), (124, 116, 104))]
PINNED_SPECTROGRAM = (2, ((143, 147), (260, 283)), ((38, 46), (109, 123)))


@given(key=st.text("abcdefghij-", min_size=1, max_size=9), epoch=st.integers(0, 99), repeat=st.integers(0, 3))
def test_a_view_with_everything_on_is_pure_in_seed_epoch_key_and_reading(key: str, epoch: int, repeat: int) -> None:
    draws = TrainDraws(clip=SPEC, sampling=SamplingConfig(), augment=EVERYTHING, seed=1, epoch=epoch)
    again = TrainDraws(clip=SPEC, sampling=SamplingConfig(), augment=EVERYTHING, seed=1, epoch=epoch)
    (view,) = draws.views(facts(key), repeat=repeat)
    assert again.views(facts(key), repeat=repeat) == (view,)
    for (other,) in (draws.views(facts(key), repeat=repeat + 1), draws.views(facts(key + "x"), repeat=repeat)):
        assert other.crop != view.crop
        assert other.spectrogram.noise != view.spectrogram.noise


def test_the_first_reading_draws_what_a_sample_that_is_read_once_does() -> None:
    draws = TrainDraws(clip=SPEC, sampling=SamplingConfig(), augment=EVERYTHING, seed=0, epoch=0)
    assert draws.views(facts(), repeat=0) == (train_view(augment=EVERYTHING),)


def test_augmentation_leaves_frames_crop_and_flip_as_they_are() -> None:
    plain, view = train_view(), train_view(augment=EVERYTHING)
    assert (view.frame_indices, view.crop, view.flip, view.mel_start_row) == (
        plain.frame_indices,
        plain.crop,
        plain.flip,
        plain.mel_start_row,
    )
    assert (plain.augment, plain.erased, plain.spectrogram) == (None, (), UNCHANGED)


def test_evaluation_neither_augments_nor_mixes() -> None:
    draws = EvaluationDraws(clip=SPEC, sampling=SamplingConfig(), view_plan=EvaluationViews())
    (view,) = draws.views(facts(), repeat=2)
    assert (view.augment, view.erased, view.spectrogram) == (None, (), UNCHANGED)
    assert draws.mixing(0, [True, True]) is None


def test_frames_crop_and_flip_are_drawn_apart() -> None:
    mirrored = train_view(augment=AugmentConfig(flip_probability=1.0))
    straight = train_view(augment=AugmentConfig(flip_probability=0.0))
    assert mirrored.flip
    assert not straight.flip
    assert mirrored.crop == straight.crop
    assert mirrored.frame_indices == straight.frame_indices


def test_the_flip_says_nothing_of_the_spectrogram_crop() -> None:
    views = [train_view(f"clip-{i}") for i in range(2000)]
    middle = sorted(view.mel_start_row for view in views)[1000]
    early = [view.flip for view in views if view.mel_start_row < middle]
    assert 0.45 < sum(early) / len(early) < 0.55


def test_half_of_the_samples_are_flipped() -> None:
    flips = sum(train_view(f"clip-{i}").flip for i in range(400))
    assert 160 < flips < 240


def test_random_crops_cover_the_asked_areas_and_ratios() -> None:
    boxes = [train_view(f"clip-{i}").crop.box(height=256, width=340) for i in range(400)]
    areas = np.array([box.height * box.width / (256 * 340) for box in boxes])
    ratios = np.array([box.width / box.height for box in boxes])
    assert areas.min() > 0.075
    assert areas.max() <= 1
    assert 0.4 < areas.mean() < 0.56
    assert ratios.min() > 0.73
    assert ratios.max() < 1.36
    assert len({box.top for box in boxes}) > 50


@given(height=sides, width=sides, numbers=st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4))
def test_a_random_crop_lies_inside_any_picture(height: int, width: int, numbers: list[float]) -> None:
    crop = RandomCrop(
        area_fractions=(0.08 + 0.92 * numbers[0],),
        aspect_ratios=(0.75 + numbers[1] * (4 / 3 - 0.75),),
        vertical=numbers[2],
        horizontal=numbers[3],
    )
    assert_inside(crop.box(height=height, width=width), height, width)


def test_a_picture_too_flat_for_every_candidate_gives_its_centred_largest_crop() -> None:
    crop = RandomCrop(area_fractions=(1.0,), aspect_ratios=(4 / 3,), vertical=0.9, horizontal=0.9)
    assert crop.box(height=30, width=300) == CropBox(top=0, left=130, height=30, width=40)


@given(height=sides, width=sides, fraction=st.sampled_from([0.0, 0.5, 1.0]))
def test_a_square_crop_has_the_short_side_and_lies_inside(height: int, width: int, fraction: float) -> None:
    box = SquareCrop(fraction=fraction).box(height=height, width=width)
    assert box.height == box.width == min(height, width)
    assert_inside(box, height, width)


def assert_inside(box: CropBox, height: int, width: int) -> None:
    assert box.top >= 0
    assert box.left >= 0
    assert 0 < box.height <= height - box.top
    assert 0 < box.width <= width - box.left


def test_three_crops_sit_at_both_ends_and_the_middle_of_the_long_side() -> None:
    draws = EvaluationDraws(
        clip=SPEC, sampling=SamplingConfig(), view_plan=EvaluationViews(protocol="test", clips=1, crops=3)
    )
    boxes = [view.crop.box(height=240, width=320) for view in draws.views(facts())]
    assert [box.left for box in boxes] == [0, 40, 80]
    upright = [view.crop.box(height=320, width=240) for view in draws.views(facts())]
    assert [box.top for box in upright] == [0, 40, 80]


@pytest.mark.parametrize("scheme", ["dense", "uniform"])
def test_test_views_come_clip_by_clip_with_their_spectrogram_crops(scheme: str) -> None:
    draws = EvaluationDraws(
        clip=SPEC,
        sampling=SamplingConfig(scheme=scheme),  # type: ignore[arg-type]
        view_plan=EvaluationViews(protocol="test", clips=2, crops=3),
    )
    views = draws.views(facts())
    assert len(views) == 6
    assert len({view.frame_indices for view in views[:3]}) == len({view.frame_indices for view in views[3:]}) == 1
    assert views[0].frame_indices != views[3].frame_indices
    assert [view.mel_start_row for view in views] == [150, 200, 250, 300, 350, 400]
    assert not any(view.flip for view in views)


@pytest.mark.parametrize("scheme", ["dense", "uniform"])
def test_validation_is_one_centred_view(scheme: str) -> None:
    sampling = SamplingConfig(scheme=scheme)  # type: ignore[arg-type]
    (view,) = EvaluationDraws(clip=SPEC, sampling=sampling, view_plan=EvaluationViews()).views(facts())
    assert view.mel_start_row == 300
    assert view.crop == SquareCrop(fraction=0.5)
    assert abs((view.frame_indices[0] + view.frame_indices[-1]) / 2 - 149.5) <= 1


VARYING = np.array([*range(0, 90_000, 9000), *range(90_000, 900_000, 90_000)], np.int32)
"""Ten frames in the first second, then one per second up to 9 s: 19 frames; with a last one of 0.1 s that is 9.1 s."""


def varying_facts(ticks: np.ndarray = VARYING) -> ClipFacts:
    return ClipFacts(key="clip-1", frame_ticks=ticks, mel_rows=0)


def evaluated(scheme: Scheme, *, clips: int = 1, num_frames: int = 16) -> list[list[int]]:
    protocol: Protocol = "test" if clips > 1 else "validation"
    draws = EvaluationDraws(
        clip=replace(SPEC, num_frames=num_frames),
        sampling=SamplingConfig(scheme=scheme),
        view_plan=EvaluationViews(protocol=protocol, clips=clips),
    )
    return [list(view.frame_indices) for view in draws.views(varying_facts())]


def test_uniform_frames_of_a_varying_rate_are_those_on_display_at_the_centres_in_time() -> None:
    """Four parts of 2.275 s have their centres at 1.1375, 3.4125, 5.6875 and 7.9625 s."""
    assert evaluated("uniform", num_frames=4) == [[10, 12, 14, 16]]


def test_two_uniform_test_clips_of_a_varying_rate_are_starts_and_middles_in_time() -> None:
    """Four parts of 2.275 s start at 0, 2.275, 4.55 and 6.825 s."""
    assert evaluated("uniform", clips=2, num_frames=4) == [[0, 11, 13, 15], [10, 12, 14, 16]]


def test_a_dense_window_of_a_varying_rate_spans_the_time_of_64_frames_at_30_a_second() -> None:
    """2.1333 s in the centre of 9.1 s: from 3.4833 s on, a frame every 0.1422 s; the 5th is at 4 s, the 12th at 5 s."""
    assert evaluated("dense") == [[12] * 4 + [13] * 7 + [14] * 5]


def test_dense_test_clips_of_a_varying_rate_begin_equally_far_apart_in_time() -> None:
    """A frame every 4 / 30 s makes 69 moments; runs of 16 begin at the first and at the 54th, 7.0667 s."""
    first, last = evaluated("dense", clips=2)
    assert first == [0, 1, 2, 4, 5, 6, 8, 9] + [10] * 7 + [11]
    assert last == [16] * 7 + [17] * 8 + [18]


@pytest.mark.parametrize("scheme", ["uniform", "dense"])
def test_training_on_a_varying_rate_draws_by_time(scheme: Scheme) -> None:
    ends = [*VARYING[1:].tolist(), 819_000]
    for seed in range(20):
        draws = TrainDraws(
            clip=SPEC, sampling=SamplingConfig(scheme=scheme), augment=AugmentConfig(), seed=seed, epoch=0
        )
        (view,) = draws.views(varying_facts())
        found = view.frame_indices
        if scheme == "uniform":
            parts = [(819_000 // 16 * part, 819_000 // 16 * (part + 1)) for part in range(16)]
            assert all(VARYING[i] < end and ends[i] > start for i, (start, end) in zip(found, parts, strict=True))
        else:
            assert ends[found[-1]] - int(VARYING[found[0]]) >= 12_800 * 14
            assert int(VARYING[found[-1]]) - ends[found[0]] <= 192_000


def test_short_clips_of_a_varying_rate_repeat_the_first_frame_only_where_that_is_asked_for() -> None:
    few = varying_facts(np.array([0, 9000, 90_000, 99_000], np.int32))
    for short_clip, expected in (("reference", (0,) * 16), ("spread", None)):
        config = SamplingConfig(scheme="uniform", short_clip=short_clip)
        draws = TrainDraws(clip=SPEC, sampling=config, augment=AugmentConfig(), seed=0, epoch=0)
        (view,) = draws.views(few)
        assert view.frame_indices == expected if expected else set(view.frame_indices) >= {1, 2}


@pytest.mark.parametrize(
    ("seconds", "varies"),
    [
        (np.arange(300) / 30, False),
        (np.arange(300) * 1001 / 30_000 + 0.5, False),
        (np.round(np.arange(300) / 30, 3), False),
        (np.arange(300) / 30 + np.resize([0, 0.007, -0.007], 300), False),
        (np.concatenate([np.arange(150) / 30, 5 + np.arange(150) / 15]), True),
        (np.concatenate([np.arange(150) / 30, 6 + np.arange(150) / 30]), True),
        (np.array([0.0, 1.0, 1.1]), True),
        (np.array([0.0, 1.0]), False),
        (np.array([0.0]), False),
    ],
    ids=["even", "ntsc_late", "milliseconds", "jitter", "two_rates", "a_freeze", "three", "two", "one"],
)
def test_a_rate_varies_where_a_frame_is_over_half_an_interval_off_an_even_grid(
    seconds: np.ndarray, varies: bool
) -> None:
    ticks = np.round((seconds - seconds.min()) * 90_000).astype(np.int32)
    assert rate_varies(ticks) == varies


def test_uniform_training_draws_a_frame_of_each_segment() -> None:
    draws = TrainDraws(clip=SPEC, sampling=SamplingConfig(scheme="uniform"), augment=AugmentConfig(), seed=0, epoch=0)
    (view,) = draws.views(facts(frames=160))
    assert [index // 10 for index in view.frame_indices] == list(range(16))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_area": (0.0, 1.0)}, "augment.crop_area: expected 0 < low <= high"),
        ({"crop_area": (0.5, 1.5)}, "augment.crop_area: expected at most 1"),
        ({"crop_aspect_ratio": (2.0, 1.0)}, "augment.crop_aspect_ratio: expected 0 < low <= high"),
        ({"crop_aspect_ratio": (1.0, math.inf)}, "augment.crop_aspect_ratio: expected 0 < low <= high, both finite"),
        ({"flip_probability": 1.5}, "augment.flip_probability: expected 0..1, found 1.5"),
        ({"rand_augment": "randaug"}, "augment.rand_augment: expected timm's notation"),
    ],
)
def test_a_wrong_augmentation_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        forced(AugmentConfig(), **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clips": 2}, "validation reads one centred view, found 2 x 1"),
        ({"protocol": "test", "crops": 0}, "at least 1 clip and 1 crop, found 1 x 0"),
        ({"protocol": "tset"}, "views.protocol: expected one of validation, test, found 'tset'"),
    ],
)
def test_wrong_evaluation_views_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        forced(EvaluationViews(), **values)
