"""Masks, roll and noise of the spectrogram."""

import numpy as np
import pytest

from ca2st.errors import UserInputError
from pipelines.augment.spectrogram import (
    MEL_MEAN,
    MEL_SCALE,
    UNCHANGED,
    SpectrogramConfig,
    SpectrogramDraw,
    mel_view,
    normal_numbers,
)
from support.refusals import forced

ROWS, BINS = 400, 128
PUBLISHED = SpectrogramConfig(time_masks=2, frequency_masks=2)


def drawn(config: SpectrogramConfig, seed: int = 0) -> SpectrogramDraw:
    numbers = np.random.default_rng(seed).random(config.num_numbers).tolist()
    return config.drawn(numbers, num_rows=ROWS, num_bins=BINS, key=("noise", seed))


def stored(rows: int = ROWS) -> np.ndarray:
    """Row r holds -(r + 1) / 100."""
    return np.repeat(-(np.arange(rows, dtype=np.float16)[:, None] + 1) / 100, BINS, axis=1).astype(np.float16)


def view(draw: SpectrogramDraw, rows: int = ROWS) -> np.ndarray:
    return mel_view(stored(rows), start_row=0, num_rows=ROWS, has_audio=True, draw=draw)


def test_published_masks_are_two_stretches_and_two_bands_of_zeros() -> None:
    draws = [drawn(PUBLISHED, seed) for seed in range(600)]
    assert all(len(draw.masked_rows) == len(draw.masked_bins) == 2 for draw in draws)
    lengths = np.array([end - first for draw in draws for first, end in draw.masked_rows])
    widths = np.array([end - first for draw in draws for first, end in draw.masked_bins])
    assert (lengths.min(), lengths.max()) == (0, 70)
    assert (widths.min(), widths.max()) == (0, 20)
    assert lengths.mean() == pytest.approx(35, rel=0.1)
    ends = [end for draw in draws for _, end in draw.masked_rows]
    assert max(ends) <= ROWS
    assert max(ends) > 0.95 * ROWS


def test_a_mask_is_zero_after_normalising_and_the_rest_stays() -> None:
    draw = drawn(PUBLISHED, 4)
    plain, masked = view(UNCHANGED), view(draw)
    inside = np.zeros((ROWS, BINS), dtype=bool)
    for first, end in draw.masked_rows:
        inside[first:end] = True
    for first, end in draw.masked_bins:
        inside[:, first:end] = True
    assert inside.any()
    assert (masked[inside] == 0).all()
    assert np.array_equal(masked[~inside], plain[~inside])


@pytest.mark.parametrize("roll", [0, 7, -7])
def test_a_roll_moves_rows_and_those_that_leave_come_in_at_the_other_end(roll: int) -> None:
    assert np.array_equal(view(SpectrogramDraw(roll=roll)), np.roll(view(UNCHANGED), roll, axis=0))


def test_rolls_are_even_to_both_sides() -> None:
    rolls = np.array([drawn(SpectrogramConfig(roll_rows=10), seed).roll for seed in range(2000)])
    assert (rolls.min(), rolls.max()) == (-10, 10)
    assert abs(rolls.mean()) < 0.5


def test_noise_has_the_asked_deviation_and_is_the_same_again() -> None:
    draw = drawn(SpectrogramConfig(noise_std=0.5))
    noise = view(draw) - view(UNCHANGED)
    assert noise.std() == pytest.approx(0.5, rel=0.02)
    assert abs(noise.mean()) < 0.01
    assert np.array_equal(view(draw), view(drawn(SpectrogramConfig(noise_std=0.5))))
    assert not np.array_equal(view(draw), view(drawn(SpectrogramConfig(noise_std=0.5), seed=1)))


def test_noise_by_signal_to_noise_ratio_follows_the_views_own_level() -> None:
    plain = view(UNCHANGED)
    noise = view(drawn(SpectrogramConfig(noise_snr_db=20.0))) - plain
    assert noise.std() == pytest.approx(0.1 * np.sqrt((plain.astype(np.float64) ** 2).mean()), rel=0.02)


def test_masks_stay_zero_under_noise() -> None:
    config = SpectrogramConfig(time_masks=2, noise_std=1.0)
    draw = drawn(config, 2)
    assert all((view(draw)[first:end] == 0).all() for first, end in draw.masked_rows)


def test_without_audio_all_stays_zero() -> None:
    draw = drawn(SpectrogramConfig(time_masks=1, roll_rows=5, noise_std=1.0))
    assert not mel_view(stored(0), start_row=0, num_rows=ROWS, has_audio=False, draw=draw).any()


def test_padding_rolls_with_the_clip() -> None:
    padded = view(SpectrogramDraw(roll=3), rows=100)
    assert padded[2] == pytest.approx(-MEL_MEAN / MEL_SCALE)
    assert padded[3] == pytest.approx((-0.01 - MEL_MEAN) / MEL_SCALE, abs=1e-4)


def test_by_default_nothing_happens() -> None:
    assert np.array_equal(view(drawn(SpectrogramConfig())), view(UNCHANGED))


def test_box_and_muller_numbers_are_normal() -> None:
    numbers = normal_numbers(("n",), 50_001)
    assert len(numbers) == 50_001
    assert numbers.mean() == pytest.approx(0, abs=0.02)
    assert numbers.std() == pytest.approx(1, abs=0.02)
    assert (np.abs(numbers) < 1).mean() == pytest.approx(0.6827, abs=0.01)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"time_masks": -1}, "augment.spectrogram.time_masks: expected at least 0"),
        ({"roll_rows": -3}, "augment.spectrogram.roll_rows: expected at least 0, found -3"),
        ({"noise_std": float("nan")}, "augment.spectrogram.noise_std: expected >= 0"),
        ({"noise_std": 0.1, "noise_snr_db": 10.0}, "noise_std or a finite noise_snr_db, found 0.1 and 10.0"),
        ({"noise_snr_db": -1e5}, "augment.spectrogram.noise_snr_db: expected -120 to 120, found -100000.0"),
    ],
)
def test_a_wrong_setting_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        forced(SpectrogramConfig(), **values)
