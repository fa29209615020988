"""Boxes: where a view is cut out of the picture; random erasing, which paints boxes of every frame of a view over.

Source of the erasing: Zhong et al., "Random Erasing Data Augmentation" (2017), as in timm's ``RandomErasing``. The
published runs of CAST, CAVA and CA2ST do not erase.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ca2st.errors import UserInputError, check_choice
from ca2st.spec import IMAGENET_MEAN, IMAGENET_STD
from pipelines.augment.rand_augment import FILL
from pipelines.errors import check_intervals, check_range
from pipelines.keyed_random import Key


@dataclass(frozen=True, kw_only=True, slots=True)
class CropBox:
    """A rectangle of source pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SquareCrop:
    """The square of the short side, at `fraction` of the room along the long side (0.5: the centre).

    Cropping this square and resizing it equals resizing the short side first and cropping then, up to the parts of
    a pixel by which the resized long side would be off.
    """

    fraction: float = 0.5

    def box(self, *, height: int, width: int) -> CropBox:
        """Return the square in a picture of that size."""
        side = min(height, width)
        top, left = (int(self.fraction * (size - side)) for size in (height, width))
        return CropBox(top=top, left=left, height=side, width=side)


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomCrop:
    """Random resized crop: the first of some candidate shapes that fits, at a random place."""

    area_fractions: tuple[float, ...]
    """Candidate areas as parts of the picture's."""
    aspect_ratios: tuple[float, ...]
    """Candidate width / height, one per area."""
    vertical: float
    """Place along the vertical room, in [0, 1)."""
    horizontal: float
    """Place along the horizontal room, in [0, 1)."""

    def box(self, *, height: int, width: int) -> CropBox:
        """Return the box in a picture of that size; where no candidate fits, the largest centred one of near ratio."""
        for fraction, ratio in zip(self.area_fractions, self.aspect_ratios, strict=True):
            area = height * width * fraction
            crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < crop_height <= height and 0 < crop_width <= width:
                top = int(self.vertical * (height - crop_height + 1))
                left = int(self.horizontal * (width - crop_width + 1))
                return CropBox(top=top, left=left, height=crop_height, width=crop_width)
        ratio = min(max(width / height, min(self.aspect_ratios)), max(self.aspect_ratios))
        crop_height = min(height, max(1, round(width / ratio)))
        crop_width = min(width, max(1, round(height * ratio)))
        return CropBox(
            top=(height - crop_height) // 2, left=(width - crop_width) // 2, height=crop_height, width=crop_width
        )


Crop = RandomCrop | SquareCrop
"""A choice of place that becomes a box once the size of the picture is known."""


ErasingMode = Literal["const", "rand", "pixel"]
_ATTEMPTS = 10
_NUMBERS_PER_BOX = 2 * _ATTEMPTS + 5
_HEAD = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ErasingConfig:
    """Random erasing with timm's rules. VideoMAE's recipe, for comparison: probability 0.25, mode ``pixel``."""

    probability: float = 0.0
    """Chance that a clip is erased at all; 0, as published: never."""
    area: tuple[float, float] = (0.02, 1 / 3)
    """Smallest and largest part of the picture, for all boxes together."""
    aspect_ratio: tuple[float, float] = (0.3, 10 / 3)
    """Smallest and largest height / width, drawn evenly on a logarithmic scale."""
    most_boxes: int = 1
    """Boxes per clip: evenly drawn from 1 to this many."""
    mode: ErasingMode = "const"
    """What the box becomes: ``const`` the mean colour, which normalising makes zero; ``rand`` one colour drawn from the
    normal distribution of normalised pixels; ``pixel`` one such colour per pixel and frame."""

    def __post_init__(self) -> None:
        check_choice("augment.erasing.mode", self.mode, get_args(ErasingMode))
        check_range(self, "augment.erasing.", "probability", low=0, high=1)
        check_intervals(self, "augment.erasing.", "area", "aspect_ratio")
        if self.area[1] > 1 or self.most_boxes < 1:
            raise UserInputError(
                f"augment.erasing: expected an area of at most 1 and at least one box, found {self.area[1]} and "
                f"{self.most_boxes}"
            )

    @property
    def num_numbers(self) -> int:
        """Uniform numbers that `drawn` reads."""
        return _HEAD + self.most_boxes * _NUMBERS_PER_BOX

    def drawn(self, numbers: Sequence[float], *, size: int, key: Key) -> "tuple[ErasedBox, ...]":
        """Return the boxes that `numbers` stand for in a `size` x `size` picture; `key` names the noise inside them."""
        whether, how_many, *rest = numbers
        if whether >= self.probability:
            return ()
        erased: list[ErasedBox] = []
        count = 1 + int(how_many * self.most_boxes)
        for index in range(count):
            own = rest[index * _NUMBERS_PER_BOX : (index + 1) * _NUMBERS_PER_BOX]
            if (box := self._box(own, size, part=1 / count)) is not None:
                erased.append(ErasedBox(box=box, colour=self._colour(own[-3:]), noise=(*key, index)))
        return tuple(erased)

    def _box(self, numbers: Sequence[float], size: int, *, part: float) -> CropBox | None:
        """Return the first of some candidates that is smaller than the picture, as timm has it; None: none is."""
        (low, high), (flat, tall) = self.area, map(math.log, self.aspect_ratio)
        for u, v in zip(numbers[:_ATTEMPTS], numbers[_ATTEMPTS : 2 * _ATTEMPTS], strict=True):
            area, ratio = (low + u * (high - low)) * part * size * size, math.exp(flat + v * (tall - flat))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < height < size and 0 < width < size:
                top = int(numbers[2 * _ATTEMPTS] * (size - height + 1))
                left = int(numbers[2 * _ATTEMPTS + 1] * (size - width + 1))
                return CropBox(top=top, left=left, height=height, width=width)
        return None

    def _colour(self, numbers: Sequence[float]) -> tuple[int, int, int] | None:
        if self.mode == "const":
            return FILL
        if self.mode == "pixel":
            return None
        red, green, blue = (row[int(256 * u)] for row, u in zip(NOISE_LEVELS, numbers, strict=True))
        return int(red), int(green), int(blue)


@dataclass(frozen=True, slots=True, kw_only=True)
class ErasedBox:
    """A box that is painted over in every frame of a view."""

    box: CropBox
    colour: tuple[int, int, int] | None
    """RGB; None: every pixel of every frame its own, from `noise`."""
    noise: Key
    """Names the random bytes of the pixels."""


def _noise_levels() -> NDArray[np.uint8]:
    """Return [3, 256]: normalised pixels that are normally distributed, as bytes of each channel, for an even byte."""
    quantiles = np.array([NormalDist().inv_cdf((byte + 0.5) / 256) for byte in range(256)])
    mean, std = np.array(IMAGENET_MEAN)[:, None], np.array(IMAGENET_STD)[:, None]
    levels: NDArray[np.uint8] = np.floor(255 * (mean + std * quantiles) + 0.5).clip(0, 255).astype(np.uint8)
    return levels


NOISE_LEVELS = _noise_levels()
"""[3, 256]: a channel's normally distributed level for an evenly distributed byte."""
