"""Resizing of crops: the reference's formula in NumPy, and the same by libswscale in a third of the time of DALI's.

Resizing n source pixels to m: target pixel i has its centre at c = (i + 0.5) * n / m - 0.5 on the source grid. Its
value is the mean of the source pixels j, weighted by max(0, 1 - |j - c| / r) with r = max(1, n / m): bilinear
interpolation when growing, a triangle that covers all of the shrunk area when shrinking. Weights are scaled to sum
1. Beyond its border the crop continues with its last pixel, as in DALI; Pillow and torch leave those weights out, so
where a picture shrinks they differ in the outermost target pixels. Columns first, then rows, in float32; one
rounding, half up, at the end.

libswscale's bilinear filter is this triangle on whole numbers: values differ by at most one level, in one of a hundred
(70 dB). Pillow's and torch's resize of bytes round twice, which is a level in one of five (55 dB).
"""

import math
from collections.abc import Sequence
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation, VideoReformatter
from einops import rearrange
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment.boxes import CropBox

Picture = UInt8[np.ndarray, "height width 3"]
_TRIANGLE = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_LEAST_SIDE = 4
"""Pixels; of fewer libswscale makes something else."""


def resized_crop(
    frames: UInt8[Tensor, "time 3 height width"], box: CropBox, *, size: int
) -> UInt8[Tensor, "time 3 size size"]:
    """Return the pixels of `box` resized to `size` x `size` by the module's formula."""
    crop = frames[..., box.top : box.top + box.height, box.left : box.left + box.width].numpy()
    # Frames and colours last: every tap then copies whole runs of memory.
    planes = rearrange(crop, "t c h w -> h w (t c)").astype(np.float32)
    resized = _resize(_resize(planes, axis=1, size=size), axis=0, size=size)
    return torch.from_numpy(rearrange(_rounded(resized), "h w (t c) -> t c h w", c=3))


def resize_into(view: UInt8[np.ndarray, "3 time size size"], crop: Sequence[Picture]) -> None:
    """Resize pictures of one size into `view` by libswscale, as `resized_crop` does but for rounding.

    The three colours go in as planes that it takes for YUV.
    """
    (height, width), size = crop[0].shape[:2], view.shape[-1]
    if min(height, width) < _LEAST_SIDE:
        frames = torch.from_numpy(rearrange(np.stack(crop), "t h w c -> t c h w"))
        box = CropBox(top=0, left=0, height=height, width=width)
        view[...] = rearrange(resized_crop(frames, box, size=size).numpy(), "t c h w -> c t h w")
        return
    frame, scaler = av.VideoFrame(width, height, "yuv444p"), VideoReformatter()
    planes = _planes(frame)
    for time, picture in enumerate(crop):
        for plane, colour in zip(planes, picture.transpose(2, 0, 1), strict=True):
            plane[...] = colour
        scaled = scaler.reformat(frame, width=size, height=size, interpolation=_TRIANGLE, threads=1)
        for colour, plane in zip(view[:, time], _planes(scaled), strict=True):
            colour[...] = plane
    # Where a picture shrinks libswscale leaves out what lies before its first pixel.
    if height > size:
        view[:, :, 0] = _first_row(crop, size=size)
    if width > size:
        view[..., 0] = _first_row([picture.transpose(1, 0, 2) for picture in crop], size=size)


def _first_row(frames: Sequence[Picture], *, size: int) -> UInt8[np.ndarray, "3 time size"]:
    """Return the first row of the frames resized to `size` x `size`."""
    taps, weights = triangle_taps(len(frames[0]), size)
    rows = np.stack([frame[taps[:, 0]] for frame in frames], axis=1).astype(np.float32)
    row = rearrange(np.tensordot(weights[:, 0], rows, axes=1), "t w c -> 1 w (t c)")
    return rearrange(_rounded(_resize(row, axis=1, size=size)), "1 w (t c) -> c t w", c=3)


def _planes(frame: av.VideoFrame) -> list[UInt8[np.ndarray, "height width"]]:
    """Return the planes of a frame whose planes are all of its size; the same memory."""
    planes: Any = frame.planes  # buffers, which PyAV's types do not say
    rows = [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size) for plane in planes]
    return [pixels[: frame.height, : frame.width] for pixels in rows]


def _rounded(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = np.floor(values + np.float32(0.5)).clip(0, 255).astype(np.uint8)
    return pixels


def _resize(planes: NDArray[np.float32], *, axis: int, size: int) -> NDArray[np.float32]:
    taps, weights = triangle_taps(planes.shape[axis], size)
    along = (1, size, 1) if axis else (size, 1, 1)
    total = np.zeros((), dtype=np.float32)
    for tap, weight in zip(taps, weights, strict=True):
        total = total + np.take(planes, tap, axis=axis) * weight.reshape(along)
    return total


def triangle_taps(num_source: int, num_target: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the source pixels that each target pixel reads, and their weights, both [taps, target].

    Added tap by tap, so a value never depends on the number of threads or on the shape of the batch.
    """
    scale = num_source / num_target
    radius = max(1.0, scale)
    centre = (np.arange(num_target) + 0.5) * scale - 0.5
    taps = np.ceil(centre - radius) + np.arange(math.floor(2 * radius) + 1)[:, None]
    weights = np.maximum(1 - np.abs(taps - centre) / radius, 0)
    weights /= weights.sum(axis=0)
    return taps.clip(0, num_source - 1).astype(np.int64), weights.astype(np.float32)
