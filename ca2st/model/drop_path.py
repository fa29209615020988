"""Stochastic depth: a residual is dropped for whole clips at a time."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class DropPath(nn.Module):
    """In training, set the residual of a clip to zero with probability `rate` and scale the kept ones by 1/(1-rate).

    Draws come from torch's own generator, which the training loop seeds for every micro-batch. The rate is a buffer, so
    that a compiled layer serves all layers instead of being compiled anew for every rate.
    """

    keep: Float[Tensor, ""]

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.register_buffer("keep", torch.tensor(1 - rate, dtype=torch.float32), persistent=False)

    def forward(self, residual: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        """Drop or scale; the identity in evaluation."""
        if not self.training:
            return residual
        shape = (residual.shape[0],) + (1,) * (residual.ndim - 1)
        kept = torch.rand(shape, device=residual.device) < self.keep
        return residual * (kept / self.keep).to(residual.dtype)


def drop_path(rate: float) -> nn.Module:
    """A `DropPath`, or the identity at rate 0."""
    return DropPath(rate) if rate > 0 else nn.Identity()
