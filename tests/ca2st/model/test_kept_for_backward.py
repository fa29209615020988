"""What autograd keeps: nothing before the first trained parameter, and no input of a frozen Linear."""

from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ca2st.model.attention import SelfAttention
from ca2st.model.config import ModelConfig
from ca2st.model.network import HolisticModel, build_model, hold_experts, set_trainable
from support.models import JOINED_KINDS, KINDS, ONE_TARGET, TINY_CLIP, expert_inputs, inputs_for, tiny_model


def _kept_by_module(model: HolisticModel) -> dict[str, list[Tensor]]:
    """Tensors kept in a training pass, by each module in whose forward call they were."""
    running: list[str] = []
    kept: dict[str, list[Tensor]] = defaultdict(list)

    def keep(tensor: Tensor) -> Tensor:
        for name in running:
            kept[name].append(tensor)
        return tensor

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(*inputs_for())
    for hook in hooks:
        hook.remove()
    return kept


def _activations(model: nn.Module, kept: list[Tensor]) -> int:
    """Elements of the storages of `kept` that are not the model's own."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // x.element_size() for x in kept}
    return sum(size for pointer, size in storages.items() if pointer not in own)


@pytest.mark.parametrize("kind", [*KINDS, "cast with resnet50"])
def test_nothing_of_the_embeddings_is_kept(kind):
    resnet = {"spatial_encoder": "resnet50", "depth": 4} if "resnet" in kind else {}
    model = tiny_model(kind.split()[0], **resnet).train()
    for expert in model.experts.values():
        kept: list[Tensor] = []
        with saved_tensors_hooks(lambda tensor, kept=kept: kept.append(tensor) or tensor, lambda tensor: tensor):
            tokens = expert.embed(expert_inputs())
        assert not kept
        assert not tokens.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_first_frozen_attention_is_kept(kind):
    model = tiny_model(kind)
    parts = [f"experts.{name}.layers.0.{part}" for name in model.experts for part in ("norm1", "attention")]
    kept = _kept_by_module(model)
    assert all(not kept[part] for part in parts)
    set_trainable(model, "all")
    kept = _kept_by_module(model)
    assert all(kept[part] for part in parts)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dim", [32, 192], ids=["torch", "onednn"])
@pytest.mark.parametrize("kind", JOINED_KINDS)
def test_frozen_linears_keep_no_input(kind, dim, precision):
    model = build_model(ModelConfig(kind=kind, dim=dim, depth=2, num_heads=2), TINY_CLIP, ONE_TARGET)
    if precision == "bf16":
        hold_experts(model, "bf16")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        kept = _kept_by_module(model)
    linears = [n for n, m in model.experts.named_modules(prefix="experts") if isinstance(m, nn.Linear)]
    assert any(kept[name] for name in linears)  # the weight, for the gradient of the tokens
    for name in linears:
        assert _activations(model, kept[name]) == 0, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", JOINED_KINDS)
def test_frozen_attention_keeps_queries_keys_values_and_their_sum_alone(kind, precision):
    model, rows = tiny_model(kind), {}
    if precision == "bf16":
        hold_experts(model, "bf16")
    attentions = {n: m for n, m in model.experts.named_modules(prefix="experts") if isinstance(m, SelfAttention)}
    for name, module in attentions.items():
        module.register_forward_pre_hook(lambda _, args, name=name: rows.update({name: args[0].shape}))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        kept = _kept_by_module(model)
    for name in attentions:
        num_rows, dim = rows[name][:-1].numel(), rows[name][-1]
        assert _activations(model, kept[name]) <= num_rows * (4 * dim + 2), name
