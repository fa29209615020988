import pytest
import torch
from torch import nn

from ca2st.model.layers import DropPath, drop_path
from support.models import inputs_for, tiny_model, wake


def test_nothing_is_dropped_in_evaluation():
    residual = torch.randn(8, 3, 2)
    assert torch.equal(DropPath(0.5).eval()(residual), residual)


def test_rate_zero_is_the_identity():
    assert isinstance(drop_path(0.0), nn.Identity)


def test_whole_clips_are_dropped_and_the_others_scaled_up():
    torch.manual_seed(0)
    dropped = DropPath(0.25).train()(torch.ones(4000, 3, 2))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])
    of_clips = dropped.flatten(1)
    assert torch.equal(of_clips.amin(1), of_clips.amax(1))
    assert (of_clips[:, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_the_same_seed_drops_the_same_clips():
    model = tiny_model("ca2st", drop_path_rate=0.5).train()
    wake(model)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(*inputs_for(batch=4)).logits["label"].sum().item())
    assert losses[0] == losses[1] != losses[2]


def _rates(model, name):
    modules = [dict(layer.named_modules())[name] for layer in model.layers]
    return [0.0 if isinstance(m, nn.Identity) else 1 - m.keep.item() for m in modules]


def test_rates_rise_with_the_layer_and_only_the_audio_expert_drops_its_attention():
    model = tiny_model("ca2st", depth=3, drop_path_rate=0.2)
    rising = pytest.approx([0, 0.1, 0.2])
    assert _rates(model, "drop_update") == rising
    for expert in ("spatial", "temporal", "audio"):
        assert _rates(model, f"adapters.{expert}.drop_parallel") == rising
    assert _rates(model, "adapters.audio.drop_attended") == rising
    assert _rates(model, "adapters.spatial.drop_attended") == [0, 0, 0]
    assert _rates(model, "adapters.temporal.drop_attended") == [0, 0, 0]
