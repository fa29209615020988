"""What stands between a clip and its labels: grain, distractors, an occluding bar, shake, flicker, weak contrast.

All of it is drawn independently of every label, and none of it tells the order of a clip's frames: played backwards
it is equally likely, and in the binding scenes also with its quarters in any other order.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sharding.synthetic.config import SyntheticConfig
from sharding.synthetic.difficulty import Difficulty
from sharding.synthetic.factors import DISTURBING, generator
from sharding.synthetic.outlines import BAR, SHAPES
from sharding.synthetic.rhythms import NUM_QUARTERS
from sharding.synthetic.scenes import Body, Track, glide, stay

Frames = Float[np.ndarray, "frames height width 3"]
_GREYS = (0.3, 0.7)
_BAR_GREYS = (0.15, 0.45)
_DRIFT = 0.3
"""Fastest drift of a distractor in either direction, frame sides a second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clutter:
    """Everything drawn by chance to make one clip harder to see."""

    grain: Float[np.ndarray, "height width"]
    """Added to the background."""
    distractors: tuple[Body, ...]
    """Behind the labelled objects, small and grey."""
    occluders: tuple[Body, ...]
    """In front of them: one bar or none."""
    shifts: Int[np.ndarray, "frames 2"]
    """Displacement of each frame in pixels, down and right."""
    gains: Float[np.ndarray, "frames"]
    """Brightness of each frame, about 1."""
    contrast: float


def clutter_of(config: SyntheticConfig, split: str, index: int, *, num_frames: int) -> Clutter:
    """The clutter of sample `index`, which has `num_frames` frames."""
    random, settings = generator(config.seed, split, DISTURBING, index), config.settings
    size = config.frame_size
    return Clutter(
        grain=settings.grain * random.standard_normal((size, size), dtype=np.float32),
        distractors=tuple(
            _distractor(random, settings, _track(random, config, num_frames=num_frames))
            for _ in range(settings.num_distractors)
        ),
        occluders=(_bar(random, settings, num_frames=num_frames),) if settings.occluder_width else (),
        shifts=np.rint(settings.camera_shake * size * random.standard_normal((num_frames, 2))).astype(int),
        gains=1.0 + settings.flicker * random.uniform(-1.0, 1.0, num_frames),
        contrast=random.uniform(*settings.contrast),
    )


def seen_through(frames: Frames, clutter: Clutter) -> Frames:
    """The frames with brightness, contrast and shake applied; the same array where there is none of it."""
    if (clutter.gains != 1.0).any():
        frames = frames * clutter.gains.astype(np.float32)[:, None, None, None]
    if clutter.contrast != 1.0:
        frames = np.float32(0.5) + np.float32(clutter.contrast) * (frames - np.float32(0.5))
    if clutter.shifts.any():
        shifted = [
            np.roll(frame, (int(down), int(right)), axis=(0, 1))
            for frame, (down, right) in zip(frames, clutter.shifts, strict=True)
        ]
        frames = np.stack(shifted)
    return frames


def _track(random: np.random.Generator, config: SyntheticConfig, *, num_frames: int) -> Track:
    """A glide at random; in the binding scenes a place in each quarter, as their objects have."""
    if config.binding:
        return stay(random.random((NUM_QUARTERS, 2)), num_frames=num_frames)
    (x, y), (right, down) = random.random(2), random.uniform(-_DRIFT, _DRIFT, 2)
    return glide((x, y), (right, down), num_frames=num_frames, frames_per_second=config.frames_per_second)


def _distractor(random: np.random.Generator, settings: Difficulty, track: Track) -> Body:
    return Body(
        shape=SHAPES[int(random.integers(len(SHAPES)))],
        track=track,
        radius=random.uniform(*settings.distractor_radius),
        tilt_radians=random.uniform(-np.pi, np.pi),
        colours=np.full((len(track), 3), random.uniform(*_GREYS)),
    )


def _bar(random: np.random.Generator, settings: Difficulty, *, num_frames: int) -> Body:
    place = random.random(2)
    return Body(
        shape=BAR,
        track=np.tile(place, (num_frames, 1)),
        radius=settings.occluder_width / 2,
        tilt_radians=float(np.pi / 2 * random.integers(2)),
        colours=np.full((num_frames, 3), random.uniform(*_BAR_GREYS)),
    )
