"""What the last layer leaves out reaches no output: logits, gradients and a training stay as they are with all of it.

Every comparison is between a model that computes the whole last layer and one that does not, with equal parameters.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ca2st.model.config import AudioVisualConfig, ModelConfig, SpatialTemporalConfig
from ca2st.model.inspect import model_info
from ca2st.model.network import HolisticModel, layer_index, no_weight_decay, set_trainable, whole_last_layer
from ca2st.spec import ClipSpec
from ca2st.training.config import OptimConfig
from ca2st.training.optim import ParameterRules, build_optimizer, set_learning_rate
from support.models import KINDS, ONE_TARGET, TINY_CLIP, VERB_NOUN, inputs_for, tiny_config, tiny_model

ONE_WAY = {
    "spatial_temporal": SpatialTemporalConfig(directions="t2s"),
    "audio_spatial": AudioVisualConfig(directions="from_audio"),
    "audio_temporal": AudioVisualConfig(directions="to_audio"),
}
SWITCHES = {
    "published": {},
    "parallel": {"combination": "parallel"},
    "own bottlenecks": {"shared_bottleneck": False},
    "one way": ONE_WAY,
    "lateral": {"fusion": "lateral"},
    "no adapters": {"adapters": False},
    "dropped paths": {"drop_path_rate": 0.5},
}


def _wake_gently(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def _pass(model: HolisticModel, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | None]]:
    """Logits and the gradient of every parameter, with the DropPath draws of `seed`."""
    torch.manual_seed(seed)
    model.zero_grad()
    logits = model(*inputs_for(seed=seed)).logits
    sum(x.square().mean() for x in logits.values()).backward()
    return logits, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("targets", [ONE_TARGET, VERB_NOUN], ids=["label", "verb and noun"])
@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_the_whole_layer(kind, switches, targets):
    model = tiny_model(kind, targets=targets, **SWITCHES[switches]).train()
    _wake_gently(model)
    with whole_last_layer(model):
        logits, gradients = _pass(model)
    found, found_gradients = _pass(model)
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert found_gradients[name] is None, name
            continue
        expected = gradients[name]
        if expected is None:  # the whole layer does not reach it either
            assert found_gradients[name] is None or not found_gradients[name].any(), name
            continue
        assert found_gradients[name] is not None, name
        torch.testing.assert_close(found_gradients[name], expected, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_with_every_weight_trained_the_gradients_are_those_of_the_whole_layer(kind):
    model = tiny_model(kind).train()
    _wake_gently(model)
    set_trainable(model, "all")
    with whole_last_layer(model):
        _, gradients = _pass(model)
    _, found = _pass(model)
    assert {n for n, g in found.items() if g is None} == {n for n, g in gradients.items() if g is None}
    for name, expected in gradients.items():
        if expected is not None:
            torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4, msg=name)


def _train(model: nn.Module, plain: HolisticModel, num_steps: int) -> None:
    """Train as a recipe would: AdamW with weight decay, which also shrinks what gets a gradient of zero."""
    rules = ParameterRules(
        layer_index=partial(layer_index, depth=plain.config.depth),
        num_layers=plain.config.depth,
        no_weight_decay=no_weight_decay(plain),
    )
    optimizer = build_optimizer(plain, OptimConfig(weight_decay=0.05), rules=rules)
    set_learning_rate(optimizer, 1e-3)
    for step in range(num_steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(*inputs_for(seed=step)).logits["label"].square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_four_steps_of_training_end_in_the_parameters_of_the_whole_layer(kind):
    model = tiny_model(kind).train()
    _wake_gently(model)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    reference = copy.deepcopy(model)
    with whole_last_layer(reference):
        _train(reference, reference, 4)
    _train(model, model, 4)
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=2e-4, rtol=1e-3, msg=name)
    last = f"layers.{model.config.depth - 1}.bridges."
    idle = [n for n, p in model.named_parameters() if n.startswith(last) and n.endswith("weight") and p.ndim > 1]
    assert all(not torch.equal(dict(model.named_parameters())[name], start[name]) for name in idle)


def test_data_parallel_training_waits_for_no_parameter_that_reaches_no_output(tmp_path: Path):
    """DistributedDataParallel ends with an error where a parameter got no gradient, at any number of processes."""
    model, alone = tiny_model("cava").train(), tiny_model("cava").train()
    for one in (model, alone):
        _wake_gently(one)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        _train(DistributedDataParallel(model), model, 3)
    finally:
        torch.distributed.destroy_process_group()
    with whole_last_layer(alone):
        _train(alone, alone, 3)
    expected = dict(alone.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=2e-4, rtol=1e-3, msg=name)


def _of_one_row(dim: int) -> float:
    """Multiply-adds of a patch that the last layer leaves out: FFN and parallel adapter of ratio 1/4."""
    return dim * dim * (8 + 2 / 4)


HAND_COUNTED: dict[str, Callable[[], float]] = {
    # T2S: 1568 queries, down is needed for S2T; q, proj and kv of ratio 1/2, scores with 8 keys, and up.
    "cast": lambda: 1568 * (_of_one_row(768) + (1 + 1 + 2) * 384**2 + 2 * 8 * 384 + 384 * 768),
}


@pytest.mark.parametrize("kind", HAND_COUNTED)
def test_what_is_left_out_is_what_a_count_by_hand_says(kind):
    info = model_info(ModelConfig(kind=kind, depth=1), ClipSpec(), ONE_TARGET)
    assert (info.gmacs - info.computed_gmacs) * 1e9 == pytest.approx(HAND_COUNTED[kind](), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_experts_that_are_pooled_by_a_prefix_save_anything(kind):
    info = model_info(tiny_config(kind), TINY_CLIP, ONE_TARGET)
    assert (info.computed_gmacs < info.gmacs) == (kind != "temporal")
