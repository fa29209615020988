"""The layer's formulas, written out once more by hand."""

import torch
from torch import Tensor

from ca2st.model.config import AudioVisualConfig, SpatialTemporalConfig
from support.models import TINY_CLIP, expert_inputs, inputs_for, tiny_model, wake


def _layer(kind: str, **changes):
    """A woken last layer, its experts' own layers, tokens and codes."""
    model = tiny_model(kind, **changes)
    wake(model)
    tokens = {name: expert.embed(expert_inputs()) for name, expert in model.experts.items()}
    codes = model.time_codes(inputs_for()[2]) if model.time_codes is not None else None
    model.layers[-1].whole = True
    return model.layers[-1], {name: expert.layers[-1] for name, expert in model.experts.items()}, tokens, codes


def _serial(halves, own, x: Tensor) -> Tensor:
    a = own.attention(own.norm1(x))
    return x + a + halves.serial.up(torch.nn.functional.gelu(halves.serial.down(a)))


def _parallel(halves, own, b: Tensor) -> Tensor:
    normed = own.norm2(b)
    adapted = halves.parallel.up(torch.nn.functional.gelu(halves.parallel.down(normed)))
    return b + own.mlp(normed) + 0.5 * adapted


def test_an_expert_alone_gets_a_serial_and_half_a_parallel_adapter():
    layer, own, tokens, _ = _layer("audio")
    halves = layer.adapters["audio"]
    expected = _parallel(halves, own["audio"], _serial(halves, own["audio"], tokens["audio"]))
    torch.testing.assert_close(layer(tokens, own, None)["audio"], expected)


def _updates(layer, name, tokens, codes):
    bridge = layer.bridges[name]
    return bridge(tokens, layer.bottlenecks_of(bridge.bridge), codes)


def _finish(layer, own, tokens):
    return {name: _parallel(layer.adapters[name], own[name], b) for name, b in tokens.items()}


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)


def test_sequential_bridges_read_what_the_ones_before_them_wrote():
    layer, own, tokens, codes = _layer("ca2st")
    y = {name: _serial(layer.adapters[name], own[name], x) for name, x in tokens.items()}
    for name in ("spatial_temporal", "audio_spatial", "audio_temporal"):
        y = y | {expert: y[expert] + update for expert, update in _updates(layer, name, y, codes).items()}
    _assert_equal(layer(tokens, own, codes), _finish(layer, own, y))


def test_parallel_bridges_read_the_same_and_each_expert_adds_the_mean_of_its_two_updates():
    layer, own, tokens, codes = _layer("ca2st", combination="parallel")
    y = {name: _serial(layer.adapters[name], own[name], x) for name, x in tokens.items()}
    s_t, a_s, a_t = (_updates(layer, n, y, codes) for n in ("spatial_temporal", "audio_spatial", "audio_temporal"))
    y = {
        "spatial": y["spatial"] + (s_t["spatial"] + a_s["spatial"]) / 2,
        "temporal": y["temporal"] + (s_t["temporal"] + a_t["temporal"]) / 2,
        "audio": y["audio"] + (a_s["audio"] + a_t["audio"]) / 2,
    }
    _assert_equal(layer(tokens, own, codes), _finish(layer, own, y))


def test_parallel_with_one_bridge_adds_its_update_whole():
    no_audio = AudioVisualConfig(last_layers=0)
    layer, own, tokens, _ = _layer("ca2st", combination="parallel", audio_spatial=no_audio, audio_temporal=no_audio)
    y = {name: _serial(layer.adapters[name], own[name], x) for name, x in tokens.items()}
    update = _updates(layer, "spatial_temporal", y, None)
    y = y | {name: y[name] + update[name] for name in update}
    _assert_equal(layer(tokens, own, None), _finish(layer, own, y))


def test_drop_path_drops_the_exchange_and_the_parallel_adapter_but_no_ffn():
    """At rate 1 every residual that may be dropped is: what is left is the frozen layer and the serial adapter."""
    layer, own, tokens, codes = _layer("ca2st", drop_path_rate=0.999999)
    torch.manual_seed(0)
    found = layer.train()(tokens, own, codes)
    for name, x in tokens.items():
        y = x if name == "audio" else _serial(layer.adapters[name], own[name], x)
        torch.testing.assert_close(found[name], y + own[name].mlp(own[name].norm2(y)), atol=1e-4, rtol=1e-4)


def test_without_adapters_the_layer_is_the_experts_own():
    layer, own, tokens, _ = _layer("temporal", adapters=False)
    assert torch.equal(layer(tokens, own, None)["temporal"], own["temporal"](tokens["temporal"]))
    assert not list(layer.parameters())


def test_experts_without_a_bridge_do_not_hear_each_other():
    apart = SpatialTemporalConfig(last_layers=0)
    layer, own, tokens, _ = _layer("cast", spatial_temporal=apart)
    alone = layer(tokens | {"temporal": tokens["temporal"] + 1}, own, None)["spatial"]
    assert torch.equal(layer(tokens, own, None)["spatial"], alone)
    assert TINY_CLIP.num_frames // 2 == alone.shape[1]
