"""Each row of the table of heads, written out by hand from the head's own modules."""

import pytest
import torch
from torch.nn.functional import gelu

from ca2st.errors import UserInputError
from ca2st.model.config import TargetSpec
from ca2st.model.network import Head
from support.models import KINDS, ONE_TARGET, VERB_NOUN, tiny_config, wake

TWO_TARGETS = (TargetSpec(name="scene", num_classes=4), TargetSpec(name="action", num_classes=6))
EXPERTS = {"cast": ("spatial", "temporal"), "cava": ("audio", "spatial"), "ca2st": ("spatial", "temporal", "audio")}


DIMS = {"spatial": 32, "temporal": 32, "audio": 32}
WITH_RESNET = DIMS | {"spatial": 2048}


def _head(kind, targets, dims=DIMS, **changes):
    head = Head(tiny_config(kind, **changes), targets, dims)
    wake(head)
    names = EXPERTS.get(kind, (kind,))
    generator = torch.Generator().manual_seed(1)
    features = {name: torch.randn(3, dims[name], generator=generator) for name in names}
    return head, features, head(features)


def _resnet_head(kind, targets, **changes):
    return _head(kind, targets, WITH_RESNET, spatial_encoder="resnet50", depth=4, **changes)


def _ad(head, name, x):
    adapter = head.adapters[name]
    return adapter.up(gelu(adapter.down(x)))


def _q(head, name, x):
    adapter = head.adapters[name]
    hidden = adapter.down(x)
    return adapter.up(hidden * torch.sigmoid(1.702 * hidden))


def test_cast_sums_two_adapted_features_without_skip():
    head, f, logits = _head("cast", ONE_TARGET)
    x = _ad(head, "spatial", f["spatial"]) + _ad(head, "temporal", f["temporal"])
    torch.testing.assert_close(logits["label"], head.classifiers["label"](x))


def test_cast_reads_nouns_from_space_and_verbs_from_time_without_last_adapters():
    head, f, logits = _head("cast", VERB_NOUN)
    torch.testing.assert_close(logits["noun"], head.classifiers["noun"](f["spatial"]))
    torch.testing.assert_close(logits["verb"], head.classifiers["verb"](f["temporal"]))
    assert not len(head.adapters)


@pytest.mark.parametrize("targets", [ONE_TARGET, VERB_NOUN])
def test_cava_sums_two_adapted_features_with_skip_for_every_target(targets):
    head, f, logits = _head("cava", targets)
    x = f["audio"] + _ad(head, "audio", f["audio"]) + f["spatial"] + _ad(head, "spatial", f["spatial"])
    for target in targets:
        torch.testing.assert_close(logits[target.name], head.classifiers[target.name](x))


def test_ca2st_sums_three_features_audio_through_its_query_adapter():
    head, f, logits = _head("ca2st", ONE_TARGET)
    x = _ad(head, "spatial", f["spatial"]) + _ad(head, "temporal", f["temporal"]) + _q(head, "audio", f["audio"])
    torch.testing.assert_close(logits["label"], head.classifiers["label"](x))


def test_ca2st_gives_noun_and_verb_an_audio_adapter_each():
    head, f, logits = _head("ca2st", VERB_NOUN)
    noun = _ad(head, "spatial", f["spatial"]) + _q(head, "audio_noun", f["audio"])
    verb = _ad(head, "temporal", f["temporal"]) + _q(head, "audio_verb", f["audio"])
    torch.testing.assert_close(logits["noun"], head.classifiers["noun"](noun))
    torch.testing.assert_close(logits["verb"], head.classifiers["verb"](verb))


@pytest.mark.parametrize("kind", ["spatial", "temporal", "audio"])
def test_an_expert_alone_is_classified_from_its_feature(kind):
    head, f, logits = _head(kind, VERB_NOUN)
    for name in ("verb", "noun"):
        torch.testing.assert_close(logits[name], head.classifiers[name](f[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_several_other_targets_share_one_feature(kind):
    _, _, logits = _head(kind, TWO_TARGETS)
    assert {name: tuple(x.shape) for name, x in logits.items()} == {"scene": (3, 4), "action": (3, 6)}


def test_last_adapters_start_at_zero_but_the_audio_experts_does_not():
    head = Head(tiny_config("ca2st"), ONE_TARGET, DIMS)
    assert not head.adapters["spatial"].up.weight.any()
    assert not head.adapters["temporal"].up.weight.any()
    assert head.adapters["audio"].up.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_the_initial_scale_multiplies_the_classifiers_weights():
    torch.manual_seed(0)
    plain = Head(tiny_config("cast"), ONE_TARGET, DIMS)
    torch.manual_seed(0)
    scaled = Head(tiny_config("cast", head_init_scale=0.001), ONE_TARGET, DIMS)
    torch.testing.assert_close(scaled.classifiers["label"].weight, plain.classifiers["label"].weight * 0.001)


def test_cast_with_resnet_reads_the_mean_of_a_projected_and_an_adapted_feature():
    head, f, logits = _resnet_head("cast", ONE_TARGET)
    projected = torch.nn.functional.linear(f["spatial"], *head.adapters["spatial"].parameters())
    x = (projected + f["temporal"] + _ad(head, "temporal", f["temporal"])) / 2
    torch.testing.assert_close(logits["label"], head.classifiers["label"](x))


def test_cast_with_resnet_reads_nouns_from_2048_features():
    head, f, logits = _resnet_head("cast", VERB_NOUN)
    assert head.classifiers["noun"].in_features == 2048
    torch.testing.assert_close(logits["noun"], head.classifiers["noun"](f["spatial"]))
    torch.testing.assert_close(logits["verb"], head.classifiers["verb"](f["temporal"]))
    assert not len(head.adapters)


@pytest.mark.parametrize("kind", ["cava", "ca2st"])
def test_with_resnet_a_projection_stands_where_the_others_have_an_adapter(kind):
    head, f, logits = _resnet_head(kind, ONE_TARGET)
    x = torch.nn.functional.linear(f["spatial"], *head.adapters["spatial"].parameters())
    if kind == "cava":
        x = x + f["audio"] + _ad(head, "audio", f["audio"])
    else:
        x = x + _ad(head, "temporal", f["temporal"]) + _q(head, "audio", f["audio"])
    torch.testing.assert_close(logits["label"], head.classifiers["label"](x))


@pytest.mark.parametrize("targets", [ONE_TARGET, VERB_NOUN])
def test_late_add_sums_the_features_for_every_target(targets):
    head, f, logits = _head("ca2st", targets, fusion="late_add")
    for target in targets:
        expected = head.classifiers[target.name](f["spatial"] + f["temporal"] + f["audio"])
        torch.testing.assert_close(logits[target.name], expected)
    assert not len(head.adapters)


@pytest.mark.parametrize("targets", [ONE_TARGET, VERB_NOUN])
def test_late_concat_puts_the_features_side_by_side_for_every_target(targets):
    head, f, logits = _head("cast", targets, fusion="late_concat")
    for target in targets:
        expected = head.classifiers[target.name](torch.cat((f["spatial"], f["temporal"]), dim=-1))
        torch.testing.assert_close(logits[target.name], expected)


def test_late_fusion_with_resnet_adds_a_projected_feature_and_concatenates_a_wide_one():
    head, f, logits = _resnet_head("cast", ONE_TARGET, fusion="late_add")
    projected = torch.nn.functional.linear(f["spatial"], *head.adapters["spatial"].parameters())
    torch.testing.assert_close(logits["label"], head.classifiers["label"](projected + f["temporal"]))
    assert _resnet_head("cast", ONE_TARGET, fusion="late_concat")[0].classifiers["label"].in_features == 2048 + 32


def test_independent_experts_answer_apart_and_need_a_target_each():
    head, f, logits = _head("cast", VERB_NOUN, fusion="independent")
    torch.testing.assert_close(logits["noun"], head.classifiers["noun"](f["spatial"]))
    torch.testing.assert_close(logits["verb"], head.classifiers["verb"](f["temporal"]))
    with pytest.raises(UserInputError, match="expected the targets verb and noun, one per expert, found label"):
        _head("cast", ONE_TARGET, fusion="independent")
