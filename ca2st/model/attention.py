"""Linear layers over tokens and how they start, windows of cross-attention, and the two attentions.

Everything that is added to the experts starts as published: Linear trunc-normal with standard deviation 0.02 and bias
0; the second Linear of every layer adapter and every `up` of B-CA starts at zero, so that at step 0 each expert gives
exactly its own features. An expert that is to be trained from nothing starts by Glorot's rule, whose scale follows the
width: a constant 0.02 would stall the small experts of the demo.

Windows of cross-attention decide which queries meet which keys, by a rearrangement of both. `time` groups by patch
position: a query sees the keys at its own place in all frames. `space` groups by frame: it sees every patch of its own
frame. `space_time` is one group per clip. Where one side has more patches than the other (a ResNet map against a grid
of tokens), a place of the coarser side meets a group of the finer side's patches: the `square` of patches that lies
under it, or as many neighbours in `raster` order.

Scores are never materialised: both attentions go through scaled_dot_product_attention, whose scale is
(dim / heads)^-0.5.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from ca2st.model.config import Window

_HAS_ONEDNN = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]  # torch's own
_SMALLEST_WEIGHT = 128 * 128
"""With fewer weights the call costs more than it gains."""


class TokenLinear(nn.Linear):
    """nn.Linear in state and result, computed by `token_linear`."""

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's own name
        """Transform the last axis."""
        return token_linear(input, self.weight, self.bias)


def token_linear(
    tokens: Float[Tensor, "*places in_dim"],
    weight: Float[Tensor, "out_dim in_dim"],
    bias: Float[Tensor, " out_dim"] | None,
) -> Float[Tensor, "*places out_dim"]:
    """Return `tokens @ weight.T + bias`, on a processor by oneDNN."""
    # This is the only place that uses a private operator of torch (in `_product`), and it stays because it gives most
    # of our lead on a processor: two layers, a training step 1.72x as fast as the authors' code with it, 1.11x without.
    # torch gives a float32 Linear to MKL; the same product by oneDNN takes a fifth to a third less time on processors
    # that MKL has no best path for, forward and for the gradient of the tokens. Where both are equally good nothing is
    # lost. `torch.compile` chooses for itself and gets the plain Linear.
    if (
        torch.compiler.is_compiling()
        or tokens.device.type != "cpu"
        or not tokens.dtype == weight.dtype == torch.float32
        or tokens.ndim <= 2
        or weight.numel() < _SMALLEST_WEIGHT
        or torch.is_autocast_enabled("cpu")
        or not _HAS_ONEDNN
    ):
        return linear(tokens, weight, bias)
    out: Tensor = _OneDNNLinear.apply(tokens, weight, bias)  # type: ignore[no-untyped-call]  # torch's own
    return out


class _OneDNNLinear(torch.autograd.Function):
    """The forward product and the gradient of the tokens by oneDNN; the gradient of the weight by MKL, as fast there.

    Frozen weights get no gradient, and what only that gradient needs is not kept.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        kept = (weight, tokens) if weight.requires_grad else (weight,)
        ctx.save_for_backward(*kept)
        return _product(tokens, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (slope,) = gradients
        weight, *tokens = ctx.saved_tensors
        of_tokens, of_weight, of_bias = ctx.needs_input_grad
        rows = slope.flatten(0, -2)
        return (
            _product(slope, weight.t(), None) if of_tokens else None,
            rows.t() @ tokens[0].flatten(0, -2) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


_STANDARD_DEVIATION = 0.02


def with_zero_gradients(
    tensor: Float[Tensor, "*shape"], idle: Iterable[nn.Module], codes: Iterable[Tensor] = ()
) -> Float[Tensor, "*shape"]:
    """Return `tensor` as it is; in the backward pass the trained parameters of `idle`, and `codes`, get zeros.

    For parameters that reach no output: the optimiser decays them all the same, and DistributedDataParallel waits for
    the gradient of every parameter.
    """
    trained = [x for x in (*(p for module in idle for p in module.parameters()), *codes) if x.requires_grad]
    if not trained or not torch.is_grad_enabled():
        return tensor
    out: Tensor = _ZeroGradients.apply(tensor, *trained)  # type: ignore[no-untyped-call]  # torch's own
    return out


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return (gradients[0], *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors))


def new_linear(num_in: int, num_out: int) -> nn.Linear:
    """Return a Linear that starts trunc-normal (0.02) with bias 0."""
    linear = TokenLinear(num_in, num_out)
    if not linear.weight.is_meta:  # there it would be traced, at length, for no numbers
        nn.init.trunc_normal_(linear.weight, std=_STANDARD_DEVIATION)
    nn.init.zeros_(linear.bias)
    return linear


def zero_linear(num_in: int, num_out: int) -> nn.Linear:
    """Return a Linear that starts at zero: what follows a residual adds nothing at step 0."""
    linear = TokenLinear(num_in, num_out)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def expert_linear(num_in: int, num_out: int, *, bias: bool = True) -> nn.Linear:
    """Return a Linear of an expert, started by Glorot's rule with bias 0."""
    linear = TokenLinear(num_in, num_out, bias=bias)
    nn.init.xavier_uniform_(linear.weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def start_patch_embedding(convolution: nn.Conv2d | nn.Conv3d) -> None:
    """Start a patch embedding like the Linear it is: one row of weights per patch."""
    nn.init.xavier_uniform_(convolution.weight.data.flatten(1))
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)


def new_table(*shape: int, standard_deviation: float = _STANDARD_DEVIATION) -> nn.Parameter:
    """Return a learned token or position table that starts normal."""
    table = torch.empty(*shape)
    return nn.Parameter(table if table.is_meta else nn.init.normal_(table, std=standard_deviation))


Grouping = Literal["raster", "square"]

_INTO: dict[Window, str] = {
    "time": "b t (g n) (h e) -> (b g) h (t n) e",
    "space": "b t p (h e) -> (b t) h p e",
    "space_time": "b t p (h e) -> b h (t p) e",
}
_OUT_OF: dict[Window, str] = {
    "time": "(b g) h (t n) e -> b t (g n) (h e)",
    "space": "(b t) h p e -> b t p (h e)",
    "space_time": "b h (t p) e -> b t p (h e)",
}
"""b clips, t token times, p patches of a time, g places of the coarser side with n patches each, h heads, e features of
a head. What stands in the first place attends alone."""


def into_windows(
    patches: Float[Tensor, "batch frames patches dim"],
    window: Window,
    *,
    num_heads: int,
    num_places: int,
    grouping: Grouping,
) -> Float[Tensor, "windows heads tokens head_dim"]:
    """Give every window a row of its own. `num_places`: patches of the coarser side."""
    if window == "time":
        patches = _regroup(patches, _TOGETHER, num_places=num_places, grouping=grouping)
        return rearrange(patches, _INTO[window], h=num_heads, g=num_places)
    return rearrange(patches, _INTO[window], h=num_heads)


def out_of_windows(
    attended: Float[Tensor, "windows heads tokens head_dim"],
    window: Window,
    *,
    batch: int,
    frames: int,
    num_places: int,
    grouping: Grouping,
) -> Float[Tensor, "batch frames patches dim"]:
    """Undo `into_windows`."""
    if window == "time":
        patches = rearrange(attended, _OUT_OF[window], b=batch, t=frames)
        return _regroup(patches, _APART, num_places=num_places, grouping=grouping)
    sizes = {"t": frames} if window == "space_time" else {"b": batch}
    return rearrange(attended, _OUT_OF[window], **sizes)


_TOGETHER = "b t (gy y gx x) d -> b t (gy gx y x) d"
_APART = "b t (gy gx y x) d -> b t (gy y gx x) d"
"""Between raster order and the order in which the y x patches of a square lie side by side."""


def _regroup(patches: Tensor, pattern: str, *, num_places: int, grouping: Grouping) -> Tensor:
    num_patches = patches.shape[2]
    if grouping == "raster" or num_patches == num_places:
        return patches
    rows, side = math.isqrt(num_places), math.isqrt(num_patches // num_places)
    return rearrange(patches, pattern, gy=rows, gx=rows, y=side, x=side)


class Attend(nn.Module):
    """softmax(q k^T / sqrt(head_dim)) v, by torch's own choice of a kernel or by the one that was set."""

    kernel: SDPBackend | None = None

    def forward(
        self,
        q: Float[Tensor, "windows heads queries head_dim"],
        k: Float[Tensor, "windows heads keys head_dim"],
        v: Float[Tensor, "windows heads keys head_dim"],
    ) -> Float[Tensor, "windows heads queries head_dim"]:
        """Let every query gather from all keys of its window."""
        if self.kernel is None:
            return scaled_dot_product_attention(q, k, v)
        with sdpa_kernel(self.kernel):
            return scaled_dot_product_attention(q, k, v)


QkvBias = Literal["qkv", "qv"]


class SelfAttention(nn.Module):
    """MHSA of an expert; with `bias = "qv"` (VideoMAE) the keys have no bias."""

    linear = staticmethod(token_linear)
    """What makes queries, keys and values; the baseline of the benchmark sets torch's own."""

    def __init__(self, dim: int, num_heads: int, *, bias: QkvBias = "qkv") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = expert_linear(dim, 3 * dim, bias=bias == "qkv")
        self.proj = expert_linear(dim, dim)
        self.attend = Attend()
        self.q_bias = nn.Parameter(torch.zeros(dim)) if bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if bias == "qv" else None

    def forward(
        self, tokens: Float[Tensor, "batch sequences tokens dim"], *, num_queries: int | None = None
    ) -> Float[Tensor, "batch sequences queries dim"]:
        """Attend among the tokens of each sequence; `num_queries`: only the first ones ask, all are listened to."""
        weight: Tensor = self.qkv.weight
        bias: Tensor = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        if num_queries is None:
            qkv = self.linear(tokens, weight, bias)
            q, k, v = rearrange(qkv, "b s n (three h e) -> three (b s) h n e", three=3, h=self.num_heads)
        else:
            dim = tokens.shape[-1]
            asking = self.linear(tokens[:, :, :num_queries], weight[:dim], bias[:dim])
            kv = self.linear(tokens, weight[dim:], bias[dim:])
            q = rearrange(asking, "b s n (h e) -> (b s) h n e", h=self.num_heads)
            k, v = rearrange(kv, "b s n (two h e) -> two (b s) h n e", two=2, h=self.num_heads)
        attended = rearrange(self.attend(q, k, v), "(b s) h n e -> b s n (h e)", s=tokens.shape[1])
        projected: Tensor = self.proj(attended)
        return projected


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
        self.attend = Attend()

    def forward(
        self,
        queries: Float[Tensor, "batch query_frames query_patches dim"],
        keys: Float[Tensor, "batch key_frames key_patches dim"],
    ) -> Float[Tensor, "batch query_frames query_patches dim"]:
        """Let every query gather from the keys of its window.

        Windows of time and space need equal numbers of frames. Grids of patches may differ: the finer one is grouped.
        """
        q, k, v = self.projections(queries, keys)
        batch, frames, num_patches, _ = queries.shape
        attended = out_of_windows(
            self.attend(q, k, v),
            self.window,
            batch=batch,
            frames=frames,
            num_places=min(num_patches, keys.shape[2]),
            grouping=self.grouping,
        )
        projected: Tensor = self.proj(attended)
        return projected

    def projections(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, `[windows, heads, tokens, dim / heads]` each."""
        k, v = self.kv(keys).chunk(2, dim=-1)
        num_places = min(queries.shape[2], keys.shape[2])
        q, k, v = (
            into_windows(x, self.window, num_heads=self.num_heads, num_places=num_places, grouping=self.grouping)
            for x in (self.q(queries), k, v)
        )
        return q, k, v
