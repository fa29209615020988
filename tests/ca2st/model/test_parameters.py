import pytest
import torch

from ca2st.model.build import build_model
from ca2st.model.config import AudioVisualConfig, ModelConfig, SpatialTemporalConfig, TargetSpec
from ca2st.model.parameters import (
    RuleMatchesNothingError,
    added_rules,
    count_parameters,
    layer_index,
    no_weight_decay,
    set_trainable,
    set_trainable_by_rules,
)
from ca2st.spec import ClipSpec
from support.models import KINDS, VERB_NOUN, tiny_model


def _full_size(kind, targets, **changes):
    with torch.device("meta"):
        return build_model(ModelConfig(kind=kind, **changes), ClipSpec(), targets)


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


def test_rules_choose_exactly_what_they_name():
    model = tiny_model("cast")
    set_trainable_by_rules(model, {"head": r"head\."})
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"head"}


def test_a_rule_that_names_nothing_is_refused_by_name():
    with pytest.raises(RuleMatchesNothingError, match=r"found none for: time codes \(time_codes"):
        set_trainable_by_rules(tiny_model("cast"), {"head": r"head\.", "time codes": r"time_codes\."})


def test_rules_follow_what_the_configuration_leaves_out():
    apart = SpatialTemporalConfig(last_layers=0)
    assert "bottleneck cross-attention" not in added_rules(ModelConfig(kind="cast", spatial_temporal=apart))
    untimed = AudioVisualConfig(positions="learned")
    assert "time codes" not in added_rules(ModelConfig(kind="cava", audio_spatial=untimed))
    assert "time codes" in added_rules(ModelConfig(kind="cava"))


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
    ],
)
def test_layers_of_parameters_for_layer_wise_decay(name, layer):
    assert layer_index(name) == layer


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_inside_a_layer_has_that_layers_index(kind):
    for name, _ in tiny_model(kind).named_parameters():
        expected = int(name.split("layers.")[1].split(".")[0]) if "layers." in name else None
        assert layer_index(name) == expected or (expected is None and name.startswith("experts."))


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
