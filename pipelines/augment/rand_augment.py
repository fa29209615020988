"""RandAugment: which operations a clip gets, in timm's notation, and the formulas they stand for.

Names and meaning are timm's (`timm.data.auto_augment`, the increasing set). An argument is what timm's level function
gives to the operation: degrees, a factor, bits, a threshold, a part of the side.

The formulas, once for all backends, on whole numbers so that every implementation gives the same bytes. x is a
value of 0..255, all statistics are those of one frame::

    AutoContrast          (x - low) * 255 // (high - low)     low, high: the channel's extremes; flat: unchanged
    Equalize              (step // 2 + number of darker pixels) // step, at most 255, with
                          step = (pixels - those of the brightest level present) // 255; step 0: unchanged
    Invert                255 - x
    PosterizeIncreasing   the upper `bits` bits of x
    SolarizeIncreasing    x below the threshold, else 255 - x
    SolarizeAdd           min(255, x + amount) below 128, else x
    ColorIncreasing       x + (gain * (x - grey) + 64) // 128     grey = (77 R + 150 G + 29 B + 128) // 256 of the pixel
    ContrastIncreasing    the same with the frame's mean grey, (299 R + 587 G + 114 B) / 1000 of the means, rounded
    BrightnessIncreasing  the same with grey = 0
    SharpnessIncreasing   the same with the smoothed pixel: (8 neighbours + 5 * x + 6) // 13; the outermost pixels stay
    Rotate, ShearX, ...   pipelines/augment/formulas.py

gain = round(128 * (factor - 1)); results are cut to 0..255. Pillow truncates where this rounds and does not quantise
the factor: it differs by at most 2 levels. Operations of the first six kinds, Contrast and Brightness are one table of
256 entries per frame and channel, so a run of them is a single table, exactly (fused.py).

Operations of geometry that follow each other are one warp: the picture is interpolated once, and what one of them
would have pushed out and another brought back is not lost. Geometry never passes a pointwise operation: tables with
jumps (Solarize, Posterize) and statistics (Equalize) do not commute with interpolation and fill.

The notation is read as timm reads it, and drawn from uniform numbers alone:
``rand-m7-n4-mstd0.5-inc1``: n = 4 operations drawn with replacement, each applied with p = 0.5, at a magnitude drawn
from a normal distribution around m = 7 with standard deviation 0.5, cut to 0..10; inc1 is the set whose effect grows
with the magnitude.

Source: Cubuk et al., "RandAugment" (2020), as in timm's ``rand_augment_transform``.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import NormalDist
from typing import Literal, get_args

from ca2st.errors import UserInputError
from ca2st.spec import IMAGENET_MEAN

_RED, _GREEN, _BLUE = IMAGENET_MEAN
FILL = (round(255 * _RED), round(255 * _GREEN), round(255 * _BLUE))
"""The mean colour, which normalising makes zero: what comes in from outside the picture."""
OperationName = Literal[
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "ColorIncreasing",
    "ContrastIncreasing",
    "BrightnessIncreasing",
    "SharpnessIncreasing",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
]
OPERATION_NAMES: tuple[OperationName, ...] = get_args(OperationName)
"""The increasing set, in timm's order."""
GEOMETRIC: dict[str, float] = {
    "Rotate": 30.0,
    "ShearX": 0.3,
    "ShearY": 0.3,
    "TranslateXRel": 0.45,
    "TranslateYRel": 0.45,
}
"""Operations that move pixels, and what level 1 is to either side: degrees and parts."""
_ONE_WAY: dict[str, Callable[[float], int]] = {
    "PosterizeIncreasing": lambda level: 4 - math.floor(4 * level),
    "SolarizeIncreasing": lambda level: 256 - math.floor(256 * level),
    "SolarizeAdd": lambda level: math.floor(110 * level),
}
ENHANCEMENTS = ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing")
"""Operations whose argument is a factor: 1 changes nothing."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation, the same on every frame of a clip."""

    name: OperationName
    argument: float = 0.0
    """Degrees, factor, bits, threshold, amount or part of the side; 0 for operations without one."""


@dataclass(frozen=True, slots=True)
class ImageAugment:
    """The operations of a clip in order; those that were drawn and not applied are left out."""

    operations: tuple[Operation, ...]

    def runs(self) -> list[tuple[bool, tuple[Operation, ...]]]:
        """Return the consecutive operations of one kind: (geometric or not, operations)."""
        groups = groupby(self.operations, key=lambda operation: operation.name in GEOMETRIC)
        return [(is_geometric, tuple(run)) for is_geometric, run in groups]


def gain_of(factor: float) -> int:
    """Return the enhancement factor as 128ths above 1: what the formulas multiply with."""
    return round(128 * (factor - 1))


NUMBERS_PER_OPERATION = 4
"""Uniform numbers that one drawn operation uses: which, whether, how strong, which way."""
_HIGHEST_LEVEL = 10
_UNIFORM_ABOVE = 100.0
"""A standard deviation above this: magnitudes spread evenly, as in timm."""
_SECTION = re.compile(r"(mstd|inc|m|n|p)(\d+(?:\.\d*)?|\.\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class RandAugment:
    """A parsed notation."""

    magnitude: int
    """Mean magnitude, 0..10."""
    num_operations: int
    probability: float
    """That a drawn operation is applied."""
    magnitude_std: float
    """Standard deviation of the magnitude; 0: always the mean; above 100: evenly spread over 0..mean, as in timm."""

    def drawn(self, numbers: Sequence[float]) -> ImageAugment | None:
        """Return the operations of `numbers` in [0, 1), `NUMBERS_PER_OPERATION` for each; None: none is applied."""
        applied = []
        for start in range(0, len(numbers), NUMBERS_PER_OPERATION):
            which, whether, strength, direction = numbers[start : start + NUMBERS_PER_OPERATION]
            if whether < self.probability:
                name = OPERATION_NAMES[int(which * len(OPERATION_NAMES))]
                level = self._magnitude(strength) / _HIGHEST_LEVEL
                applied.append(Operation(name, argument_of(name, level=level, negative=direction >= 0.5)))
        return ImageAugment(tuple(applied)) if applied else None

    def _magnitude(self, u: float) -> float:
        if self.magnitude_std > _UNIFORM_ABOVE:
            return self.magnitude * u
        if self.magnitude_std == 0:
            return float(self.magnitude)
        drawn = NormalDist(self.magnitude, self.magnitude_std).inv_cdf(max(u, 2.0**-53))
        return min(max(drawn, 0.0), float(_HIGHEST_LEVEL))


def parse_rand_augment(text: str) -> RandAugment:
    """Read timm's notation; what it leaves out is as in timm: m10, n2, p0.5, mstd0.

    Raises:
        UserInputError: no such notation, or one of operations that are not built (inc0, sets by name).
    """
    first, *sections = text.split("-")
    found: dict[str, str] = {}
    for section in sections:
        match = _SECTION.fullmatch(section)
        if match is None or match[1] in found:
            raise _refused(text, f"found section {section!r}")
        found[match[1]] = match[2]
    if first != "rand":
        raise _refused(text, f"found {first!r} at its beginning")
    if found.get("inc") != "1":
        raise _refused(text, f"found {'inc' + found['inc'] if 'inc' in found else 'no inc1'}")
    for name in ("m", "n"):
        if not found.get(name, "0").isdigit():
            raise _refused(text, f"found {name} = {found[name]}, expected a whole number")
    parsed = RandAugment(
        magnitude=int(found.get("m", "10")),
        num_operations=int(found.get("n", "2")),
        probability=float(found.get("p", "0.5")),
        magnitude_std=float(found.get("mstd", "0")),
    )
    if parsed.magnitude > _HIGHEST_LEVEL or not 1 <= parsed.num_operations <= 16 or parsed.probability > 1:
        raise _refused(text, "expected m in 0..10, n in 1..16 and p in 0..1")
    return parsed


def _refused(text: str, why: str) -> UserInputError:
    return UserInputError(
        f"augment.rand_augment: expected timm's notation rand-mM-nN-mstdS-inc1 (p optional), each section once, "
        f"{why} in {text!r}; the published runs use rand-m7-n4-mstd0.5-inc1"
    )


def argument_of(name: OperationName, *, level: float, negative: bool) -> float:
    """Return the argument at `level` (magnitude / 10) in 0..1; `negative` turns operations that have two ways."""
    sign = -1 if negative else 1
    if name in GEOMETRIC:
        return sign * GEOMETRIC[name] * level
    if name in _ONE_WAY:
        return float(_ONE_WAY[name](level))
    return max(0.1, 1.0 + sign * 0.9 * level) if name in ENHANCEMENTS else 0.0
