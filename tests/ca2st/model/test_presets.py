"""Every preset, built at its smallest size: it runs, it learns, and it is what its name says."""

from dataclasses import replace

import pytest
import torch

from ca2st.errors import UserInputError
from ca2st.model.config import EXPERTS, PRESETS, SIZES, all_bridges, bridges_of_layer, find_preset
from ca2st.model.network import build_model, count_parameters
from ca2st.spec import ClipSpec
from support.models import VERB_NOUN, inputs_for

SMALL_CLIP = ClipSpec(num_frames=4, crop_size=32, mel_rows=48)
PUBLISHED_ROWS = {
    **{"cast_s2t_only": 43.7, "cast_t2s_only": 46.7},
    **{"cast_ratio_1_8": 47.4, "cast_ratio_1_4": 47.4, "cast_ratio_1_2": 48.7, "cast_ratio_1": 48.6},
    **{"cast_windows_space_time": 47.2, "cast_windows_time_space": 48.7},
    **{"cast_layers_10_12": 47.4, "cast_layers_7_12": 47.9, "cast_layers_4_12": 48.2, "cast_layers_1_12": 48.7},
    **{"cast_no_positions": 47.5, "cast_clip_clip": 46.0, "cast_videomae_videomae": 40.3},
    **{"cast_identity": 41.7, "cast_late_add": 44.2, "cast_late_concat": 44.5},
    **{"cast": 49.3, "cast_resnet50": 43.8},
}


def _smallest(name):
    return replace(PRESETS[name].config, dim=32, depth=4, num_heads=2)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_and_every_trained_part_learns_at_its_smallest_size(name):
    model = build_model(_smallest(name), SMALL_CLIP, VERB_NOUN).train()
    output = model(*inputs_for(SMALL_CLIP))
    assert {target: tuple(x.shape) for target, x in output.logits.items()} == {"verb": (2, 97), "noun": (2, 300)}
    assert set(output.features) == set(EXPERTS[model.config.kind])
    torch.nn.functional.mse_loss(output.logits["verb"], torch.ones(2, 97)).backward()
    torch.nn.functional.mse_loss(model(*inputs_for(SMALL_CLIP)).logits["noun"], torch.ones(2, 300)).backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    last = f"layers.{model.config.depth - 1}.bridges."
    assert reached <= trained
    assert all(name.startswith(last) for name in trained - reached), trained - reached


def test_no_two_presets_but_named_defaults_are_the_same_configuration():
    configs = {}
    for name, preset in PRESETS.items():
        structure = build_signature(preset.config)
        configs.setdefault(structure, []).append(name)
    twins = [sorted(names) for names in configs.values() if len(names) > 1]
    assert twins == [sorted(["cast", "cast_ratio_1_2", "cast_windows_time_space", "cast_layers_1_12"])]


def build_signature(config):
    """What decides the model: the configuration, with layers spelled out."""
    layers = tuple(tuple(b.name for b in bridges_of_layer(config, layer)) for layer in range(config.depth))
    plain = replace(config.spatial_temporal, last_layers="published")
    return repr(replace(config, spatial_temporal=plain)), layers


def test_each_published_row_is_a_preset_with_its_figure():
    assert {name: p.published_top1 for name, p in PRESETS.items() if p.published_top1 is not None} == PUBLISHED_ROWS


def test_presets_differ_from_cast_in_what_their_name_says():
    assert {d.name for b in all_bridges(PRESETS["cast_s2t_only"].config) for d in b.directions} == {"s2t"}
    assert {d.name for b in all_bridges(PRESETS["cast_t2s_only"].config) for d in b.directions} == {"t2s"}
    for first, name in ((10, "cast_layers_10_12"), (7, "cast_layers_7_12"), (4, "cast_layers_4_12")):
        carrying = [i + 1 for i in range(12) if bridges_of_layer(PRESETS[name].config, i)]
        assert carrying == list(range(first, 13))
    for name in ("cast_identity", "cast_late_add", "cast_late_concat", "ca2st_late_add"):
        assert not all_bridges(PRESETS[name].config)


def test_the_sizes_are_those_of_the_usual_vision_transformers():
    """A spatial expert of ViT-S, B and L: about 22, 86 and 303 million parameters."""
    found = {}
    for name, size in SIZES.items():
        config = replace(PRESETS["spatial"].config, **size)
        with torch.device("meta"):
            model = build_model(config, ClipSpec(num_frames=2), VERB_NOUN)
        found[name] = round(count_parameters(model.experts["spatial"]).total / 1e6)
    assert found == {"vit_s": 22, "vit_b": 86, "vit_l": 303}


def test_an_unknown_preset_is_refused_with_the_nearest_name():
    with pytest.raises(UserInputError, match="did you mean 'cast_late_add'"):
        find_preset("cast_lateadd")
