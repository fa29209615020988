"""What finishes a view in place: on a CPU the formulas of operations byte for byte, eight times faster.

Operations that are one table per frame and channel are not applied but composed, one after the other, and a run of them
costs one look-up per pixel. The statistics they need come from the histogram before the run, carried through the
tables. A warp has one map for all frames of the clip, so a pixel is moved with all its frames and channels at once:
48 bytes of 16 frames. Everything is done in blocks that fit the processor's cache, by NumPy without the interpreter's
lock: several clips are augmented at once on several threads.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment.boxes import ErasedBox
from pipelines.augment.formulas import WarpPlan, augmented, erase_in_place, warp_plan
from pipelines.augment.rand_augment import FILL, ImageAugment, OperationName, gain_of

_Bytes = NDArray[np.uint8]
_BLOCK_PIXELS = 1024
_LEVELS = np.arange(256)


def finish_view(
    view: UInt8[Tensor, "3 time size size"], augment: ImageAugment | None, erased: Sequence[ErasedBox]
) -> None:
    """Augment and erase one contiguous view: on a CPU by this module, on a GPU by the formulas."""
    if augment is not None:
        if view.device.type == "cpu":
            augment_in_place(view.numpy(), augment)
        else:
            view.copy_(augmented(view, augment))
    erase_in_place(view, erased)


def augment_in_place(frames: UInt8[np.ndarray, "3 time size size"], augment: ImageAugment) -> None:
    """Apply `augment` to the frames of a view, which must be contiguous."""
    planes = _Planes(frames)
    for is_geometric, run in augment.runs():
        if is_geometric:
            planes.apply_table()
            _warp(frames, warp_plan(run, size=frames.shape[-1]))
            continue
        for operation in run:
            if operation.name in _TABLES:
                planes.then(_TABLES[operation.name](planes, operation.argument))
                continue
            planes.apply_table()
            move = _colour if operation.name == "ColorIncreasing" else _sharpen
            for time in range(frames.shape[1]):
                move(frames[:, time], gain_of(operation.argument))
    planes.apply_table()


class _Planes:
    """The frames as channel x time planes of pixels, with a table that is still to be applied to each."""

    def __init__(self, frames: _Bytes) -> None:
        self.frames = frames
        self._pixels = frames.reshape(frames.shape[0] * frames.shape[1], -1)
        self._table: NDArray[np.int64] | None = None
        self._counts: NDArray[np.int64] | None = None

    def then(self, table: NDArray[np.int64]) -> None:
        """Append `table` ([256] or [planes, 256]) to what is to be applied."""
        rows = np.broadcast_to(table, (len(self._pixels), 256))
        self._table = rows if self._table is None else np.take_along_axis(rows, self._table, axis=1)

    def apply_table(self) -> None:
        """Bring the pixels up to date; what is known of them is forgotten, since they change next."""
        if self._table is not None:
            for plane, row in zip(self._pixels, self._table.astype(np.uint8), strict=True):
                np.take(row, plane, mode="wrap", out=plane)
        self._table = self._counts = None

    def extremes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the lowest and highest value of each plane."""
        if self._table is None:
            return self._pixels.min(axis=1).astype(np.int64), self._pixels.max(axis=1).astype(np.int64)
        return _extremes(self.histogram())

    def sums(self) -> NDArray[np.int64]:
        """Return the sum of each plane."""
        if self._table is None:
            return np.asarray(self._pixels.sum(axis=1, dtype=np.int64))
        return np.asarray((self._histogram_before() * self._table).sum(axis=1))

    def histogram(self) -> NDArray[np.int64]:
        """Return the [planes, 256] numbers of pixels."""
        before = self._histogram_before()
        if self._table is None:
            return before
        places = self._table + 256 * np.arange(len(before))[:, None]
        carried = np.bincount(places.ravel(), weights=before.ravel(), minlength=before.size)
        return carried.astype(np.int64).reshape(before.shape)

    def _histogram_before(self) -> NDArray[np.int64]:
        if self._counts is None:
            counts = [torch.bincount(torch.from_numpy(plane), minlength=256) for plane in self._pixels]
            self._counts = torch.stack(counts).numpy()
        return self._counts


def _extremes(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    present = counts > 0
    return present.argmax(axis=1), 255 - present[:, ::-1].argmax(axis=1)


def _auto_contrast(planes: _Planes, _: float) -> NDArray[np.int64]:
    low, high = (values[:, None] for values in planes.extremes())
    stretched = (_LEVELS - low) * 255 // np.maximum(high - low, 1)
    return np.where(high > low, stretched, _LEVELS).clip(0, 255)


def _equalize(planes: _Planes, _: float) -> NDArray[np.int64]:
    counts = planes.histogram()
    brightest = _extremes(counts)[1]
    step = (counts.sum(axis=1) - counts[np.arange(len(counts)), brightest])[:, None] // 255
    darker = counts.cumsum(axis=1) - counts
    spread = (step // 2 + darker) // np.maximum(step, 1)
    return np.where(step > 0, spread, _LEVELS).clip(0, 255)


def _contrast(planes: _Planes, factor: float) -> NDArray[np.int64]:
    channels, time = planes.frames.shape[:2]
    pixels = planes.frames[0, 0].size
    red, green, blue = planes.sums().reshape(channels, time)
    grey = (2 * (299 * red + 587 * green + 114 * blue) + 1000 * pixels) // (2000 * pixels)
    return _away_from(np.tile(grey, channels)[:, None], factor)


def _away_from(base: NDArray[np.int64] | int, factor: float) -> NDArray[np.int64]:
    return (_LEVELS + (gain_of(factor) * (_LEVELS - base) + 64) // 128).clip(0, 255)


_TABLES: dict[OperationName, Callable[[_Planes, float], NDArray[np.int64]]] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": lambda _, __: 255 - _LEVELS,
    "PosterizeIncreasing": lambda _, bits: _LEVELS >> (8 - round(bits)) << (8 - round(bits)),
    "SolarizeIncreasing": lambda _, threshold: np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS),
    "SolarizeAdd": lambda _, amount: np.where(_LEVELS < 128, np.minimum(_LEVELS + round(amount), 255), _LEVELS),
    "ContrastIncreasing": _contrast,
    "BrightnessIncreasing": lambda _, factor: _away_from(0, factor),
}
"""Operations that are one table of 256 entries per plane."""


def _colour(frame: _Bytes, gain: int) -> None:
    weights = np.array([77, 150, 29], dtype=np.uint16)[:, None, None]
    grey = ((frame * weights).sum(axis=0, dtype=np.uint16) + np.uint16(128)) >> np.uint16(8)
    _move_away(frame, grey.astype(np.int16), gain)


def _sharpen(frame: _Bytes, gain: int) -> None:
    if min(frame.shape[1:]) < 3:
        return
    x = frame.astype(np.int16)
    columns = x[:, :-2] + x[:, 1:-1]
    columns += x[:, 2:]
    smooth = columns[..., :-2] + columns[..., 1:-1]
    smooth += columns[..., 2:]
    smooth += 4 * x[:, 1:-1, 1:-1]
    smooth += 6
    smooth //= 13
    _move_away(frame[:, 1:-1, 1:-1], smooth, gain)


def _move_away(pixels: _Bytes, base: NDArray[np.int16], gain: int) -> None:
    """Set x to x + (gain * (x - base) + 64) // 128, cut to a byte; every term fits 16 bits."""
    x = pixels.astype(np.int16)
    moved = x - base
    moved *= np.int16(gain)
    moved += 64
    moved >>= 7
    moved += x
    np.clip(moved, 0, 255, out=moved)
    pixels[...] = moved


def _warp(frames: _Bytes, plan: WarpPlan) -> None:
    """Move every pixel with all its planes: [pixels, planes] is what the blocks are taken from."""
    planes = frames.reshape(frames.shape[0] * frames.shape[1], -1)
    source = np.ascontiguousarray(planes.T, dtype=np.int16)
    fill = np.repeat(np.array(FILL, dtype=np.int16), frames.shape[1])
    has_right, has_below = bool(plan.right.any()), bool(plan.below.any())
    for start in range(0, len(source), _BLOCK_PIXELS):
        block = slice(start, start + _BLOCK_PIXELS)
        corners = [corner[block] for corner in plan.corners]
        right = plan.right[block, None] if has_right else None
        moved = _between(source, corners[:2], right)
        if has_below:
            moved = _mixed(moved, _between(source, corners[2:], right), plan.below[block, None])
        moved[plan.outside[block]] = fill
        planes[:, block] = moved.T


def _between(
    source: NDArray[np.int16], corners: Sequence[NDArray[np.int32]], weight: NDArray[np.int16] | None
) -> NDArray[np.int16]:
    """Return the pixels at two corners, mixed; without weights the first."""
    first = np.take(source, corners[0], axis=0)
    return first if weight is None else _mixed(first, np.take(source, corners[1], axis=0), weight)


def _mixed(first: NDArray[np.int16], second: NDArray[np.int16], weight: NDArray[np.int16]) -> NDArray[np.int16]:
    """Return first + ((second - first) * weight + 64) // 128, in the memory of `second`."""
    second -= first
    second *= weight
    second += 64
    second >>= 7
    second += first
    return second
