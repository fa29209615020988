"""From decoded pictures to finished views on a CPU: resize, mirror, RandAugment, erasing; the last two on a GPU too.

The resize is libswscale's, in a third of the time of DALI's. Its bilinear filter is the reference's triangle on
whole numbers: values differ by at most one level, in one of a hundred (70 dB). Pillow's and torch's resize of bytes
round twice, which is a level in one of five (55 dB).
"""

from collections.abc import Sequence
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation, VideoReformatter
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor

from pipelines.augment.boxes import CropBox
from pipelines.augment.formulas import augmented, erase_in_place
from pipelines.augment.fused import augment_in_place
from pipelines.decode.reference import first_row_resized, resized_crop
from pipelines.rendering import RenderRequest

Picture = UInt8[np.ndarray, "height width 3"]
_TRIANGLE = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_LEAST_SIDE = 4
"""Pixels; of fewer libswscale makes something else."""


def finish_crop(view: UInt8[Tensor, "3 time size size"], crop: Sequence[Picture], request: RenderRequest) -> None:
    """Resize and mirror the pictures of a crop into a contiguous view, then augment and erase it."""
    resize_into(view.numpy()[..., :: -1 if request.flip else 1], crop)
    finish_view(view, request)


def finish_view(view: UInt8[Tensor, "3 time size size"], request: RenderRequest) -> None:
    """Augment and erase one contiguous view in place."""
    if request.augment is not None:
        if view.device.type == "cpu":
            augment_in_place(view.numpy(), request.augment)
        else:
            view.copy_(augmented(view, request.augment))
    erase_in_place(view, request.erased)


def resize_into(view: UInt8[np.ndarray, "3 time size size"], crop: Sequence[Picture]) -> None:
    """Resize pictures of one size into `view` as the reference does, but for rounding: by libswscale.

    Its filter is the same triangle, on whole numbers. Where a picture shrinks it leaves out what lies before the first
    pixel, so the first row and column are the reference's. The three colours go in as planes that it takes for YUV.
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
    if height > size:
        view[:, :, 0] = first_row_resized(crop, size=size)
    if width > size:
        view[..., 0] = first_row_resized([picture.transpose(1, 0, 2) for picture in crop], size=size)


def _planes(frame: av.VideoFrame) -> list[UInt8[np.ndarray, "height width"]]:
    """Return the planes of a frame whose planes are all of its size; the same memory."""
    lines = [plane.line_size for plane in frame.planes]
    planes: list[Any] = [*frame.planes]  # buffers, which PyAV's types do not say
    rows = [np.frombuffer(plane, np.uint8).reshape(-1, line) for plane, line in zip(planes, lines, strict=True)]
    return [pixels[: frame.height, : frame.width] for pixels in rows]
