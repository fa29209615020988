"""Settings of the synthetic world."""

from dataclasses import dataclass
from typing import Any

from ca2st.errors import UserInputError
from sharding.synthetic.difficulty import Difficulty, difficulty_of
from sharding.synthetic.rhythms import NUM_QUARTERS

MAX_SHAPES = 6
MAX_MOTIONS = 8
MAX_TONES = 8

_RANGES: dict[str, tuple[int, int]] = {
    "num_samples": (1, 999_999),
    "seed": (0, 2**32 - 1),
    "num_shapes": (2, MAX_SHAPES),
    "num_motions": (2, MAX_MOTIONS),
    "num_tones": (2, MAX_TONES),
    "frame_size": (32, 512),
    "frames_per_second": (8, 60),
    "min_frames": (8, 3_600),
    "max_frames": (8, 3_600),
    "sample_rate_hz": (8_000, 48_000),
    "workers": (1, 256),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    """What the synthetic world looks and sounds like, and how much of it is made."""

    num_samples: int = 768
    """Clips of a split. A larger number extends the same set: clip i never changes."""
    seed: int = 0
    """Another seed gives other clips; splits of one seed never share draws."""
    num_shapes: int = 4
    """Classes of the label space ``space`` (2 to 6)."""
    num_motions: int = 4
    """Classes of the label space ``time`` (2 to 8): up, down, left, right, then the diagonals."""
    num_tones: int = 4
    """Classes of the label space ``audio`` (2 to 8), half an octave apart from 220 Hz up."""
    frame_size: int = 64
    """Width and height in pixels, even: large enough for a small model's crop, small enough to draw in milliseconds."""
    frames_per_second: int = 16
    """Frame rate of the video."""
    min_frames: int = 16
    """Frames of the shortest clip: 1 s at the default rate."""
    max_frames: int = 21
    """Frames of the longest clip: 1.3 s at the default rate."""
    sample_rate_hz: int = 16_000
    """Rate of the mono sound; one of those AAC knows."""
    workers: int = 2
    """Processes that draw and encode. The bytes do not depend on it."""
    difficulty: str = "easy"
    """``easy``, ``medium`` or ``hard``: a row of `sharding.synthetic.difficulty`."""
    binding: bool = False
    """True: scenes of several objects, one of which keeps time with the sound (``--task binding``). They have as many
    objects as the difficulty says, whatever `num_shapes`, and all last `min_frames`, so that a view which reads the
    whole picture and the whole sound has the two in step."""

    def __post_init__(self) -> None:
        difficulty_of(self.difficulty)
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserInputError(f"synthetic.{name}: expected {low} to {high}, found {value}")
        if self.frame_size % 2:
            raise UserInputError(f"synthetic.frame_size: expected an even number of pixels, found {self.frame_size}")
        if self.max_frames < self.min_frames:
            raise UserInputError(
                f"synthetic.max_frames: expected at least min_frames ({self.min_frames}), found {self.max_frames}"
            )
        if self.binding and self.min_frames % NUM_QUARTERS:
            raise UserInputError(
                f"synthetic.min_frames: binding scenes have {NUM_QUARTERS} equal quarters: expected a multiple of "
                f"{NUM_QUARTERS}, found {self.min_frames}"
            )
        if self.sample_rate_hz not in _AAC_RATES_HZ:
            raise UserInputError(
                f"synthetic.sample_rate_hz: expected one of {', '.join(map(str, _AAC_RATES_HZ))}, "
                f"found {self.sample_rate_hz}"
            )

    @property
    def settings(self) -> Difficulty:
        """What the difficulty means in numbers."""
        return difficulty_of(self.difficulty)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of shapes, motions and tones."""
        return self.num_shapes, self.num_motions, self.num_tones

    def content(self) -> dict[str, Any]:
        """Settings that decide a clip's bytes: all but how many clips and how many workers.

        Difficulty and binding are named where they are not the default, so that a folder made before they existed
        is still the same set.
        """
        named = {name: getattr(self, name) for name in _RANGES if name not in ("num_samples", "workers")}
        if self.difficulty != "easy":
            named["difficulty"] = self.difficulty
        if self.binding:
            named["binding"] = True
        return named


_AAC_RATES_HZ = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
