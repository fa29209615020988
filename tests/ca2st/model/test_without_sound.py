"""A clip without sound is masked: nothing of its spectrogram, silence or not, reaches what the model sees or says."""

import pytest
import torch
from torch import Tensor

from ca2st.model.network import HolisticModel, ModelOutput
from support.models import inputs_for, tiny_model, wake

SILENT = torch.tensor([False, True])
SWITCHES = [
    {},
    {"combination": "parallel"},
    {"fusion": "lateral"},
    {"fusion": "late_add"},
    {"fusion": "late_concat"},
]


def awake(kind: str, **switches: object) -> HolisticModel:
    model = tiny_model(kind, **switches).eval()
    wake(model.layers)
    wake(model.head)
    return model


def run(
    model: HolisticModel, mel: Tensor | None = None, has_audio: Tensor | None = SILENT, **keys: Tensor
) -> ModelOutput:
    video, own, intervals = inputs_for()
    with torch.no_grad():
        return model(video, own if mel is None else mel, intervals, has_audio, **keys)


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "+".join(map(str, s.values())) or "published")
@pytest.mark.parametrize("kind", ["cava", "ca2st"])
def test_masked_audio_changes_no_visual_feature_and_no_answer(kind: str, switches: dict[str, object]) -> None:
    model = awake(kind, **switches)
    mel = inputs_for()[1]
    other = mel.clone()
    other[0] = torch.randn(mel[0].shape, generator=torch.Generator().manual_seed(7))
    first, second = run(model), run(model, other)
    heard_first, heard_second = run(model, has_audio=None), run(model, other, has_audio=None)
    for name in set(first.features) - {"audio"}:
        assert torch.equal(first.features[name], second.features[name])
    assert torch.equal(first.logits["label"], second.logits["label"])
    assert not torch.equal(heard_first.logits["label"][0], heard_second.logits["label"][0])
    torch.testing.assert_close(first.logits["label"][1], heard_first.logits["label"][1])  # its neighbour is heard


@pytest.mark.parametrize("combination", ["sequential", "parallel"])
def test_a_masked_clip_is_seen_as_if_the_bridges_to_the_audio_expert_were_not_there(combination: str) -> None:
    model = awake("ca2st", combination=combination)
    masked = run(model).features
    for layer in model.layers:
        for name in [name for name, bridge in layer.bridges.items() if "audio" in bridge.bridge.experts]:
            del layer.bridges[name]
    alone = run(model, has_audio=None).features
    for name in ("spatial", "temporal"):
        torch.testing.assert_close(masked[name][0], alone[name][0])
        assert not torch.allclose(masked[name][1], alone[name][1])


@pytest.mark.parametrize("kind", ["cava", "ca2st", "audio"])
def test_a_mask_that_masks_nothing_changes_nothing(kind: str) -> None:
    model = awake(kind)
    assert torch.equal(
        run(model, has_audio=torch.tensor([True, True])).logits["label"], run(model, has_audio=None).logits["label"]
    )


def test_masked_audio_keys_leave_the_head_its_own_ear() -> None:
    model, nobody = awake("ca2st"), torch.tensor([False, False])
    masked, silent, heard = (
        run(model, None, None, audio_keys=nobody),
        run(model, has_audio=nobody),
        run(model, None, None),
    )
    for name in ("spatial", "temporal"):
        assert torch.equal(masked.features[name], silent.features[name])
        assert not torch.allclose(masked.features[name], heard.features[name])
    assert not torch.allclose(masked.logits["label"], silent.logits["label"])


def test_a_clip_without_sound_trains_no_weight_of_the_audio_expert() -> None:
    model = tiny_model("ca2st").train()
    wake(model.layers)
    video, mel, intervals = inputs_for()
    output = model(video, mel, intervals, SILENT)
    output.logits["label"][0].sum().backward()
    heard = [
        parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and (".audio." in name or "audio_spatial" in name or "audio_temporal" in name)
    ]
    assert heard
    assert all(not bool(gradient.any()) for gradient in heard)
    assert any(bool(p.grad.any()) for p in model.head.parameters() if p.grad is not None)
