"""RandAugment by the formulas of operations.py, one operation after the other, written for reading, in torch.

The oracle of `fused.py`; whole numbers throughout, so any device gives the same bytes.
"""

from collections.abc import Callable

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from pipelines.augment.geometry import warp
from pipelines.augment.operations import ImageAugment, Operation, OperationName, gain_of

Pixels = Int[Tensor, "3 time height width"]


def augmented(frames: UInt8[Tensor, "3 time size size"], augment: ImageAugment) -> UInt8[Tensor, "3 time size size"]:
    """The frames of a view after all operations of `augment`, one after the other."""
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
    """One operation that is not geometric."""
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


def _invert(x: Pixels, _: float) -> Pixels:
    return 255 - x


def _posterize(x: Pixels, bits: float) -> Pixels:
    step = 1 << (8 - round(bits))
    return x // step * step


def _solarize(x: Pixels, threshold: float) -> Pixels:
    return torch.where(x < threshold, x, 255 - x)


def _solarize_add(x: Pixels, amount: float) -> Pixels:
    return torch.where(x < 128, x + round(amount), x)


def _color(x: Pixels, factor: float) -> Pixels:
    red, green, blue = x
    return _away_from((77 * red + 150 * green + 29 * blue + 128) // 256, x, factor)


def _contrast(x: Pixels, factor: float) -> Pixels:
    red, green, blue = x.long().sum(dim=(2, 3), keepdim=True)
    thousandths, pixels = 299 * red + 587 * green + 114 * blue, x.shape[2] * x.shape[3]
    return _away_from(((2 * thousandths + 1000 * pixels) // (2000 * pixels)).int(), x, factor)


def _brightness(x: Pixels, factor: float) -> Pixels:
    return _away_from(torch.zeros((), dtype=x.dtype, device=x.device), x, factor)


def _sharpness(x: Pixels, factor: float) -> Pixels:
    height, width = x.shape[2:]
    smooth = x.clone()
    if min(height, width) > 2:
        around = sum(
            (x[..., top : top + height - 2, left : left + width - 2] for top in range(3) for left in range(3)),
            start=torch.zeros((), dtype=x.dtype, device=x.device),
        )
        smooth[..., 1:-1, 1:-1] = (around + 4 * x[..., 1:-1, 1:-1] + 6) // 13
    return _away_from(smooth, x, factor)


def _away_from(base: Tensor, x: Pixels, factor: float) -> Pixels:
    """Away from `base` (factor > 1) or towards it (< 1)."""
    return x + (gain_of(factor) * (x - base) + 64) // 128


_FORMULAS: dict[OperationName, Callable[[Tensor, float], Tensor]] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": _color,
    "ContrastIncreasing": _contrast,
    "BrightnessIncreasing": _brightness,
    "SharpnessIncreasing": _sharpness,
}
