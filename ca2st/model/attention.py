"""Multi-head self-attention of the experts, and multi-head cross-attention inside windows.

Scores are never materialised: both go through scaled_dot_product_attention, whose scale is (dim / heads)^-0.5.
"""

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from ca2st.model.config import Window
from ca2st.model.initial import expert_linear, new_linear

QkvBias = Literal["qkv", "qv"]

_INTO_WINDOWS: dict[Window, str] = {
    "time": "b t p (h e) -> (b p) h t e",
    "space": "b t p (h e) -> (b t) h p e",
    "space_time": "b t p (h e) -> b h (t p) e",
}
_OUT_OF_WINDOWS: dict[Window, str] = {
    "time": "(b p) h t e -> b t p (h e)",
    "space": "(b t) h p e -> b t p (h e)",
    "space_time": "b h (t p) e -> b t p (h e)",
}
"""b clips, t token times, p patches of a time, h heads, e features of a head. What stands in the first place attends
alone: `time` groups by patch position (the T tokens at the same place), `space` by frame (the patches of that frame),
`space_time` by clip (everything with everything)."""


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
        qkv = linear(tokens, self.qkv.weight, self._qkv_bias())
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

    def __init__(self, dim: int, num_heads: int, *, window: Window) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window: Window = window
        self.q = new_linear(dim, dim)
        self.kv = new_linear(dim, 2 * dim)
        self.proj = new_linear(dim, dim)

    def forward(
        self,
        queries: Float[Tensor, "batch query_frames query_patches dim"],
        keys: Float[Tensor, "batch key_frames key_patches dim"],
    ) -> Float[Tensor, "batch query_frames query_patches dim"]:
        """Let every query gather from the keys of its window. Windows of time and space need equal grids."""
        into = _INTO_WINDOWS[self.window]
        k, v = self.kv(keys).chunk(2, dim=-1)
        q, k, v = (rearrange(x, into, h=self.num_heads) for x in (self.q(queries), k, v))
        batch, frames, _, _ = queries.shape
        attended = rearrange(
            scaled_dot_product_attention(q, k, v), _OUT_OF_WINDOWS[self.window], **_sizes(self.window, batch, frames)
        )
        projected: Tensor = self.proj(attended)
        return projected


def _sizes(window: Window, batch: int, frames: int) -> dict[str, int]:
    return {"t": frames} if window == "space_time" else {"b": batch}
