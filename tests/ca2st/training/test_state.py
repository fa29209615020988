import json

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from ca2st.training.config import OptimConfig
from ca2st.training.errors import CheckpointMismatchError
from ca2st.training.optim import build_optimizer, set_learning_rate
from ca2st.training.resume import collect_state, put_state, read_state, trained_tensors
from support.tiny_training import TARGETS, TinyModel, tiny_rules


def trained_pair(*, seed: int = 0, num_updates: int = 2) -> tuple[TinyModel, torch.optim.AdamW]:
    model = TinyModel(seed=seed)
    optimizer = build_optimizer(model, OptimConfig(layer_decay=0.5), rules=tiny_rules())
    for _ in range(num_updates):
        set_learning_rate(optimizer, 0.1)
        output = model(torch.ones(2, 3, 2, 4, 4), torch.ones(2, 4, 4), torch.ones(2, 2, 2))
        sum(value.square().sum() for value in output.logits.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_state_goes_into_a_fresh_model_bit_for_bit_and_trains_on_alike() -> None:
    model, optimizer = trained_pair()
    other, other_optimizer = trained_pair(seed=9, num_updates=0)
    files = collect_state(model, optimizer)
    put_state(other, other_optimizer, state=read_state(other, other_optimizer, files=files))
    assert collect_state(other, other_optimizer) == files
    for name, tensor in trained_tensors(model).items():
        assert torch.equal(trained_tensors(other)[name], tensor)
    assert not torch.equal(other.expert.weight, model.expert.weight)


def test_only_trained_parameters_and_their_modules_buffers_are_kept() -> None:
    names = set(trained_tensors(TinyModel()))
    assert {"layers.0.weight", "positions", "norm.count"} <= names
    assert not [name for name in names if name.startswith("expert")]


def test_a_buffer_follows_the_nearest_module_that_has_parameters() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))
            self.register_buffer("scratch", torch.zeros(1), persistent=False)

    frozen = nn.Sequential(nn.Linear(2, 2), Counter()).requires_grad_(False)
    model = nn.ModuleDict({"frozen": frozen, "free": Counter(), "head": nn.Linear(2, 2)})
    assert set(trained_tensors(model)) == {"head.weight", "head.bias", "free.count"}


def test_t10_a_head_of_other_classes_is_refused_and_changes_nothing() -> None:
    model, optimizer = trained_pair()
    files = collect_state(model, optimizer)
    other = TinyModel(classes=TARGETS | {"noun": 9})
    other_optimizer = build_optimizer(other, OptimConfig(layer_decay=0.5), rules=tiny_rules())
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(
        CheckpointMismatchError, match=r"in 2 places:\n  head.noun.bias: expected float32 \[9\], found float32 \[7\]"
    ):
        read_state(other, other_optimizer, files=files)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in before.items())


def test_t10_missing_and_extra_tensors_are_all_listed() -> None:
    model, optimizer = trained_pair()
    files = collect_state(model, optimizer)
    tensors = load(files["model.safetensors"])
    tensors["head.extra.weight"] = tensors.pop("positions")
    with pytest.raises(CheckpointMismatchError) as caught:
        read_state(model, optimizer, files=files | {"model.safetensors": save(tensors)})
    assert "head.extra.weight: in the checkpoint, not trained here" in str(caught.value)
    assert "positions: missing from the checkpoint" in str(caught.value)


def test_an_optimizer_of_other_rules_is_refused() -> None:
    model, optimizer = trained_pair()
    files = collect_state(model, optimizer)
    other = build_optimizer(model, OptimConfig(layer_decay=0.9), rules=tiny_rules())
    with pytest.raises(CheckpointMismatchError, match=r"optimizer groups.1.lr_scale: .* -> "):
        read_state(model, other, files=files)


@pytest.mark.parametrize(("saved_under", "now"), [(1, 1.0), (1.0, 1)])
def test_a_layer_decay_of_1_is_the_same_as_of_1_0(saved_under: float, now: float) -> None:
    model = TinyModel()
    files = collect_state(model, build_optimizer(model, OptimConfig(layer_decay=saved_under), rules=tiny_rules()))
    optimizer = build_optimizer(model, OptimConfig(layer_decay=now), rules=tiny_rules())
    read_state(model, optimizer, files=files)
    assert {str(group["lr_scale"]) for group in optimizer.param_groups} == {"1.0"}


def test_scalars_are_exact_json_and_no_tensor_is_pickled() -> None:
    model, optimizer = trained_pair(num_updates=3)
    files = collect_state(model, optimizer)
    document = json.loads(files["optimizer.json"])
    assert {state["step"] for state in document["state"].values()} == {3.0}
    assert set(files) == {"model.safetensors", "optimizer.safetensors", "optimizer.json"}
