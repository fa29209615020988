"""The baseline must be the same mathematics: what it costs more is then due to how it is computed."""

import pytest
import torch
from torch import nn

from ca2st.benchmark.case import plain_model
from ca2st.errors import CA2STError
from ca2st.model.attention import Attend, SelfAttention, TokenLinear
from ca2st.model.config import SpatialTemporalConfig
from ca2st.model.experts import QuickGELU
from support.models import JOINED_KINDS, inputs_for, tiny_model, wake

WIDE = {"dim": 256, "num_heads": 4}
"""Wide enough for every fast path of ours."""


def _loss_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = model(*inputs_for()).logits["label"]
    (logits * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _wake_gently(model: nn.Module) -> None:
    """No parameter zero, no number so large that rounding alone exceeds the tolerance."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)


def _assert_equal_mathematics(ours: nn.Module) -> None:
    _wake_gently(ours)
    plain = plain_model(ours)
    logits, gradients = _loss_and_gradients(ours)
    plain_logits, plain_gradients = _loss_and_gradients(plain)
    torch.testing.assert_close(logits, plain_logits, atol=1e-4, rtol=1e-4)
    assert gradients.keys() == plain_gradients.keys()
    assert gradients
    for name, gradient in gradients.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(gradient / scale, plain_gradients[name] / scale, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", JOINED_KINDS)
def test_the_baseline_gives_our_outputs_and_our_gradients_from_the_same_state(kind):
    _assert_equal_mathematics(tiny_model(kind, **WIDE))


@pytest.mark.parametrize("window", ["time", "space", "space_time"])
def test_the_baseline_knows_every_window(window):
    settings = SpatialTemporalConfig(t2s_window=window, s2t_window=window)
    _assert_equal_mathematics(tiny_model("cast", spatial_temporal=settings))


@pytest.mark.parametrize("kind", JOINED_KINDS)
def test_nothing_in_the_baseline_is_computed_our_way(kind):
    plain = plain_model(tiny_model(kind))
    assert [name for name, x in plain.named_modules() if isinstance(x, (Attend, TokenLinear, QuickGELU))] == []
    assert {x.linear for x in plain.modules() if isinstance(x, SelfAttention)} == {nn.functional.linear}


def test_the_baseline_has_the_same_state_and_trains_the_same_parameters():
    ours = tiny_model("ca2st")
    plain = plain_model(ours)
    assert {name: tensor.shape for name, tensor in plain.state_dict().items()} == {
        name: tensor.shape for name, tensor in ours.state_dict().items()
    }
    assert {n for n, p in plain.named_parameters() if p.requires_grad} == {
        n for n, p in ours.named_parameters() if p.requires_grad
    }


def test_a_change_of_the_baseline_leaves_our_model_as_it_was():
    ours = tiny_model("cast")
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    wake(plain_model(ours))
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_a_model_without_our_attention_is_refused():
    plain = plain_model(tiny_model("cast"))
    with pytest.raises(CA2STError, match="expected self-attention of ca2st"):
        plain_model(plain)
