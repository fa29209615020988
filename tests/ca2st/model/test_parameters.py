import re

import pytest
import torch

from ca2st.errors import UserInputError
from ca2st.model.config import AudioVisualConfig, ModelConfig, SpatialTemporalConfig, TargetSpec
from ca2st.model.network import (
    RuleMatchesNothingError,
    added_rules,
    build_model,
    count_parameters,
    layer_index,
    no_weight_decay,
    set_trainable,
)
from ca2st.spec import ClipSpec
from support.models import KINDS, ONE_TARGET, VERB_NOUN, inputs_for, tiny_model


def _full_size(kind, targets, **changes):
    with torch.device("meta"):
        return build_model(ModelConfig(kind=kind, **changes), ClipSpec(), targets)


def _trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _classes(num_classes):
    return (TargetSpec(name="label", num_classes=num_classes),)


@pytest.mark.parametrize(
    ("kind", "targets", "trainable"),
    [
        ("cast", _classes(400), 45_378_832),
        ("cast", _classes(174), 45_205_038),
        ("cast", VERB_NOUN, 44_784_781),
        ("cava", _classes(400), 44_092_432),
        ("ca2st", _classes(400), 62_249_296),
        ("ca2st", VERB_NOUN, 62_542_861),
    ],
)
def test_trainable_parameters_equal_the_published_counts_to_the_unit(kind, targets, trainable):
    assert count_parameters(_full_size(kind, targets)).trainable == trainable


def test_the_experts_have_the_sizes_of_their_public_encoders():
    sizes = {
        "spatial": 85_799_424,  # CLIP ViT-B/16 visual without its output projection
        "temporal": 86_227_200,  # VideoMAE ViT-B encoder
        "audio": 85_615_872,  # AST-B with the 12 x 39 positions of 400 rows
    }
    model = _full_size("ca2st", _classes(400))
    assert {name: count_parameters(expert).total for name, expert in model.experts.items()} == sizes


def test_the_published_set_is_trained_and_the_experts_are_frozen():
    model = tiny_model("ca2st")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    own = {name for name, _ in model.named_parameters() if name.startswith("experts.")}
    norms = {f"experts.{e}.norm.{kind}" for e in ("spatial", "temporal") for kind in ("weight", "bias")}
    assert frozen == own - norms


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapters", [True, False])
def test_every_rule_of_the_published_set_names_something_in_every_kind(kind, adapters):
    model = tiny_model(kind, adapters=adapters)
    set_trainable(model, "added")
    assert count_parameters(model).trainable < count_parameters(model).total


def test_all_makes_everything_learn_and_added_takes_it_back():
    model = tiny_model("cava")
    before = count_parameters(model)
    set_trainable(model, "all")
    assert count_parameters(model).trainable == before.total
    set_trainable(model, "added")
    assert count_parameters(model) == before


def test_the_head_is_its_classifiers_and_last_adapters():
    model = tiny_model("ca2st", targets=VERB_NOUN)
    set_trainable(model, "head")
    assert _trained(model) == {name for name, _ in model.named_parameters() if name.startswith("head.")}
    assert any(name.startswith("head.adapters.") for name in _trained(model))


def test_adapters_are_those_of_the_layers_and_the_head():
    model = tiny_model("cast")
    set_trainable(model, "adapters")
    assert {name.split(".")[2] if name.startswith("layers") else "head" for name in _trained(model)} == {
        "adapters",
        "head",
    }


def test_patterns_fit_whole_names_and_an_expert_may_learn_in_part():
    model = tiny_model("cast")
    set_trainable(model, ["head.*", "experts.temporal.layers.1.*", "layers.*.adapters.spatial.serial.*"])
    assert "experts.temporal.layers.1.mlp.fc1.weight" in _trained(model)
    assert "layers.0.adapters.spatial.serial.up.bias" in _trained(model)
    assert not [name for name in _trained(model) if "layers.0.mlp" in name or ".parallel." in name]
    with pytest.raises(RuleMatchesNothingError, match="found none for: head "):
        set_trainable(model, ["head"])


def test_a_pattern_that_names_nothing_is_refused_with_the_nearest_names():
    with pytest.raises(
        RuleMatchesNothingError, match=r"found none for: head\.classifer\.\* \(nearest names: head\.classifiers\."
    ) as caught:
        set_trainable(tiny_model("cast"), ["head.*", "head.classifer.*"])
    assert isinstance(caught.value, UserInputError)


def test_adapters_are_refused_where_there_are_none():
    with pytest.raises(RuleMatchesNothingError, match=r"found none for: adapters \(layers\.\*\.adapters\.\*\)"):
        set_trainable(tiny_model("spatial", adapters=False), "adapters")


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("heads", r"trainable: expected one of added, head, adapters, all or a list .*did you mean 'head'"),
        ((), "trainable: expected at least one pattern"),
    ],
)
def test_what_names_no_set_is_refused(which, message):
    with pytest.raises(UserInputError, match=message):
        set_trainable(tiny_model("cast"), which)


def test_an_expert_without_a_final_norm_has_no_rule_for_one():
    model = tiny_model("cast", spatial_encoder="resnet50", depth=4)
    rules = added_rules(model)
    assert "final norm of the temporal expert" in rules
    assert "final norm of the spatial expert" not in rules
    assert not [name for name in _trained(model) if name.startswith("experts.spatial.")]


@pytest.mark.parametrize("fusion", ["lateral", "late_add", "late_concat", "independent"])
@pytest.mark.parametrize("encoders", [("clip", "clip"), ("videomae", "videomae"), ("resnet50", "videomae")])
def test_every_baseline_and_pair_of_experts_has_a_published_set(fusion, encoders):
    targets = VERB_NOUN if fusion == "independent" else ONE_TARGET
    spatial, temporal = encoders
    model = tiny_model(
        "cast", fusion=fusion, spatial_encoder=spatial, temporal_encoder=temporal, depth=4, targets=targets
    )
    own = {name for name in _trained(model) if name.startswith("experts.")}
    assert own == {name for name, _ in model.named_parameters() if re.match(r"experts\.\w+\.norm\.", name)}
    assert any(name.startswith("layers.") for name in _trained(model))


@pytest.mark.parametrize("which", ["added", "head", "adapters", "all"])
@pytest.mark.parametrize("kind", ["cast", "cava", "ca2st"])
def test_whatever_is_trained_gets_a_gradient_and_nothing_else_a_buffer_for_one(kind, which):
    """Directions of the last layer that reach no output too: DistributedDataParallel waits for every gradient."""
    model = tiny_model(kind).train()
    set_trainable(model, which)
    model(*inputs_for()).logits["label"].sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_a_rule_of_a_set_that_names_nothing_is_refused_with_its_patterns():
    model = tiny_model("cast", fusion="independent", adapters=False, targets=VERB_NOUN)
    with pytest.raises(RuleMatchesNothingError, match=r"found none for: adapters \(.*adapters\.\*.*\) \(nearest"):
        set_trainable(model, "adapters")


def test_a_rule_that_names_nothing_changes_nothing():
    model = tiny_model("cast")
    before = _trained(model)
    with pytest.raises(RuleMatchesNothingError):
        set_trainable(model, ["head.*", "layers.9.*"])
    assert _trained(model) == before


def test_rules_follow_what_the_configuration_leaves_out():
    apart = SpatialTemporalConfig(last_layers=0)
    assert "bottleneck cross-attention" not in added_rules(tiny_model("cast", spatial_temporal=apart))
    untimed = AudioVisualConfig(positions="learned")
    assert "time codes" not in added_rules(tiny_model("cava", audio_spatial=untimed))
    assert "time codes" in added_rules(tiny_model("cava"))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("layers.7.bridges.spatial_temporal.directions.t2s.attention.q.weight", 7),
        ("layers.11.adapters.audio.serial.down.bias", 11),
        ("experts.temporal.layers.3.mlp.fc1.weight", 3),
        ("experts.spatial.patch_embed.weight", 0),
        ("experts.spatial.norm_pre.weight", 0),
        ("experts.audio.distillation_token", 0),
        ("experts.spatial.norm.weight", None),
        ("time_codes.video.0.weight", None),
        ("head.adapters.spatial.down.weight", None),
        ("head.classifiers.verb.weight", None),
        ("experts.spatial.stem.conv.weight", 0),
        ("experts.spatial.stages.0.2.conv3.weight", 2),
        ("experts.spatial.stages.3.0.downsample.0.weight", 11),
    ],
)
def test_layers_of_parameters_for_layer_wise_decay(name, layer):
    assert layer_index(name, depth=12) == layer


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_inside_a_layer_has_that_layers_index(kind):
    for name, _ in tiny_model(kind).named_parameters():
        expected = int(name.split("layers.")[1].split(".")[0]) if "layers." in name else None
        assert layer_index(name, depth=2) == expected or (expected is None and name.startswith("experts."))


def test_every_parameter_of_a_resnet_belongs_to_a_layer():
    model = tiny_model("cast", spatial_encoder="resnet50", depth=8)
    layers = {
        name: layer_index(name, depth=8)
        for name, _ in model.experts["spatial"].named_parameters(prefix="experts.spatial")
    }
    assert set(layers.values()) == {0, 1, 3, 5, 7}


def test_tables_biases_and_norms_are_spared_weight_decay_and_matrices_are_not():
    model = tiny_model("ca2st", audio_spatial=AudioVisualConfig(positions="learned"))
    spared = no_weight_decay(model)
    parameters = dict(model.named_parameters())
    assert {n for n in parameters if n.endswith(("_table", ".positions", "_token"))} <= spared
    assert {n for n, p in parameters.items() if p.ndim == 1} <= spared
    decayed = set(parameters) - spared
    assert all(name.endswith(".weight") and parameters[name].ndim >= 2 for name in decayed)
    assert "experts.spatial.positions" in spared
    assert "layers.0.bridges.spatial_temporal.directions.t2s.attention.q.weight" in decayed
