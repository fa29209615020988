"""Multi-head self-attention of the experts, and multi-head cross-attention inside windows.

Scores are never materialised: both go through scaled_dot_product_attention, whose scale is (dim / heads)^-0.5.
"""

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ca2st.model.config import Window
from ca2st.model.initial import expert_linear, new_linear
from ca2st.model.token_linear import token_linear
from ca2st.model.windows import Grouping, into_windows, out_of_windows

QkvBias = Literal["qkv", "qv"]


class SelfAttention(nn.Module):
    """MHSA of an expert; with `bias = "qv"` (VideoMAE) the keys have no bias."""

    def __init__(self, dim: int, num_heads: int, *, bias: QkvBias = "qkv") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = expert_linear(dim, 3 * dim, bias=bias == "qkv")
        self.proj = expert_linear(dim, dim)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if bias == "qv" else None

    def forward(
        self, tokens: Float[Tensor, "batch sequences tokens dim"]
    ) -> Float[Tensor, "batch sequences tokens dim"]:
        """Attend among the tokens of each sequence."""
        qkv = token_linear(tokens, self.qkv.weight, self._qkv_bias())
        q, k, v = rearrange(qkv, "b s n (three h e) -> three (b s) h n e", three=3, h=self.num_heads)
        attended = rearrange(scaled_dot_product_attention(q, k, v), "(b s) h n e -> b s n (h e)", s=tokens.shape[1])
        projected: Tensor = self.proj(attended)
        return projected

    def _qkv_bias(self) -> Tensor:
        if self.q_bias is None or self.v_bias is None:
            return self.qkv.bias
        return torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))


class CrossAttention(nn.Module):
    """MHCA: Linear q (d -> d) and kv (d -> 2d, k first), both with bias, softmax inside a window, Linear proj."""

    def __init__(self, dim: int, num_heads: int, *, window: Window, grouping: Grouping = "raster") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window: Window = window
        self.grouping: Grouping = grouping
        self.q = new_linear(dim, dim)
        self.kv = new_linear(dim, 2 * dim)
        self.proj = new_linear(dim, dim)

    def forward(
        self,
        queries: Float[Tensor, "batch query_frames query_patches dim"],
        keys: Float[Tensor, "batch key_frames key_patches dim"],
    ) -> Float[Tensor, "batch query_frames query_patches dim"]:
        """Let every query gather from the keys of its window.

        Windows of time and space need equal numbers of frames. Grids of patches may differ: `windows` groups the finer.
        """
        q, k, v = self.projections(queries, keys)
        batch, frames, num_patches, _ = queries.shape
        attended = out_of_windows(
            scaled_dot_product_attention(q, k, v),
            self.window,
            batch=batch,
            frames=frames,
            num_places=min(num_patches, keys.shape[2]),
            grouping=self.grouping,
        )
        projected: Tensor = self.proj(attended)
        return projected

    def projections(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, `[windows, heads, tokens, dim / heads]` each."""
        k, v = self.kv(keys).chunk(2, dim=-1)
        num_places = min(queries.shape[2], keys.shape[2])
        q, k, v = (
            into_windows(x, self.window, num_heads=self.num_heads, num_places=num_places, grouping=self.grouping)
            for x in (self.q(queries), k, v)
        )
        return q, k, v
