"""Learned positions of spectrogram patches for another length of spectrogram.

A column of patches stands for a fixed time (10 rows of 10 ms), so a shorter spectrogram gets a part of the table,
around its centre, and only a longer one gets a stretched table.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from ca2st.model.config import ModelConfig
from ca2st.model.tokens import NUM_AUDIO_PREFIX
from ca2st.weights.errors import WeightsMismatchError


def fit_audio_positions(
    table: Float[Tensor, "tokens dim"], *, rows: int, columns: int, where: str, num_prefix: int = NUM_AUDIO_PREFIX
) -> Float[Tensor, "fitted dim"]:
    """Cut the grid of patches around its centre to `columns`, or stretch it bilinearly when there are more.

    The prefix tokens, two in AST, stay. `rows` is F', equal in both; the 12 x 101 grid of AudioSet files gives columns
    50 - T' // 2 onwards.

    Raises:
        WeightsMismatchError: the table is no grid of `rows` rows.
    """
    patches = table.shape[0] - num_prefix
    if patches < rows or patches % rows:
        raise WeightsMismatchError(
            f"{where}: positions: expected {num_prefix} prefix tokens and a grid of {rows} rows, "
            f"found {table.shape[0]} tokens; only 128 mel bins with stride 10 are known"
        )
    prefix, grid = table[:num_prefix], table[num_prefix:]
    grid = rearrange(grid, "(f t) d -> 1 d f t", f=rows)
    found = grid.shape[-1]
    if columns <= found:
        start = found // 2 - columns // 2
        grid = grid[..., start : start + columns]
    else:
        grid = interpolate(grid.float(), size=(rows, columns), mode="bilinear", align_corners=False)
    return torch.cat((prefix.to(grid.dtype), rearrange(grid, "1 d f t -> (f t) d")))


def least_mel_rows(config: ModelConfig, columns: int) -> int:
    """Rows of the shortest spectrogram that has `columns` columns of patches."""
    return (columns - 1) * config.audio_stride + config.patch_size
