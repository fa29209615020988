import math

import pytest
import torch

from ca2st.model.tokens import LearnedPositions, TokenGrid, sinusoid_table

GRID = TokenGrid(num_sequences=3, num_prefix=1, num_frames=3, num_patches=4, dim=8)


def test_the_fixed_table_has_sines_at_even_and_cosines_at_odd_columns():
    table = sinusoid_table(10, 6)
    assert table.dtype == torch.float32
    for position in (0, 1, 9):
        for column in range(6):
            angle = position / 10000 ** (2 * (column // 2) / 6)
            expected = math.sin(angle) if column % 2 == 0 else math.cos(angle)
            assert table[position, column].item() == pytest.approx(expected, abs=1e-7)


def test_the_fixed_table_is_computed_in_float64():
    angle = 1567.0
    assert sinusoid_table(1568, 4)[1567, 0].item() == torch.tensor(math.sin(angle), dtype=torch.float32).item()


@pytest.mark.parametrize(
    ("window", "tables"),
    [
        ("time", {"time_table": (3, 8)}),
        ("space", {"space_table": (4, 8)}),
        ("space_time", {"time_table": (3, 8), "space_table": (4, 8)}),
    ],
)
def test_learned_tables_span_the_axes_of_their_window(window, tables):
    positions = LearnedPositions(GRID, 8, 2, window=window)
    assert {name: tuple(table.shape) for name, table in positions.named_parameters()} == tables


def test_learned_codes_are_added_by_frame_and_by_patch():
    positions = LearnedPositions(GRID, 8, 2, window="space_time")
    added = positions(torch.zeros(2, 3, 4, 8))
    torch.testing.assert_close(added[1, 2, 3], positions.time_table[2] + positions.space_table[3])


def test_learned_tables_start_with_the_published_deviation():
    big = TokenGrid(num_sequences=1, num_prefix=0, num_frames=500, num_patches=4, dim=8)
    table = LearnedPositions(big, 384, 12, window="time").time_table
    assert table.std().item() == pytest.approx((384 / 12) ** -0.5, rel=0.02)


def test_a_grid_that_is_split_and_joined_gives_the_same_tokens():
    grids = (
        GRID,
        TokenGrid(num_sequences=1, num_prefix=0, num_frames=3, num_patches=4, dim=5),
        TokenGrid(num_sequences=1, num_prefix=2, num_frames=1, num_patches=7, dim=5),
    )
    for grid in grids:
        tokens = torch.randn(2, grid.num_sequences, grid.num_tokens, 5)
        prefix, patches = grid.split(tokens)
        assert patches.shape == (2, grid.num_frames, grid.num_patches, 5)
        assert torch.equal(grid.join(prefix, patches), tokens)
