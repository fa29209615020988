import dataclasses
import inspect
import subprocess
import sys

import jaxtyping
import pytest
import torch

from ca2st.errors import UserInputError
from ca2st.model.config import (
    AudioVisualConfig,
    ModelConfig,
    SpatialTemporalConfig,
    TargetSpec,
    bridges_of_layer,
    check_clip,
    check_targets,
)
from ca2st.spec import ClipSpec
from support.models import tiny_config, tiny_model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "cats"}, r"kind: expected one of cast, .*found 'cats' \(did you mean 'cast'\?\)"),
        ({"combination": "both"}, "combination: expected one of sequential, parallel"),
        ({"time_code_layout": "aligne"}, "did you mean 'aligned'"),
        ({"depth": 0}, "depth: expected at least 1, found 0"),
        ({"dim": 30, "num_heads": 4}, r"dim: expected a multiple of num_heads \(4\), at least 4, found 30"),
        ({"bottleneck_ratio": 0.01}, r"dim \* bottleneck_ratio: expected a multiple of num_heads \(12\).*found 7.68"),
        ({"adapter_ratio": 0.3}, r"dim \* adapter_ratio: expected a whole number, at least 1, found 230.4"),
        ({"drop_path_rate": 1.0}, "drop_path_rate: expected 0 <= rate < 1, found 1.0"),
        ({"drop_path_rate": -0.1}, "drop_path_rate"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_by_name(changes, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the hook would refuse first
    with pytest.raises(UserInputError, match=message):
        ModelConfig(**changes)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (SpatialTemporalConfig, {"t2s_window": "tim"}, r"spatial_temporal.t2s_window: .*did you mean 'time'"),
        (SpatialTemporalConfig, {"s2t_window": "frame"}, "s2t_window: expected one of time, space, space_time"),
        (SpatialTemporalConfig, {"directions": "s2s"}, "directions: expected one of both, t2s, s2t"),
        (SpatialTemporalConfig, {"positions": "fixed"}, "positions: expected one of learned, time_codes, none"),
        (SpatialTemporalConfig, {"layers": (0, 2)}, r"spatial_temporal.layers: expected different layers from 1 on"),
        (SpatialTemporalConfig, {"layers": ()}, r"expected different layers from 1 on, found \[\]"),
        (
            SpatialTemporalConfig,
            {"layers": (2,), "last_layers": 1},
            "expected either layers or last_layers, found both",
        ),
        (SpatialTemporalConfig, {"last_layers": -1}, "last_layers: expected a number of layers >= 0"),
        (AudioVisualConfig, {"directions": "t2s"}, "directions: expected one of both, from_audio, to_audio"),
        (AudioVisualConfig, {"positions": "fixed"}, "positions: expected one of learned, time_codes, none"),
        (AudioVisualConfig, {"last_layers": "some"}, "last_layers: expected a number of layers >= 0, 'all' or"),
    ],
)
def test_a_cross_attention_that_cannot_be_built_is_refused_by_name(config, changes, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the hook would refuse first
    with pytest.raises(UserInputError, match=message):
        config(**changes)


def test_a_crop_that_patches_cannot_tile_is_refused_with_sizes_that_fit():
    with pytest.raises(
        UserInputError, match=r"crop_size: expected a multiple of the patch size 16, found 100; .*96 or 112"
    ):
        check_clip(ModelConfig(), ClipSpec(crop_size=100))


def test_a_spectrogram_smaller_than_a_patch_is_refused():
    with pytest.raises(UserInputError, match="mel_rows: expected at least one patch of 32, found 16"):
        check_clip(ModelConfig(patch_size=32), ClipSpec(mel_rows=16, crop_size=64))


@pytest.mark.parametrize("names", [(), ("verb", "verb")])
def test_no_targets_or_a_target_twice_is_refused(names):
    with pytest.raises(UserInputError, match="targets: expected at least one, each with its own name"):
        check_targets([TargetSpec(name=name, num_classes=2) for name in names])


def test_a_target_without_classes_or_with_a_dotted_name_is_refused():
    with pytest.raises(UserInputError, match="target 'verb': expected at least one class, found 0"):
        TargetSpec(name="verb", num_classes=0)
    with pytest.raises(UserInputError, match=r"target 'a\.b'"):
        TargetSpec(name="a.b", num_classes=2)


def test_drop_path_rises_linearly_from_zero_to_the_configured_rate():
    layers = tiny_model("cast", depth=5, drop_path_rate=0.2).layers
    assert [1 - layer.drop_update.keep.item() for layer in layers[1:]] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    for first in (layers[0], tiny_model("cast", depth=1, drop_path_rate=0.2).layers[0]):
        assert isinstance(first.drop_update, torch.nn.Identity)


def test_widths_of_vit_base_are_the_published_ones():
    assert (ModelConfig().bottleneck_dim, ModelConfig().adapter_dim) == (384, 192)


def _layers_with(config: ModelConfig, bridge: str) -> list[int]:
    return [i for i in range(config.depth) if bridge in {b.name for b in bridges_of_layer(config, i)}]


@pytest.mark.parametrize(
    ("kind", "bridge", "layers"),
    [
        ("cast", "spatial_temporal", range(12)),
        ("cava", "audio_spatial", range(12)),
        ("ca2st", "spatial_temporal", range(12)),
        ("ca2st", "audio_spatial", (9, 10, 11)),
        ("ca2st", "audio_temporal", (9, 10, 11)),
        ("cast", "audio_spatial", ()),
        ("spatial", "spatial_temporal", ()),
    ],
)
def test_the_published_models_join_experts_in_the_published_layers(kind, bridge, layers):
    assert _layers_with(ModelConfig(kind=kind), bridge) == list(layers)


def test_the_number_of_joined_layers_is_counted_from_the_last_and_at_most_all():
    some = ModelConfig(kind="ca2st", spatial_temporal=SpatialTemporalConfig(last_layers=3))
    assert _layers_with(some, "spatial_temporal") == [9, 10, 11]
    shallow = tiny_config("ca2st")
    assert _layers_with(shallow, "audio_spatial") == [0, 1]
    everywhere = ModelConfig(kind="ca2st", audio_temporal=AudioVisualConfig(last_layers="all"))
    assert _layers_with(everywhere, "audio_temporal") == list(range(12))


def test_bridges_stand_in_the_order_of_the_sequential_combination():
    names = [bridge.name for bridge in bridges_of_layer(ModelConfig(kind="ca2st"), 11)]
    assert names == ["spatial_temporal", "audio_spatial", "audio_temporal"]


def test_x2y_takes_its_keys_from_x_and_its_queries_from_y():
    letters = {"spatial": "s", "temporal": "t", "audio": "a"}
    for bridge in bridges_of_layer(ModelConfig(kind="ca2st"), 11):
        for direction in bridge.directions:
            assert direction.name == f"{letters[direction.keys]}2{letters[direction.queries]}"


def test_every_configuration_field_explains_itself():
    for config in (ModelConfig, SpatialTemporalConfig, AudioVisualConfig, TargetSpec):
        source = inspect.getsource(config)
        for field in dataclasses.fields(config):
            after = source.split(f"    {field.name}:", 1)[1].split("\n", 1)[1].lstrip()
            assert after.startswith('"""'), f"{config.__name__}.{field.name} has no docstring"


def test_a_configuration_can_be_read_without_importing_torch():
    script = "import sys, ca2st.model.config, ca2st.model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_exact_layers_may_be_named_and_must_exist():
    config = ModelConfig(kind="ca2st", audio_spatial=AudioVisualConfig(layers=(2, 7)))
    assert _layers_with(config, "audio_spatial") == [1, 6]
    assert _layers_with(config, "audio_temporal") == [9, 10, 11]
    with pytest.raises(UserInputError, match=r"audio_spatial.layers: expected layers 1\.\.4, found 7"):
        ModelConfig(kind="ca2st", depth=4, audio_spatial=AudioVisualConfig(layers=(2, 7)))


@pytest.mark.parametrize("fusion", ["late_add", "late_concat", "independent"])
def test_late_fusion_has_no_bridges(fusion):
    assert not bridges_of_layer(ModelConfig(kind="cast", fusion=fusion), 11)


def test_independent_experts_are_those_of_cast():
    with pytest.raises(UserInputError, match=r"fusion independent: expected kind cast .* found ca2st"):
        ModelConfig(kind="ca2st", fusion="independent")


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_a_scale_of_the_classifiers_that_is_no_finite_number_from_zero_on_is_refused(scale):
    with pytest.raises(UserInputError, match="head_init_scale: expected a finite number >= 0"):
        ModelConfig(head_init_scale=scale)
