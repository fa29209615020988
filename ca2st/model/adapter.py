"""The small trained two-layer networks: adapters of layers and heads, and the experts' own MLP and activations."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ca2st.model.initial import expert_linear, new_linear, zero_linear

Activation = Literal["gelu", "quick_gelu"]


class QuickGELU(nn.Module):
    """CLIP's activation: x * sigmoid(1.702 x)."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply it to every element."""
        return x * torch.sigmoid(1.702 * x)


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
