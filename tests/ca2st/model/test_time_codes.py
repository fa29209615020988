import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ca2st.model.config import SpatialTemporalConfig
from ca2st.model.tokens import TimeEncoder, audio_patches, cut_interval, parts_of_tokens
from ca2st.spec import ClipSpec
from support.models import TINY_CLIP, inputs_for, tiny_config, tiny_model, wake


@pytest.mark.parametrize(
    ("num_columns", "num_parts", "columns_of_parts"),
    [
        (39, 8, [5, 5, 5, 5, 5, 5, 5, 4]),  # L = 400, 16 frames: the last part is short
        (20, 8, [3, 3, 3, 3, 3, 3, 2, 0]),  # L = 208: the last part is empty
        (40, 4, [11, 11, 11, 7]),  # L = 406, 8 frames
        (40, 16, [3] * 13 + [1, 0, 0]),  # L = 406, 32 frames
        (101, 8, [13, 13, 13, 13, 13, 13, 13, 10]),  # L = 1024
        (4, 8, [1, 1, 1, 1, 0, 0, 0, 0]),  # fewer columns than parts
    ],
)
def test_columns_are_shared_out_as_the_reference_does(num_columns, num_parts, columns_of_parts):
    parts = parts_of_tokens(1, num_columns, num_parts, layout="aligned")
    assert [parts.count(part) for part in range(num_parts)] == columns_of_parts
    assert parts == sorted(parts)


@given(num_columns=st.integers(1, 300), num_parts=st.integers(1, 64))
def test_every_column_belongs_to_an_existing_part(num_columns, num_parts):
    parts = parts_of_tokens(1, num_columns, num_parts, layout="aligned")
    assert min(parts) == 0
    assert max(parts) < num_parts


def test_the_reference_layout_repeats_each_columns_code_although_tokens_run_row_by_row():
    # 2 rows x 3 columns, columns belong to parts 0, 0, 1; tokens are f0t0 f0t1 f0t2 f1t0 f1t1 f1t2
    assert parts_of_tokens(2, 3, 2, layout="reference") == [0, 0, 0, 0, 1, 1]
    assert parts_of_tokens(2, 3, 2, layout="aligned") == [0, 0, 1, 0, 0, 1]


def test_an_interval_is_cut_into_equal_parts_that_touch():
    parts = cut_interval(torch.tensor([[1.0, 5.0], [0.0, 2.0]]), 4)
    assert parts[0].tolist() == [[1, 2], [2, 3], [3, 4], [4, 5]]
    assert parts[1].tolist() == [[0, 0.5], [0.5, 1], [1, 1.5], [1.5, 2]]


def test_patch_grids_of_the_published_spectrograms():
    config = tiny_config("cava")
    assert audio_patches(config, ClipSpec(mel_rows=400)) == (12, 39)
    assert audio_patches(config, ClipSpec(mel_rows=1024)) == (12, 101)


@pytest.mark.parametrize("layout", ["reference", "aligned"])
def test_codes_are_the_two_networks_outputs_for_each_tokens_own_interval(layout):
    config = tiny_config("cava", time_code_layout=layout)
    encoder = TimeEncoder(config, TINY_CLIP)
    _, _, intervals = inputs_for()
    codes = encoder(intervals)
    rows, columns = audio_patches(config, TINY_CLIP)
    assert codes.video.shape == (2, 2, 1, config.bottleneck_dim)
    assert codes.audio.shape == (2, 1, rows * columns, config.bottleneck_dim)
    torch.testing.assert_close(codes.video[1, 1, 0], encoder.video(intervals[1, 2]))
    token = columns + 3  # second row, fourth column
    column = 3 if layout == "aligned" else token // rows
    part = column // (columns // 2 + 1)
    start, end = intervals[0, 0]
    expected = torch.stack((start + (end - start) * part / 2, start + (end - start) * (part + 1) / 2))
    torch.testing.assert_close(codes.audio[0, 0, token], encoder.audio(expected))


def test_the_networks_are_three_linears_with_relu_after_each_and_a_norm_of_torchs_epsilon():
    encoder = TimeEncoder(tiny_config("cava"), TINY_CLIP)
    kinds = [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.LayerNorm]
    assert all(isinstance(module, kind) for module, kind in zip(encoder.audio, kinds, strict=True))
    assert encoder.audio[6].eps == 1e-5


def test_space_and_time_may_exchange_time_codes_too_without_an_audio_part():
    coded = SpatialTemporalConfig(positions="time_codes")
    model = tiny_model("cast", spatial_temporal=coded)
    assert model.time_codes is not None
    assert model.time_codes.audio is None
    for layer in model.layers:
        wake(layer)
    video, mel, intervals = inputs_for()
    features = model(video, mel, intervals).features
    later = model(video, mel, intervals + 3).features
    assert not torch.allclose(features["spatial"], later["spatial"])
