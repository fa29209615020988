"""The whole model at its smallest: every kind and switch builds, runs, learns what it should, starts as published."""

import pytest
import torch

from ca2st.errors import UserInputError
from ca2st.model.config import EXPERTS, AudioVisualConfig, SpatialTemporalConfig
from ca2st.model.network import build_model, set_trainable, whole_last_layer
from ca2st.spec import ClipSpec
from support.models import (
    JOINED_KINDS,
    KINDS,
    ONE_TARGET,
    TINY_CLIP,
    VERB_NOUN,
    expert_inputs,
    inputs_for,
    tiny_config,
    tiny_model,
    wake,
)

LEARNED = AudioVisualConfig(positions="learned")
WIDE = SpatialTemporalConfig(t2s_window="space_time", s2t_window="space_time")
SWITCHES = [
    {},
    {"adapters": False},
    {"combination": "parallel"},
    {"shared_bottleneck": False},
    {"time_code_layout": "aligned"},
    {"drop_path_rate": 0.3},
    {"bottleneck_ratio": 0.25, "adapter_ratio": 0.5},
    {"spatial_temporal": WIDE, "audio_spatial": LEARNED, "audio_temporal": LEARNED},
    {
        "spatial_temporal": SpatialTemporalConfig(positions="none", last_layers=1),
        "audio_spatial": AudioVisualConfig(positions="none", directions="from_audio"),
        "audio_temporal": AudioVisualConfig(directions="to_audio", last_layers=1),
    },
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "+".join(s) or "published")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_runs_and_only_what_is_trainable_gets_gradients(kind, switches):
    model = tiny_model(kind, **switches).train()
    output = model(*inputs_for())
    assert output.logits["label"].shape == (2, 5)
    assert {name: tuple(x.shape) for name, x in output.features.items()} == dict.fromkeys(EXPERTS[kind], (2, 32))
    output.logits["label"].sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize(
    ("kind", "idle"),
    [
        ("cast", {"t2s"}),
        ("cava", {"a2s", "s2a"}),
        ("ca2st", {"a2s", "t2a"}),
        ("spatial", set()),
        ("temporal", set()),
        ("audio", set()),
    ],
)
def test_every_trained_parameter_has_an_effect_but_for_attention_that_nobody_reads(kind, idle):
    """Pooling reads only cls and prefix tokens of the spatial and the audio expert, so in the last layer the published
    models compute updates of patches that nothing reads; all other trained parameters must move the loss."""
    model = tiny_model(kind).train()
    wake(model)
    model(*inputs_for()).logits["label"].square().sum().backward()
    without_effect = {n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()}
    last = f"layers.{model.config.depth - 1}."
    unread = {
        name
        for name, _ in model.named_parameters()
        if name.startswith(last) and any(f".directions.{direction}." in name for direction in idle)
    }
    assert without_effect == unread


@pytest.mark.parametrize("kind", KINDS)
def test_at_step_zero_every_expert_gives_the_features_of_the_frozen_expert_alone(kind):
    model = tiny_model(kind)
    wake(model.experts["spatial" if "spatial" in model.experts else kind])
    with whole_last_layer(model):
        features = model(*inputs_for()).features
    pooled = model(*inputs_for()).features
    for name, expert in model.experts.items():
        alone = expert(expert_inputs())
        assert torch.equal(features[name], alone), name
        torch.testing.assert_close(pooled[name], alone)


@pytest.mark.parametrize("kind", JOINED_KINDS)
def test_after_step_zero_experts_do_hear_each_other(kind):
    model = tiny_model(kind)
    wake(model.layers)
    features = model(*inputs_for()).features
    for name, expert in model.experts.items():
        assert not torch.allclose(features[name], expert(expert_inputs())), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "clip",
    [
        ClipSpec(num_frames=8, crop_size=64, mel_rows=96),
        ClipSpec(num_frames=2, crop_size=16, mel_rows=16, num_mel_bins=16),
        ClipSpec(num_frames=6, crop_size=48, mel_rows=57, num_mel_bins=80),
    ],
    ids=lambda clip: f"{clip.num_frames}x{clip.crop_size}+{clip.mel_rows}",
)
def test_any_clip_that_patches_can_cover_runs(kind, clip):
    model = tiny_model(kind, clip=clip, targets=VERB_NOUN)
    logits = model(*inputs_for(clip)).logits
    assert {name: tuple(x.shape) for name, x in logits.items()} == {"verb": (2, 97), "noun": (2, 300)}


@pytest.mark.parametrize("kind", KINDS)
def test_clips_of_a_batch_do_not_see_each_other(kind):
    model = tiny_model(kind)
    wake(model.layers)
    together = model(*inputs_for(batch=3)).features
    alone = model(*(x[1:2] for x in inputs_for(batch=3))).features
    for name, feature in together.items():
        torch.testing.assert_close(feature[1:2], alone[name], atol=1e-5, rtol=1e-5)


def test_the_spatial_expert_reads_the_second_frame_of_each_pair_only():
    model = tiny_model("spatial")
    video, mel, intervals = inputs_for()
    changed = video.clone()
    changed[:, :, 0::2] = 0
    before, after = model(video, mel, intervals), model(changed, mel, intervals)
    assert torch.equal(before.features["spatial"], after.features["spatial"])


def test_the_temporal_expert_reads_every_frame():
    model = tiny_model("temporal")
    video, mel, intervals = inputs_for()
    for frame in range(TINY_CLIP.num_frames):
        changed = video.clone()
        changed[:, :, frame] = 0
        assert not torch.equal(
            model(video, mel, intervals).features["temporal"], model(changed, mel, intervals).features["temporal"]
        )


def test_the_time_of_the_sound_matters_to_the_audio_visual_models_and_not_to_cast():
    for kind, matters in (("cast", False), ("cava", True), ("ca2st", True)):
        model = tiny_model(kind)
        wake(model)
        video, mel, intervals = inputs_for()
        later = intervals.clone()
        later[:, 0] += 1
        same = torch.equal(model(video, mel, intervals).logits["label"], model(video, mel, later).logits["label"])
        assert same is not matters


def test_a_clip_without_sound_gives_finite_logits():
    video, mel, intervals = inputs_for()
    logits = tiny_model("ca2st")(video, torch.zeros_like(mel), torch.zeros_like(intervals)).logits["label"]
    assert logits.isfinite().all()


def test_weights_come_from_the_seed_alone_and_leave_torchs_generator_as_it_was():
    config = tiny_config("ca2st")
    torch.manual_seed(5)
    first = build_model(config, TINY_CLIP, ONE_TARGET, seed=1)
    untouched = torch.rand(3)
    again = build_model(config, TINY_CLIP, ONE_TARGET, seed=1)
    other = build_model(config, TINY_CLIP, ONE_TARGET, seed=2)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), untouched)
    states = [model.state_dict() for model in (first, again, other)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert not torch.equal(states[0]["head.classifiers.label.weight"], states[2]["head.classifiers.label.weight"])


def test_added_linears_start_small_with_zero_bias_and_second_ones_at_zero():
    model = build_model(tiny_config("ca2st", dim=256, num_heads=4), TINY_CLIP, ONE_TARGET)
    layer = model.layers[0]
    adapter, bottleneck = layer.adapters["temporal"].serial, layer.bottlenecks["audio"]
    for linear in (adapter.down, bottleneck.down, layer.bridges["audio_temporal"].directions["a2t"].attention.kv):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not linear.bias.any()
    for linear in (adapter.up, layer.adapters["audio"].parallel.up, bottleneck.up):
        assert not linear.weight.any()
        assert not linear.bias.any()


def test_an_expert_alone_without_adapters_can_be_pretrained():
    """A few steps on two clips: the loss must fall a lot, or the demo's experts could not learn either."""
    model = tiny_model("spatial", adapters=False).train()
    set_trainable(model, "all")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    inputs, labels = inputs_for(), torch.tensor([0, 3])
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(*inputs).logits["label"], labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


def test_sizes_that_do_not_fit_are_refused_before_anything_is_built():
    with pytest.raises(UserInputError, match="crop_size: expected a multiple of the patch size 16, found 40"):
        build_model(tiny_config("cast"), ClipSpec(crop_size=40), ONE_TARGET)
    with pytest.raises(UserInputError, match="targets: expected at least one"):
        build_model(tiny_config("cast"), TINY_CLIP, ())
