"""Erasing carried out: the boxes that `erasing` drew, painted over on whatever device the frames lie."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from pipelines.augment.erasing import NOISE_LEVELS, ErasedBox
from pipelines.keyed_random import raw_words


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
