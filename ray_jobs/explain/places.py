"""Where in the video the tokens of an expert lie: seconds for times, rows and columns or hertz for places."""

import math
from dataclasses import dataclass

from ca2st.model.tokens import audio_patches
from ca2st.spec import MEL_ROW_SECONDS
from ray_jobs.explain.explanation import Explanation, Sound
from ray_jobs.pages.axes import Tick, hertz_of_bin, seconds_ticks

_MOST_FRAME_TICKS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioBox:
    """The part of the spectrogram that the grid of audio patches covers, in percent of its sides.

    Patches overlap; each is drawn as wide as the step to the next, around its own centre.
    """

    left: float
    bottom: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """The grids of one explained video."""

    explanation: Explanation

    @property
    def frame_seconds(self) -> list[float]:
        """Middle of each pair of frames: the time of a visual token."""
        seconds = self.explanation.frame_seconds
        return [(first + second) / 2 for first, second in zip(seconds[::2], seconds[1::2], strict=True)]

    @property
    def audio_grid(self) -> tuple[int, int]:
        """(rows, columns) of spectrogram patches."""
        return audio_patches(self.explanation.model, self.explanation.clip)

    def audio_box(self) -> AudioBox:
        """Where the patch grid lies on the spectrogram."""
        model, clip = self.explanation.model, self.explanation.clip
        (rows, columns), stride = self.audio_grid, model.audio_stride
        margin = (model.patch_size - stride) / 2
        return AudioBox(
            left=100 * margin / clip.mel_rows,
            bottom=100 * margin / clip.num_mel_bins,
            width=100 * columns * stride / clip.mel_rows,
            height=100 * rows * stride / clip.num_mel_bins,
        )

    def time_labels(self, expert: str) -> list[str]:
        """Each token time of an expert as ``1.25 s``."""
        if expert == "audio":
            return [f"{self._column_seconds(column):.2f} s" for column in range(self.audio_grid[1])]
        return [f"{seconds:.2f} s" for seconds in self.frame_seconds]

    def ticks(self, expert: str) -> list[Tick]:
        """Seconds on an axis of an expert's token times."""
        if expert == "audio":
            half = self.explanation.model.audio_stride * MEL_ROW_SECONDS / 2
            first, last = self._column_seconds(0) - half, self._column_seconds(self.audio_grid[1] - 1) + half
            return seconds_ticks(first, last, most=5)
        seconds = self.frame_seconds
        every = -(-len(seconds) // _MOST_FRAME_TICKS)
        return [
            Tick(percent=100 * (index + 0.5) / len(seconds), label=f"{moment:.1f}")
            for index, moment in enumerate(seconds)
            if index % every == 0
        ]

    def key_in_words(self, keys: str, time: int, place: int, *, num_places: int) -> str:
        """A key as a person would point at it."""
        if keys == "audio":
            model = self.explanation.model
            hertz = hertz_of_bin(
                place * model.audio_stride + model.patch_size / 2,
                num_bins=self.explanation.clip.num_mel_bins,
                sample_rate_hz=self._sound.sample_rate_hz,
            )
            tone = f"{hertz / 1000:.1f} kHz" if hertz >= 1000 else f"{hertz:.0f} Hz"
            return f"the sound at {self._column_seconds(time):.2f} s around {tone}"
        side = math.isqrt(num_places)
        row, column = place // side + 1, place % side + 1
        return f"the frame at {self.frame_seconds[time]:.2f} s, row {row} and column {column} of {side}"

    @property
    def _sound(self) -> Sound:
        assert self.explanation.sound is not None
        return self.explanation.sound

    def _column_seconds(self, column: int) -> float:
        """Centre of a column of spectrogram patches."""
        model = self.explanation.model
        return self._sound.start_seconds + (column * model.audio_stride + model.patch_size / 2) * MEL_ROW_SECONDS
