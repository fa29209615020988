"""The formulas against timm on Pillow pictures, and the fast code against the formulas, byte for byte."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import auto_augment as timm_augment

from pipelines.augment.formulas import FILL, augmented, warp_plan
from pipelines.augment.fused import augment_in_place
from pipelines.augment.rand_augment import (
    GEOMETRIC,
    OPERATION_NAMES,
    ImageAugment,
    Operation,
    OperationName,
    argument_of,
)

SIZE, TIME = 61, 3
MOST_LEVELS = 2
"""Pointwise: how far Pillow may lie from us. It truncates where we round, and our factors are 128ths."""
LEAST_PSNR_DB = 48.0
"""Warps: the same with single pixels at the border that one of the two counts as outside."""
_WHOLE = {"PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd"}
POINTWISE = [name for name in OPERATION_NAMES if name not in GEOMETRIC]


def clip(seed: int = 0, *, size: int = SIZE, contrast: float = 1.0) -> torch.Tensor:
    """Waves, an edge, noise: [3, time, size, size]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    waves = [
        120 + 80 * np.sin(x / 9 + c + t) * np.cos(y / 7 - c) + 40 * (x > y + t) for c in range(3) for t in range(TIME)
    ]
    noisy = contrast * (np.stack(waves) + rng.normal(0, 5, (3 * TIME, size, size)) - 128) + 128
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8)).view(3, TIME, size, size)


def one(name: str, argument: float) -> ImageAugment:
    return ImageAugment((Operation(name, argument),))  # type: ignore[arg-type]


def by_timm(frame: torch.Tensor, name: str, argument: float) -> torch.Tensor:
    picture = Image.fromarray(frame.permute(1, 2, 0).numpy())
    values: Sequence[float] = () if timm_augment.LEVEL_TO_ARG[name] is None else (argument,)
    values = [int(value) for value in values] if name in _WHOLE else values
    done = timm_augment.NAME_TO_OP[name](picture, *values, resample=Image.Resampling.BILINEAR, fillcolor=FILL)
    return torch.from_numpy(np.array(done)).permute(2, 0, 1)


def levels(name: OperationName) -> list[float]:
    return [argument_of(name, level=level, negative=way) for level in (0.0, 0.31, 0.7, 0.95) for way in (False, True)]


# The formulas against timm and Pillow.


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("contrast", [1.0, 0.3])
def test_a_pointwise_operation_is_timms_within_two_levels(name: OperationName, contrast: float) -> None:
    frames = clip(1, contrast=contrast)
    for argument in levels(name):
        ours = augmented(frames, one(name, argument))
        for time in range(TIME):
            theirs = by_timm(frames[:, time], name, argument)
            assert (ours[:, time].int() - theirs.int()).abs().max() <= MOST_LEVELS, argument


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize", "Invert", *sorted(_WHOLE)])
def test_an_operation_on_whole_numbers_is_timms_exactly(name: OperationName) -> None:
    frames = clip(2)
    for argument in levels(name):
        assert torch.equal(augmented(frames, one(name, argument))[:, 0], by_timm(frames[:, 0], name, argument))


@pytest.mark.parametrize("name", sorted(GEOMETRIC))
def test_a_warp_is_timms_within_the_stated_bound(name: OperationName) -> None:
    frames = clip(3, size=224)
    for argument in levels(name):
        ours, theirs = augmented(frames, one(name, argument))[:, 0].double(), by_timm(frames[:, 0], name, argument)
        far = (ours - theirs).abs() > MOST_LEVELS
        assert far.double().mean() < 2e-4, argument
        error = (ours - theirs)[~far].square().mean().item()
        assert error == 0 or 10 * np.log10(255**2 / error) >= LEAST_PSNR_DB, argument


@pytest.mark.parametrize(
    "name", ["ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"]
)
def test_an_enhancement_by_one_changes_nothing(name: OperationName) -> None:
    assert torch.equal(augmented(clip(), one(name, 1.0)), clip())


@pytest.mark.parametrize("name", sorted(GEOMETRIC))
def test_a_warp_by_nothing_changes_nothing(name: OperationName) -> None:
    assert torch.equal(augmented(clip(), one(name, 0.0)), clip())


def test_statistics_are_those_of_each_frame_alone() -> None:
    frames = clip(4)
    frames[:, 1] //= 2
    for name in ("AutoContrast", "Equalize"):
        together = augmented(frames, one(name, 0.0))
        alone = [augmented(frames[:, time : time + 1], one(name, 0.0)) for time in range(TIME)]
        assert torch.equal(together, torch.cat(alone, dim=1))


def test_a_flat_picture_is_neither_stretched_nor_equalized() -> None:
    flat = torch.full((3, 1, 20, 20), 77, dtype=torch.uint8)
    for name in ("AutoContrast", "Equalize"):
        assert torch.equal(augmented(flat, one(name, 0.0)), flat)


def test_composed_warps_bring_back_what_was_pushed_out() -> None:
    there_and_back = ImageAugment((Operation("TranslateXRel", 0.25), Operation("TranslateXRel", -0.25)))
    assert torch.equal(augmented(clip(), there_and_back), clip())


def test_two_turns_are_one_turn_by_their_sum() -> None:
    frames = clip(5)
    twice = augmented(frames, ImageAugment((Operation("Rotate", 10.0), Operation("Rotate", 15.0))))
    assert torch.equal(twice, augmented(frames, one("Rotate", 25.0)))


def test_what_comes_in_from_outside_is_the_mean_colour() -> None:
    moved = augmented(clip(), one("TranslateYRel", 0.4))
    assert (moved[:, :, -1] == torch.tensor(FILL, dtype=torch.uint8).view(3, 1, 1)).all()
    assert warp_plan((Operation("TranslateYRel", 0.4),), size=10).outside.sum() == 40


# The fast code against the formulas.


@pytest.mark.parametrize("name", OPERATION_NAMES)
def test_the_fast_code_equals_the_formula(name: OperationName) -> None:
    for argument in levels(name):
        assert_equal(clip(6), one(name, argument))
    assert_equal(clip(6, size=2), one(name, argument))


operations = st.builds(
    lambda name, level, negative: Operation(name, argument_of(name, level=level, negative=negative)),
    st.sampled_from(OPERATION_NAMES),
    st.floats(0, 1),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(run=st.lists(operations, min_size=1, max_size=6), seed=st.integers(0, 5), contrast=st.sampled_from([1.0, 0.1]))
def test_any_chain_in_fast_code_equals_its_operations_one_by_one(
    run: list[Operation], seed: int, contrast: float
) -> None:
    assert_equal(clip(seed, size=24, contrast=contrast), ImageAugment(tuple(run)))


def assert_equal(frames: torch.Tensor, augment: ImageAugment) -> None:
    fast = frames.numpy().copy()
    augment_in_place(fast, augment)
    assert np.array_equal(fast, augmented(frames, augment).numpy()), augment
