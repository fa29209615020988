"""What RandAugment does to a clip, as data: operations with their arguments, in the order they are applied.

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
    Rotate, ShearX, ...   pipelines/augment/geometry.py

gain = round(128 * (factor - 1)); results are cut to 0..255. Pillow truncates where this rounds and does not quantise
the factor: it differs by at most 2 levels. Operations of the first six kinds, Contrast and Brightness are one table of
256 entries a frame and channel, so a run of them is a single table, exactly (fused.py).

Operations of geometry that follow each other are one warp: the picture is interpolated once, and what one of them
would have pushed out and another brought back is not lost. Geometry never passes a pointwise operation: tables with
jumps (Solarize, Posterize) and statistics (Equalize) do not commute with interpolation and fill.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

from ca2st.spec import IMAGENET_MEAN

_RED, _GREEN, _BLUE = IMAGENET_MEAN
FILL = (round(255 * _RED), round(255 * _GREEN), round(255 * _BLUE))
"""The mean colour, which normalising makes zero: what comes in from outside the picture."""
Geometric = Literal["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"]
Pointwise = Literal[
    "AutoContrast",
    "Equalize",
    "Invert",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "ColorIncreasing",
    "ContrastIncreasing",
    "BrightnessIncreasing",
    "SharpnessIncreasing",
]
OperationName = Geometric | Pointwise
GEOMETRIC: frozenset[str] = frozenset(get_args(Geometric))
"""Operations that move pixels."""
ENHANCEMENTS: frozenset[str] = frozenset(
    ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing")
)
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
        """Consecutive operations of one kind: (geometric or not, operations)."""
        groups = groupby(self.operations, key=lambda operation: operation.name in GEOMETRIC)
        return [(is_geometric, tuple(run)) for is_geometric, run in groups]


def gain_of(factor: float) -> int:
    """The enhancement factor as 128ths above 1: what the formulas multiply with."""
    return round(128 * (factor - 1))
