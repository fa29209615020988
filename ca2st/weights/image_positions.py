"""Learned positions of square pictures for another crop: of CLIP, and of the patches in cross-attention."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ca2st.model.positions import resize_grid_table

NUM_CLIP_PREFIX = 1
"""Rows before the patches of CLIP's table: that of the class token, which stays."""


def square_side(num_patches: int) -> int | None:
    """Patches on a side of a square grid; None where `num_patches` make no square."""
    side = math.isqrt(max(num_patches, 0))
    return side if side and side * side == num_patches else None


def fit_image_positions(
    table: Float[Tensor, "tokens dim"], *, side: int, num_prefix: int = 0
) -> Float[Tensor, "fitted dim"]:
    """Resize a table of `num_prefix` rows and a square of patches to `side` patches on a side (bicubic).

    The caller has checked that the patches make a square.
    """
    prefix, patches = table[:num_prefix], table[num_prefix:]
    found = math.isqrt(patches.shape[0])
    return torch.cat((prefix, resize_grid_table(patches, from_grid=(found, found), to_grid=(side, side))))
