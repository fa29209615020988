"""The formulas of every operation on pixels, in torch, written for reading: the oracle of `fused.py`.

Whole numbers throughout, so that any device gives the same bytes. A run of geometric operations is one warp. Matrices
map a place in the result to a place in the source, in pixels, with pixel (i, j) covering [i, i + 1) x [j, j + 1), as
Pillow's: Rotate turns counter-clockwise about the middle of the picture, ShearX adds `argument` * y to x, TranslateXRel
adds `argument` * width. The operation that comes later is applied to the result's places first.

A result pixel's centre is carried over; where it falls outside the source the pixel is the fill colour, else it is
interpolated between the four pixels around it, the picture's last row and column going on beyond its border. Places
are rounded to 1/128 pixel and the interpolation is in whole numbers, so that every implementation gives the same
bytes: with weights v, w of 0..127 in 128ths, top = a + ((b - a) * w + 64) // 128, bottom likewise, value = top +
((bottom - top) * v + 64) // 128.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, reduce

import numpy as np
import torch
from jaxtyping import Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from ca2st.batch import on_device
from pipelines.augment.boxes import NOISE_LEVELS, ErasedBox
from pipelines.augment.rand_augment import FILL, ImageAugment, Operation, OperationName, gain_of
from pipelines.keyed_random import raw_words

_PARTS = 128
"""Steps of a pixel that places are rounded to."""
_Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class WarpPlan:
    """Where each pixel of a warped square picture comes from; pixels are counted row by row."""

    corners: tuple[NDArray[np.int32], ...]
    """Source pixels above left, above right, below left and below right."""
    right: NDArray[np.int16]
    """Weight of the right ones, in 128ths."""
    below: NDArray[np.int16]
    """Weight of the lower ones, in 128ths."""
    outside: NDArray[np.bool_]
    """Pixels that get the fill colour."""


def warp_plan(operations: Sequence[Operation], *, size: int) -> WarpPlan:
    """Return the warp of a run of geometric operations on a `size` x `size` picture."""
    matrix = reduce(np.matmul, [_matrix(operation, size) for operation in operations])
    centres = np.arange(size, dtype=np.float64) + 0.5
    x_steps, x_parts, x_outside = _places(matrix[0], centres, size)
    y_steps, y_parts, y_outside = _places(matrix[1], centres, size)
    left, right = x_steps.clip(0, size - 1), (x_steps + 1).clip(0, size - 1)
    above, below = y_steps.clip(0, size - 1), (y_steps + 1).clip(0, size - 1)
    return WarpPlan(
        corners=tuple((row * size + column).astype(np.int32) for row in (above, below) for column in (left, right)),
        right=x_parts,
        below=y_parts,
        outside=x_outside | y_outside,
    )


def warp(
    frames: UInt8[Tensor, "3 time size size"], operations: Sequence[Operation]
) -> UInt8[Tensor, "3 time size size"]:
    """Apply the module's formula, written for reading; on any device."""
    plan = warp_plan(operations, size=frames.shape[-1])
    packed = np.stack([*plan.corners, plan.right, plan.below, plan.outside], dtype=np.int32)  # one copy to a device
    *corners, right, below, outside = on_device(torch.from_numpy(packed), frames.device).unbind()
    flat = frames.flatten(2).int()
    a, b, c, d = (flat[..., corner] for corner in corners)
    top, bottom = (
        left + ((other - left) * right + 64).div(_PARTS, rounding_mode="floor") for left, other in ((a, b), (c, d))
    )
    mixed = top + ((bottom - top) * below + 64).div(_PARTS, rounding_mode="floor")
    return torch.where(outside.bool(), _fill(frames.device), mixed).to(torch.uint8).reshape(frames.shape)


@cache
def _fill(device: torch.device) -> Int[Tensor, "3 1 1"]:
    return torch.tensor(FILL, device=device, dtype=torch.int32).view(3, 1, 1)


def _places(
    row: NDArray[np.float64], centres: NDArray[np.float64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int16], NDArray[np.bool_]]:
    """Return, along one axis, the pixel at or before each place, the rest in 128ths, and which places lie outside."""
    place = row[0] * centres[None, :] + row[1] * centres[:, None] + row[2]
    steps = np.floor(_PARTS * (place - 0.5) + 0.5).astype(np.int64).ravel()
    outside = (steps < -_PARTS // 2) | (steps >= _PARTS * size - _PARTS // 2)
    return steps // _PARTS, (steps % _PARTS).astype(np.int16), outside


def _matrix(operation: Operation, size: int) -> _Matrix:
    matrix: _Matrix = np.eye(3)
    match operation.name:
        case "Rotate":
            turn, middle = math.radians(operation.argument), size / 2
            cos, sin = math.cos(turn), math.sin(turn)
            matrix[0] = cos, -sin, middle - cos * middle + sin * middle
            matrix[1] = sin, cos, middle - sin * middle - cos * middle
        case "ShearX":
            matrix[0, 1] = operation.argument
        case "ShearY":
            matrix[1, 0] = operation.argument
        case "TranslateXRel":
            matrix[0, 2] = operation.argument * size
        case "TranslateYRel":
            matrix[1, 2] = operation.argument * size
    return matrix


Pixels = Int[Tensor, "3 time height width"]


def augmented(frames: UInt8[Tensor, "3 time size size"], augment: ImageAugment) -> UInt8[Tensor, "3 time size size"]:
    """Return the frames of a view after all operations of `augment`, one after the other."""
    for is_geometric, run in augment.runs():
        if is_geometric:
            frames = warp(frames, run)
            continue
        for operation in run:
            frames = pointwise(frames, operation)
    return frames


def pointwise(
    frames: UInt8[Tensor, "3 time height width"], operation: Operation
) -> UInt8[Tensor, "3 time height width"]:
    """Apply one operation that is not geometric."""
    return _FORMULAS[operation.name](frames.int(), operation.argument).clamp(0, 255).to(torch.uint8)


def _auto_contrast(x: Pixels, _: float) -> Pixels:
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (x - low) * 255 // (high - low).clamp(min=1), x)


def _equalize(x: Pixels, _: float) -> Pixels:
    planes = x.flatten(0, 1).flatten(1).long()
    counts = planes.new_zeros(len(planes), 256).scatter_add_(1, planes, torch.ones_like(planes))
    brightest = planes.amax(dim=1, keepdim=True)
    step = (planes.shape[1] - counts.gather(1, brightest)) // 255
    darker = counts.cumsum(dim=1) - counts
    spread = ((step // 2 + darker) // step.clamp(min=1)).gather(1, planes)
    return torch.where(step > 0, spread, planes).view(x.shape).int()


def _color(x: Pixels, factor: float) -> Pixels:
    red, green, blue = x
    return _away_from((77 * red + 150 * green + 29 * blue + 128) // 256, x, factor)


def _contrast(x: Pixels, factor: float) -> Pixels:
    red, green, blue = x.long().sum(dim=(2, 3), keepdim=True)
    thousandths, pixels = 299 * red + 587 * green + 114 * blue, x.shape[2] * x.shape[3]
    return _away_from(((2 * thousandths + 1000 * pixels) // (2000 * pixels)).int(), x, factor)


def _sharpness(x: Pixels, factor: float) -> Pixels:
    height, width = x.shape[2:]
    smooth = x.clone()
    if min(height, width) > 2:
        around = sum(
            (x[..., top : top + height - 2, left : left + width - 2] for top in range(3) for left in range(3)),
            start=x.new_zeros(()),
        )
        smooth[..., 1:-1, 1:-1] = (around + 4 * x[..., 1:-1, 1:-1] + 6) // 13
    return _away_from(smooth, x, factor)


def _away_from(base: Tensor, x: Pixels, factor: float) -> Pixels:
    """Move away from `base` (factor > 1) or towards it (< 1)."""
    return x + (gain_of(factor) * (x - base) + 64) // 128


_FORMULAS: dict[OperationName, Callable[[Tensor, float], Tensor]] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": lambda x, _: 255 - x,
    "PosterizeIncreasing": lambda x, bits: x >> (8 - round(bits)) << (8 - round(bits)),
    "SolarizeIncreasing": lambda x, threshold: torch.where(x < threshold, x, 255 - x),
    "SolarizeAdd": lambda x, amount: torch.where(x < 128, x + round(amount), x),
    "ColorIncreasing": _color,
    "ContrastIncreasing": _contrast,
    "BrightnessIncreasing": lambda x, factor: _away_from(x.new_zeros(()), x, factor),
    "SharpnessIncreasing": _sharpness,
}


def erase_in_place(frames: UInt8[Tensor, "3 time size size"], boxes: Sequence[ErasedBox]) -> None:
    """Paint the boxes over; on any device."""
    for erased in boxes:
        box = erased.box
        inside = frames[..., box.top : box.top + box.height, box.left : box.left + box.width]
        if erased.colour is not None:
            inside.copy_(torch.tensor(erased.colour, dtype=torch.uint8).view(3, 1, 1, 1))
            continue
        noise = raw_words(erased.noise, -(-inside.numel() // 8)).astype("<u8").view(np.uint8)[: inside.numel()]
        levels = np.take_along_axis(NOISE_LEVELS, noise.reshape(3, -1), axis=1)
        inside.copy_(torch.from_numpy(levels).view(inside.shape))
