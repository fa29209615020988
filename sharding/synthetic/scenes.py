"""What is in the picture of a clip: everything drawn by chance, before any pixel.

One shape in steady motion on a frame whose edges meet: a single frame shows the shape and nothing of the motion, for
the start is uniform over the frame, so at every moment the position is uniform whatever the motion. Size, tilt,
background and noise are drawn independently of every label.

In the binding scenes (`sharding.synthetic.binding`) every object has a part of the frame to itself and takes a new
place there in every quarter of the clip, so that no path gives the order of the frames away. In its beats it hops and
shines, in its rests it stands and is dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from sharding.synthetic.binding import binding_of, object_shapes
from sharding.synthetic.config import SyntheticConfig
from sharding.synthetic.difficulty import Difficulty
from sharding.synthetic.factors import DRAWING, MOTIONS, details_of, factors_of, generator
from sharding.synthetic.outlines import SHAPES
from sharding.synthetic.rhythms import NUM_QUARTERS, RHYTHMS, beats, moments_of, phases, quarters

Track = Float[np.ndarray, "frames 2"]
"""Centre in every frame: x right and y down, in frame sides; whole numbers are the same place."""
Colours = Float[np.ndarray, "frames 3"]
"""Colour in every frame, 0 to 1."""

COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (1.0, 0.3, 0.3),
    "green": (0.3, 1.0, 0.35),
    "blue": (0.4, 0.5, 1.0),
    "yellow": (1.0, 0.95, 0.3),
}
_SHADES = (0.85, 1.0)
"""A named colour is darkened by up to this."""
_BRIGHT = (0.6, 1.0)
"""A colour without a name: each of its components, so that the object stands out from the background."""
_COLUMNS, _ROWS = (0.25, 0.75), (0.3, 0.78)
"""Middles of the four parts of the frame in which objects of the binding scenes live, with room above for a hop."""
_HOME_JITTER = 0.06
"""An object of the binding scenes stays this near to the middle of its part of the frame, in x and in y."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Body:
    """One thing in the picture."""

    shape: str
    track: Track
    radius: float
    tilt_radians: float
    colours: Colours


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """The labelled things of one clip and what is behind them; lengths are fractions of the frame's side."""

    num_frames: int
    bodies: tuple[Body, ...]
    """From the back to the front."""
    background: Float[np.ndarray, "4 4 3"]
    """Colours of a smooth texture, 0 to 1; in the dark part."""
    noise: float
    """Standard deviation of the noise that changes in every frame."""


def scene_of(config: SyntheticConfig, split: str, index: int) -> Scene:
    """The scene of sample `index`."""
    return (_binding_scene if config.binding else _factor_scene)(config, split, index)


def glide(
    start: tuple[float, float], velocity: tuple[float, float], *, num_frames: int, frames_per_second: float
) -> Track:
    """Steady motion at `velocity` frame sides a second, over edges that meet."""
    seconds = np.arange(num_frames)[:, None] / frames_per_second
    return np.asarray((np.asarray(start) + seconds * np.asarray(velocity)) % 1.0)


def stay(places: Float[np.ndarray, "quarters 2"], *, num_frames: int) -> Track:
    """One place in each quarter of the clip, reached at a jump."""
    return np.asarray(places[quarters(moments_of(num_frames))] % 1.0)


def _factor_scene(config: SyntheticConfig, split: str, index: int) -> Scene:
    random, settings = generator(config.seed, split, DRAWING, index), config.settings
    factors, details = factors_of(config, split, index), details_of(config, split, index)
    step = tuple(MOTIONS.values())[factors.time]
    speed = random.uniform(*settings.speeds[details.speed][1])
    num_frames = int(random.integers(config.min_frames, config.max_frames + 1))
    track = glide(
        (random.random(), random.random()),
        (speed * step[0], speed * step[1]),
        num_frames=num_frames,
        frames_per_second=config.frames_per_second,
    )
    body = Body(
        shape=SHAPES[factors.space],
        track=track,
        radius=random.uniform(*settings.radius),
        tilt_radians=random.uniform(-settings.tilt_radians, settings.tilt_radians),
        colours=np.tile(_colour(random, settings, details.colour), (num_frames, 1)),
    )
    return _scene((body,), settings, random)


def _binding_scene(config: SyntheticConfig, split: str, index: int) -> Scene:
    random, settings = generator(config.seed, split, DRAWING, index), config.settings
    rhythms = binding_of(config, split, index).rhythms
    homes = random.permutation(4)
    bodies = []
    for number, shape in enumerate(object_shapes(config)):
        beating = beats(RHYTHMS[rhythms[number]], moments_of(config.min_frames))
        colour = _colour(random, settings, int(random.integers(max(len(settings.colours), 1))))
        shine = np.where(beating, 1.0, settings.rest_brightness)
        bodies.append(
            Body(
                shape=shape,
                track=_hopping(random, int(homes[number]), beating, hop=settings.hop),
                radius=random.uniform(*settings.object_radius),
                tilt_radians=random.uniform(-settings.tilt_radians, settings.tilt_radians),
                colours=shine[:, None] * colour,
            )
        )
    return _scene(tuple(bodies[number] for number in random.permutation(len(bodies))), settings, random)


def _scene(bodies: tuple[Body, ...], settings: Difficulty, random: np.random.Generator) -> Scene:
    return Scene(
        num_frames=len(bodies[0].track),
        bodies=bodies,
        background=random.uniform(*settings.background, (4, 4, 3)),
        noise=random.uniform(*settings.noise),
    )


def _colour(random: np.random.Generator, settings: Difficulty, number: int) -> Float[np.ndarray, "3"]:
    if not settings.colours:
        return random.uniform(*_BRIGHT, 3)
    return np.asarray(random.uniform(*_SHADES) * np.array(COLOURS[settings.colours[number]]))


def _hopping(random: np.random.Generator, home: int, beating: Bool[np.ndarray, "frames"], *, hop: float) -> Track:
    """A place about the middle of a part of the frame in every quarter, with one hop in every beat."""
    middle = np.array([_COLUMNS[home % 2], _ROWS[home // 2]])
    places = middle + random.uniform(-_HOME_JITTER, _HOME_JITTER, (NUM_QUARTERS, 2))
    height = hop * beating * np.sin(np.pi * phases(moments_of(len(beating))))
    return np.asarray((stay(places, num_frames=len(beating)) - height[:, None] * np.array([0.0, 1.0])) % 1.0)
