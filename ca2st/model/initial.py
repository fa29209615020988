"""How weights start.

Everything that is added to the experts starts as published: Linear trunc-normal with standard deviation 0.02 and bias
0; the second Linear of every layer adapter and every `up` of B-CA starts at zero, so that at step 0 each expert gives
exactly its own features. An expert that is to be trained from nothing starts by Glorot's rule, whose scale follows the
width: a constant 0.02 would stall the small experts of the demo.
"""

import torch
from torch import nn

from ca2st.model.token_linear import TokenLinear

STANDARD_DEVIATION = 0.02


def new_linear(num_in: int, num_out: int) -> nn.Linear:
    """A Linear that starts trunc-normal (0.02) with bias 0."""
    linear = TokenLinear(num_in, num_out)
    nn.init.trunc_normal_(linear.weight, std=STANDARD_DEVIATION)
    nn.init.zeros_(linear.bias)
    return linear


def zero_linear(num_in: int, num_out: int) -> nn.Linear:
    """A Linear that starts at zero: what follows a residual adds nothing at step 0."""
    linear = TokenLinear(num_in, num_out)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def expert_linear(num_in: int, num_out: int, *, bias: bool = True) -> nn.Linear:
    """A Linear of an expert, started by Glorot's rule with bias 0."""
    linear = TokenLinear(num_in, num_out, bias=bias)
    nn.init.xavier_uniform_(linear.weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def start_patch_embedding(convolution: nn.Conv2d | nn.Conv3d) -> None:
    """Start a patch embedding like the Linear it is: one row of weights a patch."""
    nn.init.xavier_uniform_(convolution.weight.data.flatten(1))
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)


def new_table(*shape: int, standard_deviation: float = STANDARD_DEVIATION) -> nn.Parameter:
    """A learned token or position table that starts normal."""
    return nn.Parameter(nn.init.normal_(torch.empty(*shape), std=standard_deviation))
