import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ca2st.training.config import OptimConfig
from ca2st.training.errors import ParameterRuleError
from ca2st.training.optim import build_optimizer, set_learning_rate
from support.processes import python_path
from support.tiny_training import TinyModel, tiny_rules

CONFIG = OptimConfig(layer_decay=0.5, weight_decay=0.05)


def test_every_trained_parameter_is_in_exactly_one_group_and_no_frozen_one() -> None:
    model = TinyModel()
    names = [
        name for group in build_optimizer(model, CONFIG, rules=tiny_rules()).param_groups for name in group["names"]
    ]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert not [name for name in names if name.startswith("expert")]


def test_layers_are_scaled_by_their_depth_and_small_parameters_do_not_decay() -> None:
    groups = build_optimizer(TinyModel(), CONFIG, rules=tiny_rules()).param_groups
    facts = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert facts["layers.0.weight"] == (0.25, 0.05)
    assert facts["layers.1.weight"] == (0.5, 0.05)
    assert facts["layers.1.bias"] == (0.5, 0.0)
    assert facts["head.verb.weight"] == (1.0, 0.05)
    assert facts["norm.weight"] == (1.0, 0.0)
    assert facts["positions"] == (1.0, 0.0)


def test_the_scheduled_rate_reaches_each_group_times_its_factor() -> None:
    optimizer = build_optimizer(TinyModel(), CONFIG, rules=tiny_rules())
    set_learning_rate(optimizer, 0.8)
    assert {group["lr"] for group in optimizer.param_groups} == {0.8, 0.4, 0.2}
    assert isinstance(optimizer, torch.optim.AdamW)


def test_an_unknown_name_without_decay_is_refused() -> None:
    with pytest.raises(ParameterRuleError, match=r"no_weight_decay: .* found \['positons'\]"):
        build_optimizer(TinyModel(), CONFIG, rules=replace(tiny_rules(), no_weight_decay={"positons"}))


def test_layer_decay_without_a_trained_layer_is_refused() -> None:
    with pytest.raises(ParameterRuleError, match=r"layer_decay = 0.5: no trained parameter belongs to a layer"):
        build_optimizer(TinyModel(), CONFIG, rules=replace(tiny_rules(), layer_index=lambda name: None))


def test_a_layer_beyond_the_depth_is_refused() -> None:
    with pytest.raises(ParameterRuleError, match=r"layer of layers.1.weight: expected 0..0, found 1"):
        build_optimizer(TinyModel(), CONFIG, rules=replace(tiny_rules(), num_layers=1))


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ParameterRuleError, match="trained parameters: expected some, found none"):
        build_optimizer(TinyModel().requires_grad_(False), CONFIG, rules=tiny_rules())


def test_decay_rules_that_match_nothing_are_refused() -> None:
    model = TinyModel().requires_grad_(False)
    model.norm.requires_grad_(True)
    with pytest.raises(ParameterRuleError, match=r"weight_decay = 0\.05 applies to none of 2 parameters"):
        build_optimizer(model, replace(CONFIG, layer_decay=1.0), rules=tiny_rules())
    model = TinyModel().requires_grad_(False)
    model.layers[0].weight.requires_grad_(True)
    with pytest.raises(ParameterRuleError, match="no decay for 1-D parameters, biases and position tables"):
        build_optimizer(model, CONFIG, rules=tiny_rules())


def test_a_training_in_one_process_imports_neither_torchs_compiler_nor_what_shards_models(tmp_path: Path) -> None:
    """They take longer to import than torch; Accelerate and torch load them to ask whether they are used."""
    program = """
import sys
from pathlib import Path

from ca2st.training.loop import train
from support.tiny_training import TinyEvaluation, TinyModel, TinySource, fresh_accelerator, tiny_settings

settings = tiny_settings(Path(sys.argv[1]), max_steps=2)
accelerator = fresh_accelerator(settings)
train(TinyModel(), TinySource(), accelerator=accelerator, settings=settings, validation=TinyEvaluation())
print([name for name in ("torch._dynamo", "torch.distributed.fsdp", "sympy") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, env={"PYTHONPATH": python_path()}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "journal.jsonl").read_text().count('"event":"step"') == 2
