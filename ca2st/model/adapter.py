"""The small trained two-layer networks: adapters of layers and heads, and the experts' own MLP and activations."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.functional import silu

from ca2st.model.initial import expert_linear, new_linear, zero_linear

Activation = Literal["gelu", "quick_gelu"]
_QUICK = 1.702


class QuickGELU(nn.Module):
    """CLIP's activation: x * sigmoid(1.702 x)."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply it to every element."""
        if torch.compiler.is_compiling():  # the compiler fuses the formula by itself
            return x * torch.sigmoid(_QUICK * x)
        activated: Tensor = _ScaledSiLU.apply(x)  # type: ignore[no-untyped-call]  # torch's own
        return activated


class _ScaledSiLU(torch.autograd.Function):
    """QuickGELU as silu(1.702 x) / 1.702: keeps x alone for the backward pass, and one new tensor in either pass.

    The formula as it stands keeps two tensors as large as the FFN's hidden layer and makes four.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return silu(_QUICK * x, inplace=True).div_(_QUICK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        scaled = _QUICK * x
        slope: Tensor = torch.ops.aten.silu_backward.grad_input(gradients[0], scaled, grad_input=scaled)
        return slope


ACTIVATIONS: dict[Activation, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}
"""`gelu` is the exact one (erf)."""


class Adapter(nn.Module):
    """down (D -> D/4), activation, up (D/4 -> D); with `skip` the input is added.

    In a layer: the serial adapter after attention has the skip, the parallel one beside the FFN has not.
    """

    def __init__(
        self, dim: int, hidden_dim: int, *, skip: bool = False, activation: Activation = "gelu", zero: bool = True
    ) -> None:
        super().__init__()
        self.skip = skip
        self.down = new_linear(dim, hidden_dim)
        self.activation = ACTIVATIONS[activation]()
        self.up = (zero_linear if zero else new_linear)(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Adapt every token."""
        adapted: Tensor = self.up(self.activation(self.down(x)))
        return x + adapted if self.skip else adapted


class FeedForward(nn.Module):
    """FFN of an expert: D -> 4D -> D."""

    def __init__(self, dim: int, *, activation: Activation) -> None:
        super().__init__()
        self.fc1 = expert_linear(dim, 4 * dim)
        self.activation = ACTIVATIONS[activation]()
        self.fc2 = expert_linear(4 * dim, dim)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Transform every token."""
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out
