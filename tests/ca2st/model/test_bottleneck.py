"""What cross-attention can and cannot see: change one token of the speaker, look who notices."""

import pytest
import torch

from ca2st.model.config import AudioVisualConfig, SpatialTemporalConfig
from ca2st.spec import ClipSpec
from support.models import JOINED_KINDS, inputs_for, tiny_model, wake

CLIP = ClipSpec(num_frames=6, crop_size=48, mel_rows=48)
FRAMES, PATCHES = 3, 9


def _bridge(name: str, kind: str = "ca2st", **changes):
    """A woken B-CA with its layer's bottlenecks, and random tokens Y and codes for it."""
    model = tiny_model(kind, clip=CLIP, **changes)
    layer = model.layers[-1]
    wake(layer)
    grids = {expert: model.experts[expert].grid for expert in model.experts}
    generator = torch.Generator().manual_seed(3)
    tokens = {
        expert: torch.randn(2, grid.num_sequences, grid.num_tokens, 32, generator=generator)
        for expert, grid in grids.items()
    }
    codes = model.time_codes(inputs_for(CLIP)[2])
    bridge = layer.bridges[name]
    return (lambda y: bridge(y, layer.bottlenecks_of(bridge.bridge), codes)), tokens, grids


def _patches_that_notice(run, tokens, grids, *, speaker, listener, frame, patch):
    """(frame, patch) places of the listener whose update changes when one patch of the speaker does."""
    prefix, patches = grids[speaker].split(tokens[speaker].clone())
    patches[:, frame, patch] += 1
    changed = tokens | {speaker: grids[speaker].join(prefix, patches)}
    before, after = run(tokens)[listener], run(changed)[listener]
    (prefix_before, before), (prefix_after, after) = grids[listener].split(before), grids[listener].split(after)
    assert torch.equal(prefix_before, prefix_after)
    moved = (before - after).abs().amax(dim=(0, 3)) > 0
    return {(t, p) for t, p in moved.nonzero().tolist()}


ALL = {(t, p) for t in range(FRAMES) for p in range(PATCHES)}
SAME_PATCH = {(t, 4) for t in range(FRAMES)}
SAME_FRAME = {(1, p) for p in range(PATCHES)}


@pytest.mark.parametrize(("window", "noticing"), [("time", SAME_PATCH), ("space", SAME_FRAME), ("space_time", ALL)])
def test_t2s_lets_a_spatial_patch_see_the_temporal_tokens_of_its_window_only(window, noticing):
    run, tokens, grids = _bridge("spatial_temporal", spatial_temporal=SpatialTemporalConfig(t2s_window=window))
    found = _patches_that_notice(run, tokens, grids, speaker="temporal", listener="spatial", frame=1, patch=4)
    assert found == noticing


@pytest.mark.parametrize(("window", "noticing"), [("time", SAME_PATCH), ("space", SAME_FRAME), ("space_time", ALL)])
def test_s2t_lets_a_temporal_patch_see_the_spatial_tokens_of_its_window_only(window, noticing):
    run, tokens, grids = _bridge("spatial_temporal", spatial_temporal=SpatialTemporalConfig(s2t_window=window))
    found = _patches_that_notice(run, tokens, grids, speaker="spatial", listener="temporal", frame=1, patch=4)
    assert found == noticing


def test_the_published_windows_are_time_for_t2s_and_space_for_s2t():
    run, tokens, grids = _bridge("spatial_temporal")
    place = {"frame": 1, "patch": 4}
    t2s = _patches_that_notice(run, tokens, grids, speaker="temporal", listener="spatial", **place)
    s2t = _patches_that_notice(run, tokens, grids, speaker="spatial", listener="temporal", **place)
    assert (t2s, s2t) == (SAME_PATCH, SAME_FRAME)


@pytest.mark.parametrize("visual", ["spatial", "temporal"])
def test_audio_and_vision_see_each_other_everywhere(visual):
    run, tokens, grids = _bridge(f"audio_{visual}")
    a2v = _patches_that_notice(run, tokens, grids, speaker="audio", listener=visual, frame=0, patch=7)
    v2a = _patches_that_notice(run, tokens, grids, speaker=visual, listener="audio", frame=1, patch=4)
    assert a2v == ALL
    assert v2a == {(0, p) for p in range(grids["audio"].num_patches)}


@pytest.mark.parametrize(("bridge", "listener"), [("spatial_temporal", "temporal"), ("audio_spatial", "audio")])
def test_the_cls_token_of_the_spatial_expert_is_no_key(bridge, listener):
    run, tokens, _ = _bridge(bridge)
    changed = tokens["spatial"].clone()
    changed[:, :, 0] += 1
    assert torch.equal(run(tokens)[listener], run(tokens | {"spatial": changed})[listener])


def test_prefix_tokens_pass_through_the_bottleneck_without_attention():
    model = tiny_model("cava", clip=CLIP)
    layer = model.layers[0]
    wake(layer)
    tokens = {name: torch.randn(2, e.grid.num_sequences, e.grid.num_tokens, 32) for name, e in model.experts.items()}
    bridge, codes = layer.bridges["audio_spatial"], model.time_codes(inputs_for(CLIP)[2])
    updates = bridge(tokens, layer.bottlenecks_of(bridge.bridge), codes)
    for name, num_prefix in (("audio", 2), ("spatial", 1)):
        bottleneck = layer.bottlenecks[name]
        prefix = tokens[name][:, :, :num_prefix]
        expected = bottleneck.up(torch.nn.functional.gelu(bridge.norms[name](bottleneck.down(prefix))))
        torch.testing.assert_close(updates[name][:, :, :num_prefix], expected)


def test_position_codes_reach_the_values_too():
    """With one key the softmax is 1: only the value can carry a change of the key's code."""
    clip = ClipSpec(num_frames=2, crop_size=16, mel_rows=48)
    model = tiny_model("cast", clip=clip)
    layer = model.layers[0]
    wake(layer)
    tokens = {name: torch.randn(1, e.grid.num_sequences, e.grid.num_tokens, 32) for name, e in model.experts.items()}
    bridge = layer.bridges["spatial_temporal"]
    before = bridge(tokens, layer.bottlenecks_of(bridge.bridge), None)["temporal"]
    with torch.no_grad():
        bridge.directions["s2t"].key_positions.space_table.add_(1)
    assert not torch.equal(before, bridge(tokens, layer.bottlenecks_of(bridge.bridge), None)["temporal"])


@pytest.mark.parametrize(
    ("bridge", "settings", "updated"),
    [
        ("spatial_temporal", SpatialTemporalConfig(directions="t2s"), "spatial"),
        ("spatial_temporal", SpatialTemporalConfig(directions="s2t"), "temporal"),
        ("audio_spatial", AudioVisualConfig(directions="from_audio"), "spatial"),
        ("audio_spatial", AudioVisualConfig(directions="to_audio"), "audio"),
        ("audio_temporal", AudioVisualConfig(directions="from_audio"), "temporal"),
        ("audio_temporal", AudioVisualConfig(directions="to_audio"), "audio"),
    ],
)
def test_one_direction_alone_updates_one_expert_and_has_no_weights_for_the_other(bridge, settings, updated):
    run, tokens, _ = _bridge(bridge, **{bridge: settings})
    assert set(run(tokens)) == {updated}
    model = tiny_model("ca2st", shared_bottleneck=False, **{bridge: settings})
    widening = {name for name, bottleneck in model.layers[1].bottlenecks.items() if bottleneck.up is not None}
    assert {name for name in widening if name.endswith(bridge)} == {f"{updated}_in_{bridge}"}


@pytest.mark.parametrize("kind", JOINED_KINDS)
def test_no_positions_means_no_tables_and_no_time_codes(kind):
    none = AudioVisualConfig(positions="none")
    model = tiny_model(
        kind, spatial_temporal=SpatialTemporalConfig(positions="none"), audio_spatial=none, audio_temporal=none
    )
    names = [name for name, _ in model.layers.named_parameters()]
    assert model.time_codes is None
    assert not [name for name in names if "positions" in name]


def test_learned_audio_positions_have_the_published_shapes():
    learned = AudioVisualConfig(positions="learned")
    model = tiny_model("cava", audio_spatial=learned)
    a2s = model.layers[0].bridges["audio_spatial"].directions["a2s"]
    num_audio = model.experts["audio"].grid.num_patches
    shapes = {name: tuple(table.shape) for name, table in a2s.named_parameters() if "table" in name}
    assert shapes == {
        "query_positions.time_table": (2, 16),
        "query_positions.space_table": (4, 16),
        "key_positions.time_table": (1, 16),
        "key_positions.space_table": (num_audio, 16),
    }


def test_separate_bottlenecks_give_each_bridge_its_own_down_and_up():
    shared, separate = tiny_model("ca2st"), tiny_model("ca2st", shared_bottleneck=False)
    assert set(shared.layers[1].bottlenecks) == {"spatial", "temporal", "audio"}
    own = {f"{e}_in_{name}" for name, bca in separate.layers[1].bridges.items() for e in bca.bridge.experts}
    assert set(separate.layers[1].bottlenecks) == own
    assert len(own) == 6


@pytest.mark.parametrize("ratio", [1 / 8, 1 / 4, 1 / 2, 1.0])
def test_the_published_bottleneck_ratios_run(ratio):
    model = tiny_model("ca2st", bottleneck_ratio=ratio)
    assert model.layers[0].bottlenecks["audio"].down.out_features == 32 * ratio
    assert model(*inputs_for()).logits["label"].shape == (2, 5)
