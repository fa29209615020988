"""Position tables for another grid than the one they were made for."""

import pytest
import torch
from torch.nn.functional import interpolate

from ca2st.errors import UserInputError
from ca2st.model.tokens import resize_table, sinusoid_table


def _random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _in_time(table, num_times):
    return resize_table(table, from_grid=(table.shape[0],), to_grid=(num_times,))


def test_a_grid_that_stays_gives_the_same_table_bit_for_bit():
    picture, clip, line = _random(196, 8), sinusoid_table(8 * 196, 8), _random(8, 8)
    assert resize_table(picture, from_grid=(14, 14), to_grid=(14, 14)) is picture
    assert resize_table(clip, from_grid=(8, 14, 14), to_grid=(8, 14, 14)) is clip
    assert resize_table(line, from_grid=(8,), to_grid=(8,)) is line


@pytest.mark.parametrize("to_grid", [(7, 7), (24, 24), (3, 9)])
def test_learned_grids_are_resized_as_pictures_row_by_row(to_grid):
    table = _random(196, 5)
    picture = table.reshape(14, 14, 5).permute(2, 0, 1)[None]
    expected = (
        interpolate(picture, size=to_grid, mode="bicubic", align_corners=False)[0].permute(1, 2, 0).reshape(-1, 5)
    )
    assert torch.equal(resize_table(table, from_grid=(14, 14), to_grid=to_grid), expected)


def test_a_grid_that_is_no_square_keeps_rows_and_columns_apart():
    by_column = torch.tensor([0.0, 3.0]).repeat(3)[:, None]
    found = resize_table(by_column, from_grid=(3, 2), to_grid=(3, 4)).reshape(3, 4)
    assert torch.equal(found, found[:1].expand(3, 4))
    assert (found.diff(dim=1) > 0).all()


@pytest.mark.parametrize("axes", [2, 3])
def test_a_constant_table_stays_constant_and_a_mirrored_one_mirrored(axes):
    small, large = (4,) * axes, (7,) * axes
    rows = 4**axes
    assert torch.allclose(resize_table(torch.full((rows, 2), 3.5), from_grid=small, to_grid=large), torch.tensor(3.5))
    table = _random(rows, 3)
    flipped = table.reshape(*small, 3).flip(0).reshape(rows, 3)
    expected = resize_table(table, from_grid=small, to_grid=large).reshape(*large, 3).flip(0).reshape(-1, 3)
    assert torch.allclose(resize_table(flipped, from_grid=small, to_grid=large), expected, atol=1e-6)


def test_doubled_frames_lie_a_quarter_before_and_after_each_old_one():
    """By hand: centres of half as long cells, the ends held."""
    assert _in_time(torch.tensor([[0.0], [4.0], [8.0]]), 6).squeeze(1).tolist() == [0, 1, 3, 5, 7, 8]


def test_halved_frames_are_the_means_of_two():
    table = _random(16, 6)
    assert torch.allclose(_in_time(table, 8), table.reshape(8, 2, 6).mean(dim=1), atol=1e-6)


@pytest.mark.parametrize("times", [4, 8, 16])
def test_other_frames_of_a_clip_leave_its_places_alone(times):
    """Along one axis only: every patch has its own line through time."""
    table = sinusoid_table(8 * 9, 6)
    found = resize_table(table, from_grid=(8, 3, 3), to_grid=(times, 3, 3)).reshape(times, 9, 6)
    for patch in range(9):
        line = table.reshape(8, 9, 6)[:, patch]
        assert torch.allclose(found[:, patch], _in_time(line, times), atol=1e-6)


def test_another_crop_of_a_clip_leaves_its_times_alone():
    table = _random(2 * 16, 3)
    found = resize_table(table, from_grid=(2, 4, 4), to_grid=(2, 6, 6)).reshape(2, 36, 3)
    for time in range(2):
        picture = table.reshape(2, 4, 4, 3)[time].permute(2, 0, 1)[None]
        expected = interpolate(picture, size=(6, 6), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
        assert torch.allclose(found[time], expected.reshape(36, 3), atol=1e-6)


def test_half_precision_tables_are_computed_in_full_and_keep_their_type():
    table = _random(16, 4).bfloat16()
    found = resize_table(table, from_grid=(4, 4), to_grid=(6, 6))
    expected = resize_table(table.float(), from_grid=(4, 4), to_grid=(6, 6))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())


def test_a_table_of_another_grid_is_refused():
    with pytest.raises(UserInputError, match=r"position table: expected the 196 rows of 14 x 14, found 197"):
        resize_table(_random(197, 2), from_grid=(14, 14), to_grid=(7, 7))
    with pytest.raises(UserInputError, match=r"expected the 1568 rows of 8 x 14 x 14, found 784"):
        resize_table(_random(784, 2), from_grid=(8, 14, 14), to_grid=(4, 14, 14))
