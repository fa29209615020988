"""Encoders in other roles, other grids than they were pretrained on, and an expert that nobody foresaw."""

import re
import textwrap
from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import nn

from ca2st.errors import UserInputError
from ca2st.model import experts as experts_module
from ca2st.model.config import Bridge, Direction, ModelConfig
from ca2st.model.experts import ClipExpert, TransformerExpert, VideoMAEExpert
from ca2st.model.layers import HolisticLayer
from ca2st.model.tokens import TokenGrid, resize_table, sinusoid_table
from ca2st.spec import ClipSpec
from support.models import TINY_CLIP, expert_inputs, inputs_for, tiny_config, tiny_model, wake


@pytest.mark.parametrize(
    ("spatial", "temporal"), [("clip", "clip"), ("videomae", "clip"), ("videomae", "videomae"), ("clip", "videomae")]
)
def test_any_visual_encoder_fills_either_role_and_starts_as_itself(spatial, temporal):
    types = {"clip": ClipExpert, "videomae": VideoMAEExpert}
    model = tiny_model("cast", spatial_encoder=spatial, temporal_encoder=temporal)
    assert type(model.experts["spatial"]) is types[spatial]
    assert type(model.experts["temporal"]) is types[temporal]
    with torch.no_grad():
        features = model(*inputs_for()).features
        for name, expert in model.experts.items():
            torch.testing.assert_close(features[name], expert(expert_inputs()))


def test_two_experts_of_one_encoder_have_weights_of_their_own():
    model = tiny_model("cast", spatial_encoder="videomae")
    features = model(*inputs_for()).features
    assert not torch.allclose(features["spatial"], features["temporal"])


@pytest.mark.parametrize("num_frames", [8, 16, 32])
def test_videomae_reads_its_pretrained_positions_stretched_to_other_clips(num_frames):
    config = tiny_config("temporal", pretrained_num_frames=16, pretrained_crop_size=48)
    clip = ClipSpec(num_frames=num_frames, crop_size=64)
    expert = VideoMAEExpert(config, clip)
    known = sinusoid_table(8 * 3 * 3, 32)
    expected = resize_table(known, from_grid=(8, 3, 3), to_grid=(num_frames // 2, 4, 4))
    torch.testing.assert_close(expert.positions, expected)
    at_home = VideoMAEExpert(config, ClipSpec(num_frames=16, crop_size=48))
    assert torch.equal(at_home.positions, known)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pretrained_num_frames": 7}, "pretrained_num_frames: expected an even number >= 2, found 7"),
        ({"pretrained_crop_size": 100}, "pretrained_crop_size: expected a multiple of 16, found 100"),
    ],
)
def test_a_pretrained_grid_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(UserInputError, match=message):
        ModelConfig(**wrong)


class DepthExpert(TransformerExpert):
    """One token per frame, from its mean brightness: an expert of another kind, written outside the package."""

    def __init__(self, config: ModelConfig, clip: ClipSpec) -> None:
        frames = clip.num_frames // 2
        grid = TokenGrid(num_sequences=1, num_prefix=0, num_frames=frames, num_patches=1, dim=config.dim)
        super().__init__(config, grid)
        self.patch_embed = nn.Linear(3, config.dim)

    def embed(self, inputs):
        return self.patch_embed(rearrange(inputs.video[:, :, ::2].mean(dim=(3, 4)), "b c t -> b 1 t c"))

    def pool(self, tokens):
        return tokens.mean(dim=(1, 2))


@pytest.mark.parametrize("fusion", ["cross_attention", "lateral"])
def test_a_fourth_expert_joins_without_a_change_of_the_layer(fusion):
    config = tiny_config("spatial", fusion=fusion)
    experts = {"spatial": ClipExpert(config, TINY_CLIP), "depth": DepthExpert(config, TINY_CLIP)}
    directions = (
        Direction(name="d2s", keys="depth", queries="spatial", window="space"),
        Direction(name="s2d", keys="spatial", queries="depth", window="space"),
    )
    bridge = Bridge(name="depth_spatial", directions=directions, positions="learned")
    layer = HolisticLayer(config, experts, (bridge,), index=1)
    own = {name: expert.layer_at(1) for name, expert in experts.items()}
    tokens = {name: expert.embed(expert_inputs()) for name, expert in experts.items()}
    wake(layer)
    layer.whole = True
    before = layer(tokens, own, None)
    for speaker, listener in (("depth", "spatial"), ("spatial", "depth")):
        louder = tokens | {speaker: tokens[speaker] + 1}
        assert not torch.allclose(layer(louder, own, None)[listener], before[listener])


def test_the_expert_that_contributing_adds_works_with_the_names_of_its_file(monkeypatch):
    text = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text()
    (example,) = re.findall(r"```python\n( +class PatchExpert.*?)```", text, flags=re.DOTALL)
    names = dict(vars(experts_module))
    exec(compile(textwrap.dedent(example), "CONTRIBUTING.md", "exec"), names)
    monkeypatch.setitem(experts_module.ENCODERS, "clip", names["PatchExpert"])
    model = tiny_model("cast")
    assert type(model.experts["spatial"]) is names["PatchExpert"]
    features = model(*inputs_for()).features["spatial"]
    torch.testing.assert_close(features, model.experts["spatial"](expert_inputs()))
