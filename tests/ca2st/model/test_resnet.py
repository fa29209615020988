"""ResNet-50 in the spatial role: its stages inside the temporal expert's layers, and the exchange with its maps."""

import pytest
import torch

from ca2st.errors import UserInputError
from ca2st.model.config import ModelConfig, SpatialTemporalConfig, bridges_of_layer, stage_of_layer
from ca2st.model.experts import ResNetExpert
from ca2st.model.network import build_model
from ca2st.spec import ClipSpec
from support.models import ONE_TARGET, VERB_NOUN, expert_inputs, inputs_for, tiny_config, tiny_model, wake

CLIP = ClipSpec(num_frames=4, crop_size=64, mel_rows=48)


def _model(kind="cast", **changes):
    return tiny_model(kind, clip=CLIP, spatial_encoder="resnet50", depth=4, **changes)


def test_the_stages_run_in_layers_3_6_9_and_12_counted_from_one():
    assert stage_of_layer(12) == {2: 0, 5: 1, 8: 2, 11: 3}
    config = ModelConfig(kind="cast", spatial_encoder="resnet50")
    assert [layer for layer in range(12) if bridges_of_layer(config, layer)] == [2, 5, 8, 11]


def test_the_maps_are_56_28_14_and_7_on_a_side_at_224_pixels():
    with torch.device("meta"):
        expert = ResNetExpert(ModelConfig(kind="cast", spatial_encoder="resnet50"), ClipSpec())
    found = [(expert.grid_at(layer).num_patches, expert.grid_at(layer).dim) for layer in (1, 2, 4, 5, 8, 11)]
    assert found == [(56**2, 64), (56**2, 256), (56**2, 256), (28**2, 512), (14**2, 1024), (7**2, 2048)]
    assert expert.feature_dim == 2048


def test_nothing_of_the_network_trains_its_norms_not_even_when_everything_does():
    model = _model()
    names = {name for name, _ in model.named_parameters() if name.startswith("experts.spatial")}
    assert names
    assert not any("norm" in name or ".bn" in name for name in names)
    before = {name: b.clone() for name, b in model.experts["spatial"].named_buffers()}
    model.train()(*inputs_for(CLIP))
    assert all(torch.equal(b, before[name]) for name, b in model.experts["spatial"].named_buffers())
    assert not [name for name, _ in model.layers.named_parameters() if "adapters.spatial" in name]


def test_at_step_0_both_features_are_those_of_the_experts_alone():
    model = _model()
    with torch.no_grad():
        features = model(*inputs_for(CLIP)).features
        for name in ("spatial", "temporal"):
            alone = model.experts[name](expert_inputs(CLIP))
            torch.testing.assert_close(features[name], alone)
    assert features["spatial"].shape == (2, 2048)


@pytest.mark.parametrize("layer", range(4))
def test_the_updated_map_is_what_the_next_stage_reads_and_each_side_changes_the_other(layer):
    model = _model()
    wake(model.layers[layer])
    with torch.no_grad():
        features = model(*inputs_for(CLIP)).features
        for name in ("spatial", "temporal"):
            assert not torch.allclose(features[name], model.experts[name](expert_inputs(CLIP)))


def test_the_position_codes_have_the_published_shapes():
    model = _model()
    shapes = {
        layer: {
            name: tuple(table.shape)
            for name, table in model.layers[layer].bridges["spatial_temporal"].named_parameters()
            if "table" in name
        }
        for layer in (0, 3)
    }
    assert shapes[0] == {
        "directions.t2s.query_positions.time_table": (2, 16),
        "directions.t2s.key_positions.time_table": (2, 16),
        "directions.s2t.query_positions.space_table": (16, 16),
        "directions.s2t.key_positions.space_table": (256, 16),
    }
    assert shapes[3]["directions.s2t.key_positions.space_table"] == (4, 16)


def test_the_grouping_of_tokens_under_the_coarsest_map_is_the_references_or_square():
    reference, square = _model(), _model(resnet_grouping="square")
    for layer, expected in ((0, "square"), (1, "square"), (3, "raster")):  # in layer 2 both have 4 x 4 places
        directions = reference.layers[layer].bridges["spatial_temporal"].directions
        assert directions["t2s"].attention.grouping == expected
    assert square.layers[3].bridges["spatial_temporal"].directions["t2s"].attention.grouping == "square"
    for model in (reference, square):
        wake(model)
    square.load_state_dict(reference.state_dict())
    with torch.no_grad():
        logits = [model(*inputs_for(CLIP)).logits["label"] for model in (reference, square)]
    assert not torch.allclose(*logits)


@pytest.mark.parametrize("kind", ["cast", "cava", "ca2st", "spatial"])
@pytest.mark.parametrize("targets", [ONE_TARGET, VERB_NOUN])
def test_resnet_stands_in_every_kind_that_has_a_spatial_expert(kind, targets):
    model = build_model(tiny_config(kind, spatial_encoder="resnet50", depth=4), CLIP, targets)
    logits = model(*inputs_for(CLIP)).logits
    assert {name: x.shape[1] for name, x in logits.items()} == {t.name: t.num_classes for t in targets}
    sum(x.sum() for x in logits.values()).backward()


def test_sizes_that_the_stages_cannot_cover_are_refused():
    with pytest.raises(UserInputError, match=r"expected a depth that its four stages divide.*found depth 6"):
        ModelConfig(kind="cast", spatial_encoder="resnet50", depth=6)
    with pytest.raises(UserInputError, match=r"in which a stage of ResNet-50 runs \(\[3, 6, 9, 12\]\), found \[2\]"):
        ModelConfig(kind="cast", spatial_encoder="resnet50", spatial_temporal=SpatialTemporalConfig(layers=(2, 3)))
    with pytest.raises(UserInputError, match="crop_size: expected a multiple of 32, the coarsest map"):
        build_model(
            tiny_config("cast", spatial_encoder="resnet50", depth=4), ClipSpec(num_frames=4, crop_size=48), ONE_TARGET
        )
