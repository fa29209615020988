"""The baseline: the same model with every formula computed the way it is written, by torch's ordinary operations.

It shares no speed-up with ours. In place of ours it has

- attention of the experts and of B-CA: the product of scaled queries and keys, ``softmax`` over it, the product with
  the values, three operations one after the other, so that the scores and their softmax exist as tensors
  `[windows, heads, queries, keys]` (and the softmax is kept for the backward pass);
- ``torch.nn.Linear`` where ours goes through `ca2st.model.attention`;
- QuickGELU as ``x * sigmoid(1.702 * x)``.

Everything else is ours as it stands: the order of the layers, the bottleneck's ``down`` (once per expert and bridge,
read by both directions, as the published formulation has it), position codes, frozen experts without gradients, the
optimizer. Weights have the same values under the same names.

Why this is a fair replacement for the published formulation: the formulas are those of the paper, a reader of the paper
would write them so, no operation is there that they do not ask for, and a test holds that outputs and gradients equal
ours. It is our own code; a run of somebody's implementation may be slower (it may compute more) or faster.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ca2st.errors import CA2STError
from ca2st.model.attention import CrossAttention, SelfAttention, TokenLinear, into_windows, out_of_windows
from ca2st.model.experts import QuickGELU
from ca2st.model.network import HolisticModel


def softmax_attention(
    q: Float[Tensor, "windows heads queries head_dim"],
    k: Float[Tensor, "windows heads keys head_dim"],
    v: Float[Tensor, "windows heads keys head_dim"],
) -> Float[Tensor, "windows heads queries head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v, with the scores as a tensor."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    attended: Tensor = scores.softmax(dim=-1) @ v
    return attended


class PlainSelfAttention(nn.Module):
    """MHSA of an expert from the weights of `ours`."""

    def __init__(self, ours: SelfAttention) -> None:
        super().__init__()
        self.num_heads = ours.num_heads
        self.qkv = ours.qkv
        self.proj = ours.proj
        self.q_bias = ours.q_bias
        self.v_bias = ours.v_bias

    def forward(
        self, tokens: Float[Tensor, "batch sequences tokens dim"]
    ) -> Float[Tensor, "batch sequences tokens dim"]:
        """Attend among the tokens of each sequence."""
        bias: Tensor | None = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = nn.functional.linear(tokens, self.qkv.weight, bias)
        q, k, v = rearrange(qkv, "b s n (three h e) -> three (b s) h n e", three=3, h=self.num_heads)
        attended = rearrange(softmax_attention(q, k, v), "(b s) h n e -> b s n (h e)", s=tokens.shape[1])
        projected: Tensor = self.proj(attended)
        return projected


class PlainCrossAttention(nn.Module):
    """MHCA of B-CA from the weights of `ours`."""

    def __init__(self, ours: CrossAttention) -> None:
        super().__init__()
        self.num_heads, self.window, self.grouping = ours.num_heads, ours.window, ours.grouping
        self.q = ours.q
        self.kv = ours.kv
        self.proj = ours.proj

    def forward(
        self,
        queries: Float[Tensor, "batch query_frames query_patches dim"],
        keys: Float[Tensor, "batch key_frames key_patches dim"],
    ) -> Float[Tensor, "batch query_frames query_patches dim"]:
        """Let every query gather from the keys of its window."""
        num_places = min(queries.shape[2], keys.shape[2])
        k, v = self.kv(keys).chunk(2, dim=-1)
        q, k, v = (
            into_windows(x, self.window, num_heads=self.num_heads, num_places=num_places, grouping=self.grouping)
            for x in (self.q(queries), k, v)
        )
        attended = out_of_windows(
            softmax_attention(q, k, v),
            self.window,
            batch=queries.shape[0],
            frames=queries.shape[1],
            num_places=num_places,
            grouping=self.grouping,
        )
        projected: Tensor = self.proj(attended)
        return projected


class PlainQuickGELU(nn.Module):
    """QuickGELU as its formula says."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply it to every element."""
        return x * torch.sigmoid(1.702 * x)


def plain_model(model: HolisticModel) -> HolisticModel:
    """Return a copy of `model`, weights included, that computes everything the plain way.

    Raises:
        CA2STError: the model has none of the parts that are to be replaced: model and baseline have grown apart.
    """
    plain = copy.deepcopy(model)
    replaced = 0
    for parent in list(plain.modules()):
        for name, child in list(parent.named_children()):
            if make := _PLAIN.get(type(child)):
                setattr(parent, name, make(child))
                replaced += isinstance(child, SelfAttention)
    if not replaced:
        raise CA2STError("baseline: expected self-attention of ca2st.model.attention in the model, found none")
    return plain


def _plain_linear(ours: TokenLinear) -> nn.Linear:
    linear = nn.Linear(ours.in_features, ours.out_features, bias=ours.bias is not None, device="meta")
    linear.weight, linear.bias = ours.weight, ours.bias
    return linear


_PLAIN: Mapping[type[nn.Module], Callable[[Any], nn.Module]] = {
    SelfAttention: PlainSelfAttention,
    CrossAttention: PlainCrossAttention,
    TokenLinear: _plain_linear,
    QuickGELU: lambda _ours: PlainQuickGELU(),
}
"""Ours, and what replaces it. Parents are visited before their children, so a replaced attention's own Linears
are replaced too."""
