"""Linear over tokens by oneDNN's matrix product, where that is the faster of the two a processor build of torch has.

torch gives a float32 Linear on a processor to MKL. The same product by oneDNN takes a fifth to a third less time on
processors that MKL has no best path for, in the forward pass and for the gradient of the tokens; where both are equally
good nothing is lost. `torch.compile` chooses for itself and gets the plain Linear.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.functional import linear

_HAS_ONEDNN = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]  # torch's own
_SMALLEST_WEIGHT = 128 * 128
"""Below this many weights what is gained is lost again in the call."""


class TokenLinear(nn.Linear):
    """nn.Linear in state and result; only the way to the result differs."""

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's own name
        """Transform the last axis."""
        return token_linear(input, self.weight, self.bias)


def token_linear(
    tokens: Float[Tensor, "*places in_dim"],
    weight: Float[Tensor, "out_dim in_dim"],
    bias: Float[Tensor, " out_dim"] | None,
) -> Float[Tensor, "*places out_dim"]:
    """`tokens @ weight.T + bias`."""
    if not _pays(tokens, weight):
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


def _pays(tokens: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and tokens.device.type == "cpu"
        and tokens.dtype == weight.dtype == torch.float32
        and tokens.ndim > 2
        and weight.numel() >= _SMALLEST_WEIGHT
        and not torch.is_autocast_enabled("cpu")
        and _HAS_ONEDNN
    )
