"""What happens to a clip's spectrogram: rolled along time, noise added, rows and bins masked, in this order.

Roll comes before normalising, noise and masks after it. A roll by k rows puts row i - k at row i; the k rows that leave
at one end come in at the other. The spectrogram and the frames share a time base, so the view's interval moves along:
row i keeps its own time, all but the k rows that went round.

Source: Park et al., "SpecAugment" (2019); noise and roll as in AST's recipes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ca2st.errors import UserInputError
from pipelines.errors import check_range
from pipelines.keyed_random import Key, uniforms

MEL_MEAN = -4.2677393
MEL_SCALE = 2 * 4.5689974
"""(x - MEL_MEAN) / MEL_SCALE is what the audio expert was trained on (AudioSet statistics of AST)."""
_MOST_DECIBELS = 120
"""Noise a million times weaker or stronger than the view: what lies beyond is a slip, and far beyond no number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpectrogramConfig:
    """Augmentation of the spectrogram; nothing by default.

    Published: ``time_masks = 2``, ``time_mask_rows = 70``, ``frequency_masks = 2``, ``frequency_mask_bins = 20``, no
    roll and no noise.
    """

    time_masks: int = 0
    """Stretches of rows that become zero after normalising: the mean of what the audio expert was trained on."""
    time_mask_rows: int = 70
    """Longest stretch, in rows of 10 ms; lengths are even over 0 .. this."""
    frequency_masks: int = 0
    """Bands of mel bins that become zero."""
    frequency_mask_bins: int = 20
    """Widest band, in bins; widths are even over 0 .. this."""
    roll_rows: int = 0
    """Farthest circular shift along time, either way, in rows; AST uses 10 for short sounds."""
    noise_std: float = 0.0
    """Standard deviation of normal noise, after normalising."""
    noise_snr_db: float | None = None
    """Instead of `noise_std`: noise this many decibels below the normalised view's own root mean square."""

    def __post_init__(self) -> None:
        sizes = ("time_masks", "time_mask_rows", "frequency_masks", "frequency_mask_bins", "roll_rows")
        check_range(self, "augment.spectrogram.", *sizes, low=0)
        if not (math.isfinite(self.noise_std) and self.noise_std >= 0):
            raise UserInputError(f"augment.spectrogram.noise_std: expected >= 0, found {self.noise_std}")
        if self.noise_snr_db is not None and (self.noise_std or not math.isfinite(self.noise_snr_db)):
            raise UserInputError(
                f"augment.spectrogram: expected noise_std or a finite noise_snr_db, found {self.noise_std} and "
                f"{self.noise_snr_db}; remove one of the two"
            )
        if self.noise_snr_db is not None and abs(self.noise_snr_db) > _MOST_DECIBELS:
            raise UserInputError(
                f"augment.spectrogram.noise_snr_db: expected -{_MOST_DECIBELS} to {_MOST_DECIBELS}, found "
                f"{self.noise_snr_db}"
            )

    def check_rows(self, name: str, num_rows: int) -> None:
        """Raise `UserInputError` for a roll by more than half of a view's rows, most of which would lose their time."""
        if self.roll_rows > num_rows // 2:
            raise UserInputError(
                f"{name}: expected at most half of clip.mel_rows = {num_rows}, that is {num_rows // 2}, found "
                f"{self.roll_rows}; most rows would go round and lose their time"
            )

    @property
    def num_numbers(self) -> int:
        """Uniform numbers that `drawn` reads."""
        return 1 + 2 * (self.time_masks + self.frequency_masks)

    def drawn(self, numbers: Sequence[float], *, num_rows: int, num_bins: int, key: Key) -> "SpectrogramDraw":
        """Return what `numbers` stand for in a view of that size; `key` names the noise."""
        turn, *masks = numbers
        pairs = list(zip(masks[::2], masks[1::2], strict=True))
        stretches = [_stretch(*pair, most=self.time_mask_rows, room=num_rows) for pair in pairs[: self.time_masks]]
        bands = [_stretch(*pair, most=self.frequency_mask_bins, room=num_bins) for pair in pairs[self.time_masks :]]
        has_noise = self.noise_std > 0 or self.noise_snr_db is not None
        return SpectrogramDraw(
            roll=int(turn * (2 * self.roll_rows + 1)) - self.roll_rows,
            masked_rows=tuple(stretches),
            masked_bins=tuple(bands),
            noise=key if has_noise else None,
            noise_std=self.noise_std,
            noise_snr_db=self.noise_snr_db,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectrogramDraw:
    """What is done to one view's spectrogram, fully decided."""

    roll: int = 0
    """Rows by which it moves towards the end, circularly; negative: towards the beginning."""
    masked_rows: tuple[tuple[int, int], ...] = ()
    """(first, end) of the rows that become zero."""
    masked_bins: tuple[tuple[int, int], ...] = ()
    """(first, end) of the bins that become zero."""
    noise: Key | None = None
    """Names the noise; None: none."""
    noise_std: float = 0.0
    noise_snr_db: float | None = None


UNCHANGED = SpectrogramDraw()
"""Nothing is done."""


def mel_view(
    mel: NDArray[np.float16],
    *,
    start_row: int,
    num_rows: int,
    has_audio: bool,
    draw: SpectrogramDraw = UNCHANGED,
) -> NDArray[np.float32]:
    """Return `num_rows` rows from `start_row`: padded with zero rows, rolled, normalised, with noise and masks.

    Without audio all zeros: the mean of what the expert reads, not the value of a padded row.
    """
    view = np.zeros((num_rows, mel.shape[1]), dtype=np.float32)
    if not has_audio:
        return view
    rows = mel[start_row : start_row + num_rows]
    view[: len(rows)] = rows
    if draw.roll:
        view = np.roll(view, draw.roll, axis=0)
    view = (view - np.float32(MEL_MEAN)) / np.float32(MEL_SCALE)
    if draw.noise is not None:
        deviation = draw.noise_std
        if draw.noise_snr_db is not None:
            power = float(np.square(view, dtype=np.float64).mean())
            deviation = math.sqrt(power) * 10 ** (-draw.noise_snr_db / 20)
        view += np.float32(deviation) * normal_numbers(draw.noise, view.size).reshape(view.shape)
    for first, end in draw.masked_rows:
        view[first:end] = 0
    for first, end in draw.masked_bins:
        view[:, first:end] = 0
    return view


def normal_numbers(key: Key, count: int) -> NDArray[np.float32]:
    """Return `count` standard normal numbers, by Box and Muller from the stream named by `key`."""
    pairs = -(-count // 2)
    numbers = uniforms(key, 2 * pairs)
    radius, turn = np.sqrt(-2 * np.log1p(-numbers[:pairs])), 2 * math.pi * numbers[pairs:]
    return np.concatenate([radius * np.cos(turn), radius * np.sin(turn)])[:count].astype(np.float32)


def _stretch(how_long: float, where: float, *, most: int, room: int) -> tuple[int, int]:
    length = int(how_long * (min(most, room) + 1))
    first = int(where * (room - length + 1))
    return first, first + length
