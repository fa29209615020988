from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ca2st.errors import UserInputError
from ca2st.model.config import AudioVisualConfig, SpatialTemporalConfig, TargetSpec
from ca2st.model.network import build_model
from ca2st.weights.published import (
    NEVER_USED,
    golden_model,
    golden_output,
    load_published,
    published_names,
    to_published,
)
from ca2st.weights.tensor_files import WeightsMismatchError, read_tensor_file
from support.models import ONE_TARGET, TINY_CLIP, VERB_NOUN, tiny_config, tiny_model, wake

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
FILES = sorted(GOLDEN.glob("*.safetensors"))
SHARED_UP = "blocks.1.s_audio_b_cast.cross_l_up.weight"


def _weights(path):
    tensors = read_tensor_file(path).tensors
    return {name.removeprefix("weights/"): tensor for name, tensor in tensors.items() if name.startswith("weights/")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_writing_published_names_gives_back_what_was_read_but_the_unused_norm(path):
    weights = _weights(path)
    written = to_published(golden_model(read_tensor_file(path)))
    assert set(written) == set(weights) - NEVER_USED
    assert all(torch.equal(written[name], weights[name].float()) for name in written)


@pytest.mark.parametrize(
    ("kind", "targets", "published", "ours"),
    [
        ("cast", ONE_TARGET, "blocks.1.S_Adapter.D_fc1.weight", "layers.1.adapters.spatial.serial.down.weight"),
        ("cava", ONE_TARGET, "blocks.1.S_Adapter.D_fc1.weight", "layers.1.adapters.audio.serial.down.weight"),
        ("cava", ONE_TARGET, "blocks.0.cross_t_up.bias", "layers.0.bottlenecks.spatial.up.bias"),
        (
            "cava",
            ONE_TARGET,
            "blocks.0.s2t_cross.t2s_proj.bias",
            "layers.0.bridges.audio_spatial.directions.a2s.attention.proj.bias",
        ),
        (
            "ca2st",
            ONE_TARGET,
            "blocks.0.t_audio_b_cast.l2r_cross.kv_bias",
            "layers.0.bridges.audio_temporal.directions.t2a.attention.kv.bias",
        ),
        ("ca2st", ONE_TARGET, "audio_verb_last_Adapter.c_fc.weight", "head.adapters.audio.down.weight"),
        ("ca2st", VERB_NOUN, "audio_verb_last_Adapter.c_fc.weight", "head.adapters.audio_verb.down.weight"),
        ("cava", ONE_TARGET, "time_mlp.3.0.weight", "time_codes.video.4.weight"),
        ("ca2st", ONE_TARGET, "audio_time_mlp.6.bias", "time_codes.audio.6.bias"),
    ],
)
def test_the_misleading_letters_mean_what_they_mean(kind, targets, published, ours):
    assert published_names(tiny_config(kind), targets)[published] == ours


@pytest.mark.parametrize("kind", ["cast", "cava", "ca2st"])
@pytest.mark.parametrize("targets", [ONE_TARGET, VERB_NOUN])
def test_names_cover_the_model_exactly(kind, targets):
    model = tiny_model(kind, targets=targets)
    assert set(published_names(model.config, targets).values()) == set(model.state_dict())


def _written(kind="ca2st"):
    source = tiny_model(kind)
    wake(source)
    return to_published(source)


def test_the_report_names_what_was_loaded_and_what_the_method_never_uses():
    state = _written() | {name: torch.zeros(32) for name in NEVER_USED}
    report = load_published(tiny_model("ca2st"), state, where="file")
    assert set(report.loaded) == set(state) - NEVER_USED
    assert report.missing == ()
    assert set(report.unexpected) == NEVER_USED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.0.attn.q_bias"), r"file: .*1 missing: experts.temporal.layers.0.attention.q_bias"),
        (lambda s: s.pop("clip_conv1.weight"), "1 missing: experts.spatial.patch_embed.weight"),
        (lambda s: s.update(decoder=torch.zeros(1)), "1 unexpected: decoder"),
        (lambda s: s.update({"head.weight": torch.zeros(6, 32)}), r"head.*weight expected \[5, 32\], found \[6, 32\]"),
        (lambda s: s.update(ast_pos_embed=torch.zeros(1, 7, 32)), r"positions expected \[50, 32\], found \[7, 32\]"),
        (lambda s: s.update({SHARED_UP: s[SHARED_UP] + 1}), r"cross_l_up.weight is shared|is shared with another name"),
        (lambda s: s.pop(SHARED_UP), f"1 missing: {SHARED_UP}"),
        (lambda s: s.update({"head.bias": torch.zeros(5, dtype=torch.int64)}), "1 not of a floating-point type: head"),
    ],
)
def test_a_checkpoint_that_is_not_exactly_the_model_is_refused_and_nothing_is_loaded(change, message):
    state = _written()
    change(state)
    model = tiny_model("ca2st")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsMismatchError, match=message):
        load_published(model, state, where="file")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_of_another_kind_is_refused_with_the_start_of_the_list():
    with pytest.raises(WeightsMismatchError, match=r"unexpected: .* and \d+ more"):
        load_published(tiny_model("cast"), _written("ca2st"), where="file")


def test_a_new_head_may_be_missing_when_the_caller_names_it():
    state = {name: tensor for name, tensor in _written().items() if not name.startswith("head.")}
    report = load_published(tiny_model("ca2st"), state, where="file", allow_missing=("head.classifiers.*",))
    assert report.missing == ("head.bias", "head.weight")


@pytest.mark.parametrize("name", ["ca2st_single", "ca2st_verb_noun"])
def test_separate_bottlenecks_filled_from_shared_ones_give_the_same_output(name):
    file = read_tensor_file(GOLDEN / f"{name}.safetensors")
    shared = golden_model(file)
    separate = build_model(replace(shared.config, shared_bottleneck=False), shared.clip, shared.targets).eval()
    load_published(separate, _weights(file.path), where=name)
    ours, expected = golden_output(separate, file), golden_output(shared, file)
    assert all(torch.equal(ours.logits[key], expected.logits[key]) for key in expected.logits)


@pytest.mark.parametrize(
    "changes",
    [
        {"spatial_temporal": SpatialTemporalConfig(directions="s2t")},
        {"audio_spatial": AudioVisualConfig(positions="learned")},
        {"adapters": False},
    ],
)
def test_a_configuration_that_was_never_published_says_so(changes):
    with pytest.raises(UserInputError, match="this configuration was never published; it differs in"):
        to_published(tiny_model("ca2st", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fusion": "lateral"},
            "expected fusion cross_attention, found fusion lateral: no such model was ever released",
        ),
        ({"fusion": "late_add"}, "expected fusion cross_attention, found fusion late_add"),
        ({"temporal_encoder": "clip"}, "expected temporal_encoder videomae, found temporal_encoder clip"),
        ({"spatial_encoder": "resnet50", "depth": 4}, "expected spatial_encoder clip, found spatial_encoder resnet50"),
        ({"spatial_temporal": SpatialTemporalConfig(positions="time_codes")}, "this configuration was never published"),
    ],
)
def test_encoders_and_fusions_that_were_never_released_have_no_published_names(changes, message):
    clip = replace(TINY_CLIP, crop_size=64)
    with pytest.raises(UserInputError, match=message):
        to_published(tiny_model("cast", clip=clip, **changes))


def test_an_interpolated_table_of_videomae_is_not_written_under_published_names():
    with pytest.raises(UserInputError, match=r"found one interpolated from \(8, 2, 2\), which released code does not"):
        to_published(tiny_model("cast", pretrained_num_frames=16))
    assert to_published(tiny_model("cast", pretrained_num_frames=4, pretrained_crop_size=32))
    assert to_published(tiny_model("cava", pretrained_crop_size=48))


def test_exact_layers_have_the_published_names_of_the_layers_they_are():
    config = tiny_config("cast", spatial_temporal=SpatialTemporalConfig(layers=(1,)))
    names = published_names(config, ONE_TARGET)
    assert "blocks.0.cross_s_down.weight" in names
    assert "blocks.1.cross_s_down.weight" not in names


def test_kinds_and_targets_without_published_names_say_so():
    with pytest.raises(UserInputError, match="expected kind cast, cava, ca2st, found audio"):
        published_names(tiny_config("audio"), ONE_TARGET)
    two = tuple(TargetSpec(name=name, num_classes=2) for name in ("a", "b"))
    with pytest.raises(UserInputError, match="expected one target, or verb and noun, found a, b"):
        published_names(tiny_config("cast"), two)
