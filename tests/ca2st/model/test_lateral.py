"""Lateral connections: what is added, where, and to whom."""

import torch

from ca2st.model.config import SpatialTemporalConfig
from support.models import expert_inputs, inputs_for, tiny_model, wake


def _tokens_and_updates(kind, bridge, **changes):
    model = tiny_model(kind, fusion="lateral", **changes)
    wake(model.layers)
    tokens = {name: expert.embed(expert_inputs()) for name, expert in model.experts.items()}
    connection = model.layers[-1].bridges[bridge]
    return model, tokens, connection, connection(tokens, {}, None)


def test_equal_grids_are_matched_place_by_place_and_cls_gets_nothing():
    _, tokens, connection, updates = _tokens_and_updates("cast", "spatial_temporal")
    spatial, temporal = tokens["spatial"], tokens["temporal"].reshape(2, 2, 4, 32)
    torch.testing.assert_close(updates["spatial"][:, :, 1:], connection.directions["t2s"](temporal))
    assert not updates["spatial"][:, :, 0].any()
    heard = connection.directions["s2t"](spatial[:, :, 1:])
    torch.testing.assert_close(updates["temporal"].reshape(2, 2, 4, 32), heard)


def test_audio_adds_its_mean_everywhere_and_hears_the_mean_of_the_clip():
    _, tokens, connection, updates = _tokens_and_updates("cava", "audio_spatial")
    audio = connection.directions["a2s"](tokens["audio"][:, :, 2:].mean(dim=2))
    torch.testing.assert_close(updates["spatial"][:, :, 1:], audio[:, :, None].expand(2, 2, 4, 32))
    heard = connection.directions["s2a"](tokens["spatial"][:, :, 1:].mean(dim=(1, 2)))
    torch.testing.assert_close(updates["audio"][:, 0, 2:], heard[:, None].expand(2, tokens["audio"].shape[2] - 2, 32))


def test_one_direction_alone_updates_one_expert():
    _, _, connection, updates = _tokens_and_updates(
        "cast", "spatial_temporal", spatial_temporal=SpatialTemporalConfig(directions="s2t")
    )
    assert set(updates) == {"temporal"}
    assert set(connection.directions) == {"s2t"}


def test_at_step_0_nothing_is_added_and_there_is_no_bottleneck():
    model = tiny_model("ca2st", fusion="lateral")
    with torch.no_grad():
        features = model(*inputs_for()).features
        for name, expert in model.experts.items():
            torch.testing.assert_close(features[name], expert(expert_inputs()))
    names = {name for name, _ in model.layers.named_parameters()}
    assert not [name for name in names if "bottlenecks" in name]
    assert model.time_codes is None


def test_the_map_of_a_resnet_and_tokens_of_another_grid_hear_each_other_frame_by_frame():
    from ca2st.spec import ClipSpec

    clip = ClipSpec(num_frames=4, crop_size=64, mel_rows=48)
    model = tiny_model("cast", fusion="lateral", clip=clip, spatial_encoder="resnet50", depth=4)
    wake(model.layers)
    generator = torch.Generator().manual_seed(0)
    tokens = {
        "spatial": torch.randn(2, 2, 256, 256, generator=generator),
        "temporal": torch.randn(2, 1, 2 * 16, 32, generator=generator),
    }
    connection = model.layers[0].bridges["spatial_temporal"]
    updates = connection(tokens, {}, None)
    heard = connection.directions["t2s"](tokens["temporal"].reshape(2, 2, 16, 32).mean(dim=2, keepdim=True))
    torch.testing.assert_close(updates["spatial"], heard.expand(2, 2, 256, 256))
