import pytest
import torch
from einops import rearrange
from torch import nn

from ca2st.model.attention import CrossAttention, SelfAttention
from support.models import wake

DIM, HEADS = 24, 3


def _independent(weights_qkv, bias_qkv, proj: nn.Linear, q, kv) -> torch.Tensor:
    """torch's own nn.MultiheadAttention with the given weights."""
    attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight.copy_(weights_qkv)
        attention.in_proj_bias.copy_(bias_qkv)
        attention.out_proj.load_state_dict(proj.state_dict())
    return attention(q, kv, kv, need_weights=False)[0]


@pytest.mark.parametrize("bias", ["qkv", "qv"])
def test_self_attention_equals_torchs_multihead_attention(bias):
    ours = SelfAttention(DIM, HEADS, bias=bias)
    wake(ours)
    tokens = torch.randn(2, 3, 5, DIM)
    biases = ours.qkv.bias if bias == "qkv" else torch.cat((ours.q_bias, torch.zeros(DIM), ours.v_bias))
    flat = tokens.flatten(0, 1)
    expected = _independent(ours.qkv.weight, biases, ours.proj, flat, flat)
    torch.testing.assert_close(ours(tokens).flatten(0, 1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("window", "group"),
    [("time", "b t p d -> (b p) t d"), ("space", "b t p d -> (b t) p d"), ("space_time", "b t p d -> b (t p) d")],
)
def test_windowed_cross_attention_equals_torchs_multihead_attention_inside_each_window(window, group):
    ours = CrossAttention(DIM, HEADS, window=window)
    wake(ours)
    queries, keys = torch.randn(2, 2, 4, 3, DIM)
    weights = torch.cat((ours.q.weight, ours.kv.weight))
    biases = torch.cat((ours.q.bias, ours.kv.bias))
    expected = _independent(weights, biases, ours.proj, rearrange(queries, group), rearrange(keys, group))
    torch.testing.assert_close(rearrange(ours(queries, keys), group), expected, atol=1e-5, rtol=0)


def test_global_cross_attention_takes_grids_of_different_sizes():
    attention = CrossAttention(DIM, HEADS, window="space_time")
    assert attention(torch.randn(2, 4, 9, DIM), torch.randn(2, 1, 7, DIM)).shape == (2, 4, 9, DIM)
