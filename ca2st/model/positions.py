"""Position tables: the fixed one of VideoMAE, the learned ones of bottleneck cross-attention, and other grids for both.

A table belongs to a grid. Where an expert was pretrained on another grid than the clip's, its table is interpolated
between the centres of the cells (`align_corners=False`, no smoothing), so a table keeps its place in the picture and
in the clip whatever the grid. A table whose grid stays the same is returned as it is, bit for bit.
"""

import math

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ca2st.errors import UserInputError
from ca2st.model.config import Window
from ca2st.model.initial import new_table
from ca2st.model.tokens import TokenGrid


def sinusoid_table(num_positions: int, dim: int) -> Float[Tensor, "positions dim"]:
    """Fixed codes over the flattened token index, computed in float64.

    angle = position / 10000^(2 floor(j / 2) / dim); sine at even j, cosine at odd j.
    """
    columns = np.arange(dim)
    angles = np.arange(num_positions)[:, None] / np.power(10000.0, 2 * (columns // 2) / dim)
    table = np.where(columns % 2 == 0, np.sin(angles), np.cos(angles))
    return torch.tensor(table, dtype=torch.float32)


def resize_grid_table(
    table: Float[Tensor, "positions dim"], *, from_grid: tuple[int, int], to_grid: tuple[int, int]
) -> Float[Tensor, "resized dim"]:
    """Learned codes of a picture's patches, row by row, for another number of rows and columns: bicubic.

    Grids are (rows, columns). The result has the type of `table`; the arithmetic is float32.

    Raises:
        UserInputError: `table` is not one of `from_grid`.
    """
    _check_rows(table, from_grid)
    if from_grid == to_grid:
        return table
    image = rearrange(table.float(), "(h w) d -> 1 d h w", h=from_grid[0])
    resized = interpolate(image, size=to_grid, mode="bicubic", align_corners=False)
    return rearrange(resized, "1 d h w -> (h w) d").to(table.dtype)


def resize_clip_table(
    table: Float[Tensor, "positions dim"], *, from_grid: tuple[int, int, int], to_grid: tuple[int, int, int]
) -> Float[Tensor, "resized dim"]:
    """Codes of a clip's patches, in the order time, row, column, for another grid: linear along each axis.

    Grids are (times, rows, columns): (8, 14, 14) is 16 frames of 224 pixels. The result has the type of `table`.

    Raises:
        UserInputError: `table` is not one of `from_grid`.
    """
    _check_rows(table, from_grid)
    if from_grid == to_grid:
        return table
    volume = rearrange(table.float(), "(t h w) d -> 1 d t h w", t=from_grid[0], h=from_grid[1])
    resized = interpolate(volume, size=to_grid, mode="trilinear", align_corners=False)
    return rearrange(resized, "1 d t h w -> (t h w) d").to(table.dtype)


def resize_time_table(table: Float[Tensor, "times dim"], num_times: int) -> Float[Tensor, "{num_times} dim"]:
    """Learned codes of token times for another number of them: linear. The result has the type of `table`."""
    if table.shape[0] == num_times:
        return table
    line = rearrange(table.float(), "t d -> 1 d t")
    resized = interpolate(line, size=num_times, mode="linear", align_corners=False)
    return rearrange(resized, "1 d t -> t d").to(table.dtype)


def _check_rows(table: Tensor, grid: tuple[int, ...]) -> None:
    if table.shape[0] != math.prod(grid):
        told = " x ".join(str(size) for size in grid)
        raise UserInputError(f"position table: expected the {math.prod(grid)} rows of {told}, found {table.shape[0]}")


class LearnedPositions(nn.Module):
    """Learned codes of one expert's patches in one direction of B-CA, one table for each axis the window spans.

    Window `time`: T x d; `space`: patches x d; `space_time`: both, added. They start with standard deviation
    (d / heads)^-0.5.
    """

    def __init__(self, grid: TokenGrid, dim: int, num_heads: int, *, window: Window) -> None:
        super().__init__()
        deviation = (dim / num_heads) ** -0.5
        self.time_table = new_table(grid.num_frames, dim, standard_deviation=deviation) if window != "space" else None
        self.space_table = new_table(grid.num_patches, dim, standard_deviation=deviation) if window != "time" else None

    def forward(self, patches: Float[Tensor, "batch frames patches dim"]) -> Float[Tensor, "batch frames patches dim"]:
        """Add the codes."""
        if self.time_table is not None:
            patches = patches + self.time_table[:, None]
        if self.space_table is not None:
            patches = patches + self.space_table
        return patches
