"""Position tables: the fixed one of the temporal expert and the learned ones of bottleneck cross-attention."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

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
