"""The weights of a trained model in a new one: another clip, another head, nothing else."""

from dataclasses import replace

import pytest
import torch

from ca2st.model.config import ModelConfig, SpatialTemporalConfig, TargetSpec
from ca2st.model.tokens import resize_table
from ca2st.spec import ClipSpec
from ca2st.weights.model_file import ModelDescription
from ca2st.weights.positions import SHOWN_BY_NO_TENSOR, fit_audio_positions, transfer_weights
from ca2st.weights.tensor_files import WeightsMismatchError
from support.models import KINDS, ONE_TARGET, TINY_CLIP, VERB_NOUN, inputs_for, tiny_model, wake

LONGER = ClipSpec(num_frames=8, crop_size=48, mel_rows=96)
PRETRAINED = {"pretrained_num_frames": TINY_CLIP.num_frames, "pretrained_crop_size": TINY_CLIP.crop_size}


def _trained(kind, **options):
    model = tiny_model(kind, **options)
    wake(model)
    return model


def _transfer(source, model, **options):
    options = {"where": "there", "resize_positions": False} | options
    return transfer_weights(model, source.state_dict(), source=ModelDescription.of(source), **options)


def _same(ours, theirs, names):
    return all(torch.equal(ours.state_dict()[name], theirs.state_dict()[name]) for name in names)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_into_the_same_model_everything_is_kept_and_computes_the_same(kind):
    source, model = _trained(kind), tiny_model(kind)
    report = _transfer(source, model)
    assert set(report.kept) == source.state_dict().keys()
    assert (report.resized, report.fresh) == ((), ())
    ours, theirs = model(*inputs_for()), source(*inputs_for())
    assert torch.equal(ours.logits["label"], theirs.logits["label"])


def test_another_clip_resizes_every_table_by_its_own_rule_and_keeps_the_rest():
    source = _trained("ca2st")
    model = tiny_model("ca2st", clip=LONGER, **PRETRAINED)
    report = _transfer(source, model, resize_positions=True)
    ours, theirs = model.state_dict(), source.state_dict()
    changed = {name for name in ours if ours[name].shape != theirs[name].shape}
    assert set(report.resized) == changed
    assert {name.rpartition(".")[2] for name in changed} == {"positions", "time_table", "space_table"}
    assert set(report.kept) == ours.keys() - changed
    assert _same(model, source, report.kept)
    bridge = "layers.1.bridges.spatial_temporal.directions."
    for side in ("query", "key"):
        name = f"{bridge}t2s.{side}_positions.time_table"
        assert torch.equal(ours[name], resize_table(theirs[name], from_grid=(2,), to_grid=(4,)))
        name = f"{bridge}s2t.{side}_positions.space_table"
        assert torch.equal(ours[name], resize_table(theirs[name], from_grid=(2, 2), to_grid=(3, 3)))
    name = "experts.spatial.positions"
    assert torch.equal(ours[name][0], theirs[name][0])
    assert torch.equal(ours[name][1:], resize_table(theirs[name][1:], from_grid=(2, 2), to_grid=(3, 3)))
    name = "experts.audio.positions"
    assert torch.equal(ours[name], fit_audio_positions(theirs[name], rows=12, columns=9, where=""))


@torch.no_grad()
def test_learned_codes_of_the_audio_expert_are_fitted_like_its_spectrogram():
    audio = tiny_model("cava").config.audio_spatial
    settings = {"audio_spatial": replace(audio, positions="learned")}
    source = _trained("cava", clip=replace(TINY_CLIP, mel_rows=96), **settings)
    model = tiny_model("cava", **settings)
    report = _transfer(source, model, resize_positions=True)
    name = "layers.0.bridges.audio_spatial.directions.a2s.key_positions.space_table"
    assert name in report.resized
    table = source.state_dict()[name].reshape(12, 9, -1)
    assert torch.equal(model.state_dict()[name].reshape(12, 4, -1), table[:, 2:6])
    assert "layers.0.bridges.audio_spatial.directions.a2s.query_positions.space_table" in report.kept
    assert model(*inputs_for()).logits["label"].isfinite().all()


def test_tables_of_another_clip_are_refused_with_the_switch_and_nothing_is_changed():
    source, model = _trained("cast"), tiny_model("cast", clip=replace(TINY_CLIP, num_frames=8), **PRETRAINED)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        WeightsMismatchError,
        match=r"there: expected position tables for the model's clip, found 4 for another: layers\.0\..*time_table, "
        r".*; set start\.resize_positions = true",
    ):
        _transfer(source, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("clip", "setting"),
    [
        (replace(TINY_CLIP, num_frames=8), r"num_frames 4 there and 8 here \(set model\.pretrained_num_frames = 4\)"),
        (replace(TINY_CLIP, crop_size=48), r"crop_size 32 there and 48 here \(set model\.pretrained_crop_size = 32\)"),
    ],
)
def test_videomaes_fixed_table_must_stay_that_of_its_pretraining(clip, setting):
    with pytest.raises(WeightsMismatchError, match=setting):
        _transfer(_trained("cast"), tiny_model("cast", clip=clip), resize_positions=True)


def test_the_pretrained_clip_is_handed_on_through_two_transfers():
    first = _trained("cast", clip=LONGER, **PRETRAINED)
    second = tiny_model("cast")
    report = _transfer(first, second, resize_positions=True)
    assert report.resized
    with pytest.raises(WeightsMismatchError, match=r"set model\.pretrained_num_frames = 4"):
        _transfer(first, tiny_model("cast", clip=LONGER))


def test_a_label_space_of_another_size_or_name_gets_a_new_classifier_and_the_rest_of_the_head_stays():
    source = _trained("ca2st")
    for target in (TargetSpec(name="label", num_classes=7), TargetSpec(name="species", num_classes=5)):
        model = tiny_model("ca2st", targets=(target,))
        before = model.state_dict()[f"head.classifiers.{target.name}.weight"].clone()
        report = _transfer(source, model)
        assert set(report.fresh) == {f"head.classifiers.{target.name}.{part}" for part in ("weight", "bias")}
        assert torch.equal(model.state_dict()[f"head.classifiers.{target.name}.weight"], before)
        assert any(name.startswith("head.adapters.") for name in report.kept)
        assert _same(model, source, report.kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("old", "new"), [(ONE_TARGET, VERB_NOUN), (VERB_NOUN, ONE_TARGET)])
def test_verb_and_noun_take_over_what_they_share_with_one_label(kind, old, new):
    source, model = _trained(kind, targets=old), tiny_model(kind, targets=new)
    report = _transfer(source, model)
    assert {name for name in report.fresh if "classifiers" in name} == {
        f"head.classifiers.{target.name}.{part}" for target in new for part in ("weight", "bias")
    }
    assert all(name.startswith("head.") for name in report.fresh)
    assert set(report.kept) | set(report.fresh) == model.state_dict().keys()
    assert _same(model, source, report.kept)


def test_a_new_head_is_new_in_all_its_parts():
    source, model = _trained("ca2st"), tiny_model("ca2st")
    before = {name: x.clone() for name, x in model.state_dict().items() if name.startswith("head.")}
    report = _transfer(source, model, new_head=True)
    assert set(report.fresh) == before.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert set(report.kept) == model.state_dict().keys() - before.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 4}, r"num_heads 2 there and 4 here"),
        ({"combination": "parallel"}, r"combination 'sequential' there and 'parallel' here"),
        ({"time_code_layout": "aligned"}, r"time_code_layout 'reference' there and 'aligned' here"),
        (
            {"spatial_temporal": SpatialTemporalConfig(positions="none", t2s_window="space", layers=(2,))},
            r"other cross-attention \(windows, directions or positions\) in layers 1, 2",
        ),
        ({"depth": 3}, r"missing: .*layers\.2\."),
        ({"adapters": False}, r"unexpected: .*layers\.0\.adapters\."),
        ({"bottleneck_ratio": 0.25}, r"of another shape: layers\.0\.bottlenecks\."),
    ],
)
def test_another_structure_is_refused_whatever_the_switches(changes, message):
    model = tiny_model("ca2st", **changes)
    with pytest.raises(WeightsMismatchError, match=message):
        _transfer(_trained("ca2st"), model, resize_positions=True, new_head=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kind": "ca2st", "num_heads": 4},
            r"there: .*, found kind 'cast' there and 'ca2st' here\. Change the \[model\]",
        ),
        (
            {"kind": "cast", "temporal_encoder": "clip"},
            r"found the temporal expert videomae there and clip here\. Change the \[model\]",
        ),
    ],
)
def test_other_experts_are_named_and_nothing_that_follows_from_them(changes, message):
    with torch.device("meta"):
        model = tiny_model(**changes)
    with pytest.raises(WeightsMismatchError, match=message):
        _transfer(tiny_model("cast"), model)


def test_every_setting_that_no_tensor_shows_is_a_setting():
    assert set(SHOWN_BY_NO_TENSOR) < set(ModelConfig.__dataclass_fields__)


@pytest.mark.parametrize("name", ["layers.0.bottlenecks.spatial.up.bias", "experts.spatial.positions"])
def test_a_missing_tensor_is_refused_by_name(name):
    source = _trained("cast")
    state = {key: tensor for key, tensor in source.state_dict().items() if key != name}
    with pytest.raises(WeightsMismatchError, match=f"1 missing: {name}"):
        transfer_weights(
            tiny_model("cast"), state, source=ModelDescription.of(source), where="there", resize_positions=True
        )


def test_a_part_of_the_head_that_nobody_knows_is_refused_where_the_label_space_stays():
    source = _trained("cast")
    state = source.state_dict() | {"head.adapters.depth.weight": torch.ones(2)}
    with pytest.raises(WeightsMismatchError, match=r"1 unexpected: head\.adapters\.depth\.weight"):
        transfer_weights(
            tiny_model("cast"), state, source=ModelDescription.of(source), where="there", resize_positions=True
        )


def test_it_can_be_tried_without_allocating_a_model():
    source = _trained("cast")
    with torch.device("meta"):
        model = tiny_model("cast", clip=LONGER, **PRETRAINED)
    assert _transfer(source, model, resize_positions=True).resized
    with pytest.raises(WeightsMismatchError, match="resize_positions"):
        _transfer(source, model)


def test_resnets_maps_are_resized_each_from_its_own_grid():
    settings = {"spatial_encoder": "resnet50", "depth": 4}
    source = _trained("cast", clip=replace(TINY_CLIP, crop_size=64), **settings)
    model = tiny_model(
        "cast", clip=replace(TINY_CLIP, crop_size=128), **settings, pretrained_crop_size=64, pretrained_num_frames=4
    )
    report = _transfer(source, model, resize_positions=True)
    ours, theirs = model.state_dict(), source.state_dict()
    assert set(report.resized) == {name for name in ours if ours[name].shape != theirs[name].shape}
    name = "layers.3.bridges.spatial_temporal.directions.s2t.key_positions.space_table"
    assert torch.equal(ours[name], resize_table(theirs[name], from_grid=(2, 2), to_grid=(4, 4)))
