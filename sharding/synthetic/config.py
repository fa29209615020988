"""Settings of the synthetic world: sizes, rhythms, and how hard it is to see and to hear.

Every rhythm has two beats and two rests in a clip's four quarters, so nothing that is averaged over a clip (mean
brightness, mean loudness) tells one from another. Quarters suit 8 and 16 uniformly sampled frames: of 8, two fall into
each quarter, and a model that pairs its frames has one token time per quarter.

Difficulty never changes which label a clip has, nor how likely: it changes how the clip looks and sounds, and in the
binding scenes how many objects there are to choose from.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ca2st.errors import UserInputError, check_choice

NUM_QUARTERS = 4

RHYTHMS = tuple(
    "".join("x" if quarter in beats else "." for quarter in range(NUM_QUARTERS))
    for beats in itertools.combinations(range(NUM_QUARTERS), 2)
)
"""``xx..``, ``x.x.``, ``x..x``, ``.xx.``, ``.x.x``, ``..xx``: x a beat, . a rest."""


def moments_of(num_frames: int) -> Float[np.ndarray, "frames"]:
    """Return the middle of every frame as a share of the clip, 0 to 1."""
    return np.asarray((np.arange(num_frames) + 0.5) / num_frames)


def quarters(moments: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Return the quarter, 0 to 3, in which each moment (0: start of the clip, 1: its end) lies."""
    return np.asarray(np.clip((moments * NUM_QUARTERS).astype(int), 0, NUM_QUARTERS - 1))


def phases(moments: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Return how far each moment lies through its quarter, 0 to 1."""
    return np.asarray(moments * NUM_QUARTERS % 1.0)


def beats(rhythm: str, moments: Float[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Return whether each moment lies in a beat."""
    return np.asarray(np.array([letter == "x" for letter in rhythm])[quarters(moments)])


Range = tuple[float, float]
"""Lowest and highest value; one is drawn uniformly for each clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difficulty:
    """Settings of one difficulty. Lengths are fractions of the frame's side, colours and brightness are 0 to 1."""

    colours: tuple[str, ...] = ()
    """Named colours of the labelled object, a factor of its own; none: any bright colour, and nothing to name."""
    speeds: tuple[tuple[str, Range], ...] = (("steady", (0.6, 1.0)),)
    """Speeds of the labelled object in frame sides per second; two or more are a factor of their own."""
    keyed_sound: bool = False
    """True: the tone sounds in two of the clip's four quarters, its rhythm, a factor of its own."""
    radius: Range = (0.2, 0.28)
    """Of the labelled object."""
    tilt_radians: float = 0.35
    """Objects are turned by up to this angle either way."""
    background: Range = (0.0, 0.4)
    """Brightness of the smooth colours behind everything."""
    noise: Range = (0.01, 0.04)
    """Standard deviation of the noise that changes in every frame."""
    grain: float = 0.0
    """Standard deviation of the background's fixed texture of single pixels."""
    num_distractors: int = 0
    """Small grey shapes that move about and mean nothing."""
    distractor_radius: Range = (0.05, 0.08)
    """Small enough never to be taken for a labelled object."""
    occluder_width: float = 0.0
    """Of one grey bar in front of everything, upright or lying; 0: no bar. No labelled object is ever hidden whole."""
    camera_shake: float = 0.0
    """Standard deviation of each frame's own displacement."""
    flicker: float = 0.0
    """Each frame is brighter or darker than drawn by up to this share."""
    contrast: Range = (1.0, 1.0)
    """1: full; lower values pull every pixel towards middle grey."""
    hiss_db: Range = (-20.0, -3.0)
    """Power of white noise under the sound, relative to the tone."""
    clicks_per_second: float = 0.0
    """Mean number of short clicks, at times of their own."""
    hum: float = 0.0
    """Amplitude of a hum below every tone, relative to the tone."""
    num_objects: int = 2
    """Binding scenes: objects in every clip, one of each shape; the number of classes."""
    object_radius: Range = (0.13, 0.16)
    """Binding scenes: of every object."""
    hop: float = 0.1
    """Binding scenes: how high an object jumps in each of its beats."""
    rest_brightness: float = 0.35
    """Binding scenes: brightness of an object that rests, as a share of its brightness in a beat."""


_COLOURS = ("red", "green", "blue", "yellow")
_SPEEDS = (("slow", (0.45, 0.6)), ("fast", (0.9, 1.1)))

DIFFICULTIES: dict[str, Difficulty] = {
    "easy": Difficulty(),
    "medium": Difficulty(
        colours=_COLOURS,
        speeds=_SPEEDS,
        keyed_sound=True,
        radius=(0.18, 0.25),
        background=(0.0, 0.45),
        noise=(0.02, 0.06),
        grain=0.04,
        num_distractors=1,
        occluder_width=0.06,
        camera_shake=0.012,
        flicker=0.1,
        contrast=(0.8, 1.0),
        hiss_db=(-16.0, 0.0),
        clicks_per_second=3.0,
        hum=0.15,
        num_objects=3,
        object_radius=(0.12, 0.15),
        rest_brightness=0.45,
    ),
    "hard": Difficulty(
        colours=_COLOURS,
        speeds=_SPEEDS,
        keyed_sound=True,
        radius=(0.16, 0.23),
        tilt_radians=0.5,
        background=(0.0, 0.5),
        noise=(0.04, 0.09),
        grain=0.08,
        num_distractors=3,
        occluder_width=0.1,
        camera_shake=0.025,
        flicker=0.25,
        contrast=(0.6, 1.0),
        hiss_db=(-12.0, 3.0),
        clicks_per_second=8.0,
        hum=0.4,
        num_objects=4,
        object_radius=(0.11, 0.14),
        hop=0.08,
        rest_brightness=0.6,
    ),
}
"""``easy`` is the world of the demo's published figures: its clips stay as they are."""


_RANGES: dict[str, tuple[int, int]] = {
    "num_samples": (1, 999_999),
    "seed": (0, 2**32 - 1),
    "num_shapes": (2, 6),
    "num_motions": (2, 8),
    "num_tones": (2, 8),
    "frame_size": (32, 512),
    "frames_per_second": (8, 60),
    "min_frames": (8, 3_600),
    "max_frames": (8, 3_600),
    "sample_rate_hz": (8_000, 48_000),
    "workers": (1, 256),
}
_AAC_RATES_HZ = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)


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
    """``easy``, ``medium`` or ``hard``: a name of `DIFFICULTIES`."""
    binding: bool = False
    """True: scenes of several objects, one of which keeps time with the sound (``--task binding``). They have as many
    objects as the difficulty says, whatever `num_shapes`, and all last `min_frames`, so that a view which reads the
    whole picture and the whole sound has the two in step."""

    def __post_init__(self) -> None:
        check_choice("synthetic.difficulty", self.difficulty, DIFFICULTIES)
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
            known = ", ".join(map(str, _AAC_RATES_HZ))
            raise UserInputError(f"synthetic.sample_rate_hz: expected one of {known}, found {self.sample_rate_hz}")

    @property
    def settings(self) -> Difficulty:
        """What the difficulty means in numbers."""
        return DIFFICULTIES[self.difficulty]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of shapes, motions and tones."""
        return self.num_shapes, self.num_motions, self.num_tones

    def content(self) -> dict[str, Any]:
        """Return settings that decide a clip's bytes: all but how many clips and how many workers.

        Difficulty and binding are named where they are not the default, so that a folder made before they existed
        is still the same set.
        """
        named = {name: getattr(self, name) for name in _RANGES if name not in ("num_samples", "workers")}
        if self.difficulty != "easy":
            named["difficulty"] = self.difficulty
        if self.binding:
            named["binding"] = True
        return named
