"""Which query meets which key, window by window, against the definition written out place by place."""

import pytest
import torch

from ca2st.model.attention import CrossAttention, into_windows, out_of_windows

FRAMES, HEADS, DIM = 3, 2, 8


def _who_hears(window, grouping, *, query_patches, key_patches):
    """For every (frame, patch) of the queries: the (frame, patch) places of the keys that change what it gathers."""
    torch.manual_seed(0)
    attention = CrossAttention(DIM, HEADS, window=window, grouping=grouping)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_()
    queries = torch.randn(1, FRAMES, query_patches, DIM)
    keys = torch.randn(1, FRAMES, key_patches, DIM, requires_grad=True)
    out = attention(queries, keys)
    heard = {}
    for t in range(FRAMES):
        for p in range(query_patches):
            (gradient,) = torch.autograd.grad(out[0, t, p].sum(), keys, retain_graph=True)
            heard[t, p] = {(a, b) for a, b in gradient[0].abs().sum(-1).nonzero().tolist()}
    return heard


def _all_frames(places):
    return {(t, p) for t in range(FRAMES) for p in places}


def test_a_place_of_a_finer_map_hears_the_token_that_lies_over_it_in_every_frame():
    """8 x 8 places, 4 x 4 tokens: place (y, x) uses the token at (y * 4 // 8, x * 4 // 8)."""
    heard = _who_hears("time", "square", query_patches=64, key_patches=16)
    for y in range(8):
        for x in range(8):
            assert heard[1, y * 8 + x] == _all_frames([(y * 4 // 8) * 4 + x * 4 // 8])


def test_a_place_of_a_coarser_map_hears_four_tokens_in_raster_order_as_the_reference_does():
    """2 x 2 places, 4 x 4 tokens in groups of four neighbours: place k hears tokens 4k .. 4k + 3."""
    heard = _who_hears("time", "raster", query_patches=4, key_patches=16)
    assert [heard[0, k] for k in range(4)] == [_all_frames(range(4 * k, 4 * k + 4)) for k in range(4)]


def test_a_place_of_a_coarser_map_hears_the_square_of_tokens_under_it_when_asked():
    heard = _who_hears("time", "square", query_patches=4, key_patches=16)
    assert heard[2, 1] == _all_frames([2, 3, 6, 7])
    assert heard[2, 2] == _all_frames([8, 9, 12, 13])


def test_tokens_hear_the_square_of_a_finer_map_that_lies_under_them():
    heard = _who_hears("time", "square", query_patches=4, key_patches=16)
    turned = _who_hears("time", "square", query_patches=16, key_patches=4)
    assert {(q, k) for k, qs in heard.items() for q in qs} == {(k, q) for k, qs in turned.items() for q in qs}


@pytest.mark.parametrize(("query_patches", "key_patches"), [(16, 4), (4, 16), (9, 9)])
def test_a_window_of_space_is_the_frame_whatever_the_grids(query_patches, key_patches):
    heard = _who_hears("space", "raster", query_patches=query_patches, key_patches=key_patches)
    assert all(places == {(t, p) for p in range(key_patches)} for (t, _), places in heard.items())


@pytest.mark.parametrize("window", ["time", "space", "space_time"])
@pytest.mark.parametrize("grouping", ["raster", "square"])
@pytest.mark.parametrize("num_places", [4, 16])
def test_what_is_split_into_windows_and_merged_is_what_it_was(window, grouping, num_places):
    patches = torch.randn(2, FRAMES, 16, DIM)
    split = into_windows(patches, window, num_heads=HEADS, num_places=num_places, grouping=grouping)
    merged = out_of_windows(split, window, batch=2, frames=FRAMES, num_places=num_places, grouping=grouping)
    assert torch.equal(merged, patches)
