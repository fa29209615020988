import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ca2st.model.attention import TokenLinear, token_linear
from ca2st.model.experts import QuickGELU

IN, OUT = 192, 160


def _saved(run) -> list[tuple[int, ...]]:
    """Shapes of the tensors that the graph of `run` keeps for its backward pass."""
    shapes: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return shapes


def _gradients(function, tokens: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in (tokens, weight, bias) if x is not None]
    out = function(*leaves, *([None] if bias is None else []))
    (out * torch.linspace(-1, 1, OUT)).sum().backward()
    return out, *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 5, IN), (7, 4, IN)])
def test_it_equals_torchs_linear_in_output_and_gradients(shape, has_bias):
    generator = torch.Generator().manual_seed(0)
    tokens, weight, bias = (torch.randn(size, generator=generator) for size in (shape, (OUT, IN), (OUT,)))
    used_bias = bias if has_bias else None
    found, expected = (_gradients(f, tokens, weight, used_bias) for f in (token_linear, linear))
    assert "OneDNN" in type(found[0].grad_fn).__name__
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_tokens_and_gradients_may_lie_in_any_order():
    tokens = torch.randn(2, 5, 3, IN).transpose(1, 2)
    layer = TokenLinear(IN, OUT)
    out = layer(tokens.requires_grad_())
    out.sum().backward()  # the gradient is one number, expanded
    torch.testing.assert_close(out, linear(tokens, layer.weight, layer.bias), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(layer.bias.grad, torch.full((OUT,), 30.0))


def test_a_frozen_weight_keeps_no_tokens_for_the_backward_pass():
    tokens = torch.randn(1, 2, 3, IN, requires_grad=True)
    layer = TokenLinear(IN, OUT)
    assert tuple(tokens.shape) in _saved(lambda: layer(tokens))
    layer.requires_grad_(False)
    assert _saved(lambda: layer(tokens)) == [(OUT, IN)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_go_to_torchs_linear(dtype):
    tokens, layer = torch.randn(1, 2, 3, IN, dtype=dtype), TokenLinear(IN, OUT).to(dtype)
    assert torch.equal(layer(tokens), linear(tokens, layer.weight, layer.bias))


def test_autocast_decides_the_type_as_it_does_for_torchs_linear():
    tokens, layer = torch.randn(1, 2, 3, IN), TokenLinear(IN, OUT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(tokens).dtype == torch.bfloat16


def test_its_state_is_that_of_a_linear():
    layer = TokenLinear(IN, OUT)
    layer.load_state_dict(nn.Linear(IN, OUT).state_dict())
    assert isinstance(layer, nn.Linear)


def test_quick_gelu_equals_its_formula_in_value_and_slope():
    x = torch.linspace(-12, 12, 4001, requires_grad=True)
    found, expected = QuickGELU()(x), x * torch.sigmoid(1.702 * x)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    (slope,) = torch.autograd.grad(found.sum(), x)
    (expected_slope,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(slope, expected_slope, atol=1e-6, rtol=1e-6)


def test_quick_gelu_keeps_its_input_alone_for_the_backward_pass():
    x = torch.randn(3, 5, requires_grad=True)
    assert _saved(lambda: QuickGELU()(x)) == [(3, 5)]
    assert len(_saved(lambda: x * torch.sigmoid(1.702 * x))) > 1
