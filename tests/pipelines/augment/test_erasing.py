"""Random erasing: boxes of the asked areas, the same in every frame, painted as asked."""

import math

import numpy as np
import pytest
import torch

from ca2st.errors import UserInputError
from ca2st.spec import IMAGENET_MEAN, IMAGENET_STD
from pipelines.augment.boxes import CropBox, ErasedBox, ErasingConfig
from pipelines.augment.formulas import FILL, erase_in_place
from support.refusals import forced

SIZE = 100


def drawn(config: ErasingConfig, seed: int) -> tuple[ErasedBox, ...]:
    numbers = np.random.default_rng(seed).random(config.num_numbers).tolist()
    return config.drawn(numbers, size=SIZE, key=("noise", seed))


def test_boxes_are_drawn_as_often_and_as_large_as_asked() -> None:
    config = ErasingConfig(probability=0.25)
    boxes = [box.box for seed in range(1600) for box in drawn(config, seed)]
    areas = np.array([box.height * box.width / SIZE**2 for box in boxes])
    ratios = np.array([box.height / box.width for box in boxes])
    assert len(boxes) / 1600 == pytest.approx(0.25, abs=0.04)
    assert areas.min() > 0.018
    assert areas.max() < 0.35
    assert ratios.min() > 0.27
    assert ratios.max() < 3.7
    assert all(0 <= box.top <= SIZE - box.height and 0 <= box.left <= SIZE - box.width for box in boxes)


def test_several_boxes_share_the_area() -> None:
    config = ErasingConfig(probability=1.0, area=(0.2, 0.2), most_boxes=4)
    clips = [drawn(config, seed) for seed in range(200)]
    assert {len(boxes) for boxes in clips} == {1, 2, 3, 4}
    for boxes in clips:
        assert sum(one.box.height * one.box.width for one in boxes) / SIZE**2 == pytest.approx(0.2, abs=0.04)


def test_nothing_is_erased_by_default() -> None:
    assert not any(drawn(ErasingConfig(), seed) for seed in range(50))


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_a_box_is_painted_in_every_frame_and_nothing_else_changes(mode: str) -> None:
    (erased,) = drawn(ErasingConfig(probability=1.0, mode=mode), 3)  # type: ignore[arg-type]
    frames = torch.full((3, 4, SIZE, SIZE), 7, dtype=torch.uint8)
    erase_in_place(frames, (erased,))
    box = erased.box
    inside = frames[..., box.top : box.top + box.height, box.left : box.left + box.width]
    if mode == "pixel":
        assert (inside != 7).double().mean() > 0.9
        assert not torch.equal(inside[:, 0], inside[:, 1])
    else:
        assert (inside == inside[:, :1, :1, :1]).all()
    assert (frames != 7).sum() == (inside != 7).sum()


def test_const_is_the_mean_colour() -> None:
    assert drawn(ErasingConfig(probability=1.0), 0)[0].colour == FILL


def test_noise_is_normal_after_normalising() -> None:
    frames = torch.zeros(3, 2, SIZE, SIZE, dtype=torch.uint8)
    whole = CropBox(top=0, left=0, height=SIZE, width=SIZE)
    erase_in_place(frames, (ErasedBox(box=whole, colour=None, noise=("n",)),))
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    normalised = (frames.float() / 255 - mean) / std
    assert normalised.mean(dim=(1, 2, 3)).abs().max() < 0.06
    assert (normalised.std(dim=(1, 2, 3)) - 1).abs().max() < 0.1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"probability": 1.5}, "augment.erasing.probability: expected 0..1, found 1.5"),
        ({"area": (0.5, 0.1)}, "augment.erasing.area: expected 0 < low <= high"),
        ({"aspect_ratio": (0.0, 1.0)}, "augment.erasing.aspect_ratio: expected 0 < low <= high"),
        ({"aspect_ratio": (0.3, math.inf)}, "augment.erasing.aspect_ratio: expected 0 < low <= high, both finite"),
        ({"area": (0.5, 1.1)}, "an area of at most 1"),
        ({"most_boxes": 0}, "at least one box"),
        ({"mode": "pixels"}, "augment.erasing.mode: expected one of const, rand, pixel, found 'pixels'"),
    ],
)
def test_a_wrong_setting_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        forced(ErasingConfig(), **values)
