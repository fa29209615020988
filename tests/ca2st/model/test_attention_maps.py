"""What the recorder says was listened to, against the attention that the model really used."""

import math
from dataclasses import replace

import pytest
import torch
from einops import rearrange

from ca2st.model import inspect as attention_maps
from ca2st.model.attention import CrossAttention
from ca2st.model.config import AudioVisualConfig, SpatialTemporalConfig
from ca2st.model.inspect import (
    attend,
    audio_places,
    has_cross_attention,
    record_attention,
    visual_places,
    window_tokens,
)
from ca2st.model.network import whole_last_layer
from support.models import inputs_for, tiny_model, wake

HEADS, FRAMES, PATCHES = 2, 3, 4
NUM_TOKENS = FRAMES * PATCHES
DIM = HEADS * NUM_TOKENS
WINDOWS = ("time", "space", "space_time")


def _showing(window, *, key_tokens=NUM_TOKENS, seed=0):
    """A cross-attention whose output is its weights: key j's value is the jth unit vector in every head."""
    attention = CrossAttention(DIM, HEADS, window=window)
    wake(attention, seed=seed)
    with torch.no_grad():
        attention.proj.weight.copy_(torch.eye(DIM))
        attention.proj.bias.zero_()
        attention.kv.weight[DIM:] = torch.eye(DIM)[:NUM_TOKENS].repeat(HEADS, 1)
        attention.kv.bias[DIM:] = 0
    keys = torch.randn(2, key_tokens, DIM)
    keys[:, :, :NUM_TOKENS] = torch.eye(key_tokens, NUM_TOKENS)
    return attention, keys


def _used(attention, queries, keys):
    """[batch, queries, heads, keys]: the weights of scaled_dot_product_attention itself, zero outside the window."""
    out = rearrange(attention(queries, keys), "b t p (h n) -> b (t p) h n", h=HEADS)
    return out[..., : keys.shape[1] * keys.shape[2]].detach()


def _entropy(weights):
    return -(weights * weights.clamp_min(1e-30).log2()).sum(dim=-1).mean(dim=(1, 2))


@pytest.mark.parametrize("most_scores", [1, 50, 10**6])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_visual_map_is_the_attention_that_was_used(window, most_scores, monkeypatch):
    monkeypatch.setattr(attention_maps, "_MOST_SCORES", most_scores)
    attention, keys = _showing(window)
    queries, keys = torch.randn(2, FRAMES, PATCHES, DIM), rearrange(keys, "b (t p) d -> b t p d", t=FRAMES)
    used = _used(attention, queries, keys)
    places = visual_places(FRAMES, PATCHES)
    given, entropy, num_keys = attend(attention, queries, keys, query_places=places, key_places=places)
    expected = rearrange(used.mean(dim=2), "b (q n) (t p) -> b q n t p", q=FRAMES, t=FRAMES).mean(dim=2)
    torch.testing.assert_close(given, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(entropy, _entropy(used), atol=1e-5, rtol=0)
    assert num_keys == {"time": FRAMES, "space": PATCHES, "space_time": NUM_TOKENS}[window]


def test_an_audio_map_has_the_columns_as_times_and_the_rows_as_places():
    rows, columns = 2, 5
    attention, keys = _showing("space_time", key_tokens=rows * columns)
    queries, keys = torch.randn(2, FRAMES, PATCHES, DIM), keys[:, None]
    heard, by = attend(
        attention,
        queries,
        keys,
        query_places=visual_places(FRAMES, PATCHES),
        key_places=audio_places(rows, columns),
    )[:2]
    used = _used(attention, queries, keys).mean(dim=2)
    expected = rearrange(used, "b (q n) (f t) -> b q n t f", q=FRAMES, f=rows).mean(dim=2)
    torch.testing.assert_close(heard, expected, atol=1e-6, rtol=0)
    assert (by > 0).all()


def test_audio_queries_are_gathered_by_their_column():
    rows, columns = 2, 5
    attention, keys = _showing("space_time")
    queries, keys = torch.randn(2, 1, rows * columns, DIM), rearrange(keys, "b (t p) d -> b t p d", t=FRAMES)
    given = attend(
        attention,
        queries,
        keys,
        query_places=audio_places(rows, columns),
        key_places=visual_places(FRAMES, PATCHES),
    )[0]
    used = _used(attention, queries, keys).mean(dim=2)
    expected = rearrange(used, "b (f q) (t p) -> b f q t p", f=rows, t=FRAMES).mean(dim=1)
    torch.testing.assert_close(given, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("window", WINDOWS)
def test_the_weights_are_the_softmax_by_hand(window):
    attention = CrossAttention(DIM, HEADS, window=window)
    wake(attention)
    queries, keys = torch.randn(2, 1, FRAMES, PATCHES, DIM)
    places = visual_places(FRAMES, PATCHES)
    given = attend(attention, queries, keys, query_places=places, key_places=places)[0]
    q = rearrange(attention.q(queries), "1 t p (h e) -> h (t p) e", h=HEADS)
    k = rearrange(attention.kv(keys)[..., :DIM], "1 t p (h e) -> h (t p) e", h=HEADS)
    scores = q @ k.mT / math.sqrt(DIM / HEADS)
    frame, patch = torch.arange(NUM_TOKENS) // PATCHES, torch.arange(NUM_TOKENS) % PATCHES
    seen = {
        "time": patch[:, None] == patch,
        "space": frame[:, None] == frame,
        "space_time": torch.ones(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool),
    }[window]
    weights = scores.masked_fill(~seen, -math.inf).softmax(dim=-1).mean(dim=0)
    expected = rearrange(weights, "(q n) (t p) -> 1 q n t p", q=FRAMES, t=FRAMES).mean(dim=2)
    torch.testing.assert_close(given, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("grouping", ["raster", "square"])
@pytest.mark.parametrize(("query_patches", "key_patches"), [(16, 4), (4, 16)])
def test_unequal_grids_are_grouped_as_the_model_groups_them(grouping, query_patches, key_patches):
    """Change a key: exactly the queries whose window holds it get another output."""
    attention = CrossAttention(8, 2, window="time", grouping=grouping)
    wake(attention)
    queries, keys = torch.randn(1, 2, query_patches, 8), torch.randn(1, 2, key_patches, 8)
    of_queries, of_keys = window_tokens(attention, (2, query_patches), (2, key_patches))
    changed = keys.clone()
    changed[0, 1, 2] += 1
    moved = (attention(queries, keys) - attention(queries, changed)).abs().sum(dim=-1).flatten() > 1e-6
    window = (of_keys == key_patches + 2).any(dim=1)
    assert set(moved.nonzero().flatten().tolist()) == set(of_queries[window].flatten().tolist())
    places = visual_places(2, query_patches), visual_places(2, key_patches)
    given = attend(attention, queries, keys, query_places=places[0], key_places=places[1])[0]
    torch.testing.assert_close(given.sum(dim=(2, 3)), torch.ones(1, 2))


KINDS_AND_DIRECTIONS = {
    "cast": ["t2s", "s2t"],
    "cava": ["a2s", "s2a"],
    "ca2st": ["t2s", "s2t", "a2s", "s2a", "a2t", "t2a"],
}


@pytest.mark.parametrize("kind", KINDS_AND_DIRECTIONS)
def test_every_direction_of_every_layer_is_recorded_once_and_sums_to_one(kind):
    model = tiny_model(kind)
    wake(model)
    with record_attention(model) as maps, torch.no_grad():
        model(*inputs_for())
    names = KINDS_AND_DIRECTIONS[kind]
    assert [(found.layer, found.direction.name) for found in maps] == [(n, name) for n in (1, 2) for name in names]
    for found in maps:
        batch, query_times, _, _ = found.given.shape
        torch.testing.assert_close(found.by_time.sum(dim=-1), torch.ones(batch, query_times))
        torch.testing.assert_close(found.received.sum(dim=(1, 2)), torch.ones(batch))
        assert (found.given >= 0).all()
        assert ((found.entropy_share > 0) & (found.entropy_share < 1)).all()


def test_times_and_places_of_each_side_are_those_of_its_expert():
    model = tiny_model("ca2st")
    with record_attention(model) as maps, torch.no_grad():
        model(*inputs_for())
    rows, columns = 12, 4
    shapes = {found.direction.name: tuple(found.given.shape[1:]) for found in maps}
    assert shapes["t2s"] == shapes["s2t"] == (2, 2, 4)
    assert shapes["a2s"] == shapes["a2t"] == (2, columns, rows)
    assert shapes["s2a"] == shapes["t2a"] == (columns, 2, 4)


def test_a_window_of_space_keeps_the_attention_inside_the_frame():
    model = tiny_model("cast")
    with record_attention(model) as maps, torch.no_grad():
        model(*inputs_for())
    s2t = next(found for found in maps if found.direction.name == "s2t")
    torch.testing.assert_close(s2t.by_time, torch.eye(2).expand(2, 2, 2))


@pytest.mark.parametrize("window", WINDOWS)
def test_queries_of_zero_listen_to_all_keys_alike(window):
    model = tiny_model("cast", spatial_temporal=SpatialTemporalConfig(t2s_window=window, s2t_window=window))
    wake(model)
    for module in model.modules():
        if isinstance(module, CrossAttention):
            torch.nn.init.zeros_(module.q.weight)
            torch.nn.init.zeros_(module.q.bias)
    with record_attention(model) as maps, torch.no_grad():
        model(*inputs_for())
    for found in maps:
        torch.testing.assert_close(found.entropy_share, torch.ones(2))
        torch.testing.assert_close(found.received, torch.full_like(found.received, 1 / found.received[0].numel()))


def test_one_key_alone_counts_as_even_attention():
    only = attention_maps.AttentionMap(
        layer=1,
        direction=tiny_model("cast").layers[0].bridges["spatial_temporal"].directions["t2s"].direction,
        given=torch.ones(1, 1, 1, 1),
        entropy_bits=torch.zeros(1),
        num_keys=1,
    )
    assert only.entropy_share.tolist() == [1.0]
    assert replace(only, num_keys=4, entropy_bits=torch.ones(1)).entropy_share.tolist() == [0.5]


def test_recording_changes_no_bit_of_the_output():
    model = tiny_model("ca2st")
    wake(model)
    with torch.no_grad(), whole_last_layer(model):
        before = model(*inputs_for())
        with record_attention(model) as maps:
            during = model(*inputs_for())
        after = model(*inputs_for())
    assert maps
    for output in (during, after):
        assert torch.equal(output.logits["label"], before.logits["label"])
        assert all(torch.equal(output.features[name], feature) for name, feature in before.features.items())


def test_maps_of_a_model_that_computes_in_bfloat16_are_float32_and_sum_to_one():
    model = tiny_model("ca2st").eval()
    wake(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), record_attention(model) as maps:
        model(*inputs_for())
    assert maps
    for found in maps:
        assert found.given.dtype == found.entropy_bits.dtype == torch.float32
        torch.testing.assert_close(found.by_time.sum(dim=-1), torch.ones(found.by_time.shape[:2]), atol=1e-5, rtol=0)


def test_gradients_do_not_run_through_the_maps():
    model = tiny_model("cava")
    with record_attention(model) as maps:
        model(*inputs_for()).logits["label"].sum().backward()
    assert not any(found.given.requires_grad for found in maps)


def _hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_the_hooks_are_gone_afterwards_even_after_an_exception():
    model = tiny_model("ca2st")
    with record_attention(model):
        assert _hooks(model) == 12
    assert _hooks(model) == 0
    maps = _record_and_fail(model)
    assert _hooks(model) == 0
    assert len(maps) == 12
    model(*inputs_for())
    assert len(maps) == 12


def _record_and_fail(model):
    maps = []
    try:
        with record_attention(model) as maps:
            model(*inputs_for())
            raise RuntimeError("on the way")
    except RuntimeError:
        return maps


def test_one_direction_alone_is_recorded_alone():
    model = tiny_model("cava", audio_spatial=AudioVisualConfig(directions="to_audio"))
    with record_attention(model) as maps, torch.no_grad():
        model(*inputs_for())
    assert [found.direction.name for found in maps] == ["s2a", "s2a"]


@pytest.mark.parametrize("kind", ["spatial", "temporal", "audio"])
def test_one_expert_alone_has_nothing_to_record(kind):
    model = tiny_model(kind)
    with record_attention(model) as maps, torch.no_grad():
        model(*inputs_for())
    assert maps == []
    assert not has_cross_attention(model)
    assert has_cross_attention(tiny_model("cast"))
