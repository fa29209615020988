"""Frozen experts in bfloat16: half the bytes, the same products, and everything that is trained in float32."""

import pytest
import torch

from ca2st.errors import UserInputError
from ca2st.model.network import held_precision, hold_experts, set_trainable
from support.models import KINDS, inputs_for, tiny_model, wake

WEIGHTS = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)


def _pair(kind, **changes):
    """The same model twice, the second with its experts in bfloat16."""
    models = [tiny_model(kind, **changes) for _ in range(2)]
    for model in models:
        wake(model.layers)
        wake(model.head)
    hold_experts(models[1], "bf16")
    return models


def _expert_bytes(model):
    return sum(
        parameter.nbytes
        for expert in model.experts.values()
        for module in expert.modules()
        if isinstance(module, WEIGHTS)
        for parameter in module.parameters(recurse=False)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_of_experts_take_half_the_bytes_and_nothing_else_changes(kind):
    plain, held = _pair(kind)
    assert _expert_bytes(held) * 2 == _expert_bytes(plain)
    for name, parameter in held.named_parameters():
        is_weight = isinstance(held.get_submodule(name.rpartition(".")[0]), WEIGHTS)
        expected = torch.bfloat16 if name.startswith("experts.") and is_weight else torch.float32
        assert parameter.dtype == expected, name
    assert {n: b.dtype for n, b in held.named_buffers()} == {n: b.dtype for n, b in plain.named_buffers()}


@pytest.mark.parametrize("changes", [{}, {"spatial_encoder": "resnet50", "depth": 4}], ids=["clip", "resnet50"])
def test_under_autocast_the_outputs_are_those_of_float32_weights_bit_for_bit(changes):
    plain, held = _pair("cast" if changes else "ca2st", **changes)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = plain(*inputs_for()), held(*inputs_for())
    assert torch.equal(found.logits["label"], expected.logits["label"])
    assert all(torch.equal(found.features[name], feature) for name, feature in expected.features.items())
    exact = plain(*inputs_for()).logits["label"]
    assert not torch.equal(expected.logits["label"].float(), exact)


def test_gradients_and_optimizer_are_float32_and_equal_those_of_float32_experts():
    gradients = []
    for model in _pair("ca2st"):
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.train()(*inputs_for()).logits["label"].float().square().sum()
        loss.backward()
        optimizer.step()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}
        assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}
        gradients.append(found)
    plain, held = gradients
    assert all(torch.equal(held[name], gradient) for name, gradient in plain.items())


def test_what_an_expert_trains_stays_float32():
    model = tiny_model("cast")
    set_trainable(model, ["head.*", "experts.temporal.layers.1.*"])
    hold_experts(model, "bf16")
    assert model.experts["temporal"].layers[1].mlp.fc1.weight.dtype == torch.float32
    assert model.experts["temporal"].layers[0].mlp.fc1.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wanted", "training", "device", "held"),
    [
        ("auto", "bf16", "cuda", "bf16"),
        ("auto", "fp32", "cuda", "fp32"),
        ("auto", "bf16", "cpu", "fp32"),
        ("fp32", "bf16", "cuda", "fp32"),
        ("bf16", "bf16", "cpu", "bf16"),
    ],
)
def test_auto_holds_experts_in_bfloat16_on_a_gpu_that_trains_in_it(wanted, training, device, held):
    assert held_precision(wanted, training=training, device=device) == held


def test_bfloat16_experts_beside_float32_training_are_refused_with_the_mend():
    with pytest.raises(UserInputError, match=r'set training\.precision = "bf16", or experts\.precision = "auto"'):
        held_precision("bf16", training="fp32", device="cuda")
