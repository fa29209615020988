"""What is seen and heard in a synthetic clip: scenes and clutter, drawn as pixels, and one tone with noise.

One shape in steady motion on a frame whose edges meet: a single frame shows the shape and nothing of the motion, for
the start is uniform over the frame, so at every moment the position is uniform whatever the motion. Size, tilt,
background and noise are drawn independently of every label.

In the binding scenes (`sharding.synthetic.factors`) every object has a part of the frame to itself and takes a new
place there in every quarter of the clip, so that no path gives the order of the frames away. In its beats it hops and
shines, in its rests it stands and is dim.

Clutter stands between a clip and its labels: grain, distractors, an occluding bar, shake, flicker, weak contrast. All
of it is drawn independently of every label, and none of it tells the order of a clip's frames: played backwards it is
equally likely, and in the binding scenes also with its quarters in any other order.

The sound is a tone with random timbre, loudness, wavering and noise; steady, or keyed on and off by a rhythm. Only its
pitch is the label ``audio``; only its rhythm is the label ``rhythm`` and decides ``binding``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from sharding.synthetic.config import (
    NUM_QUARTERS,
    RHYTHMS,
    Difficulty,
    SyntheticConfig,
    beats,
    moments_of,
    phases,
    quarters,
)
from sharding.synthetic.factors import (
    BAR,
    CLUTTERING,
    DISTURBING,
    DRAWING,
    MOTIONS,
    OUTLINES,
    SHAPES,
    SOUNDING,
    TONES_HZ,
    Plane,
    binding_of,
    details_of,
    factors_of,
    generator,
    object_shapes,
)

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
    """Return the scene of sample `index`."""
    return (_binding_scene if config.binding else _factor_scene)(config, split, index)


def glide(
    start: tuple[float, float], velocity: tuple[float, float], *, num_frames: int, frames_per_second: float
) -> Track:
    """Return steady motion at `velocity` frame sides per second, over edges that meet."""
    seconds = np.arange(num_frames)[:, None] / frames_per_second
    return np.asarray((np.asarray(start) + seconds * np.asarray(velocity)) % 1.0)


def stay(places: Float[np.ndarray, "quarters 2"], *, num_frames: int) -> Track:
    """Return one place in each quarter of the clip, reached at a jump."""
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
    """Return a place about the middle of a part of the frame in every quarter, with one hop in every beat."""
    middle = np.array([_COLUMNS[home % 2], _ROWS[home // 2]])
    places = middle + random.uniform(-_HOME_JITTER, _HOME_JITTER, (NUM_QUARTERS, 2))
    height = hop * beating * np.sin(np.pi * phases(moments_of(len(beating))))
    return np.asarray((stay(places, num_frames=len(beating)) - height[:, None] * np.array([0.0, 1.0])) % 1.0)


Frames = Float[np.ndarray, "frames height width 3"]
_GREYS = (0.3, 0.7)
_BAR_GREYS = (0.15, 0.45)
_DRIFT = 0.3
"""Fastest drift of a distractor in either direction, frame sides per second."""


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
    """Return the clutter of sample `index`, which has `num_frames` frames."""
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
    """Return the frames with brightness, contrast and shake applied; the same array where there is none of it."""
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
    """Return a glide at random; in the binding scenes a place in each quarter, as their objects have."""
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


def draw_frames(config: SyntheticConfig, split: str, index: int) -> UInt8[np.ndarray, "frames height width 3"]:
    """Return the RGB frames of sample `index`."""
    scene = scene_of(config, split, index)
    clutter = clutter_of(config, split, index, num_frames=scene.num_frames)
    behind = _texture(scene.background, config.frame_size) + clutter.grain[..., None]
    frames = np.broadcast_to(behind, (scene.num_frames, *behind.shape))
    for body in (*clutter.distractors, *scene.bodies, *clutter.occluders):
        colours = body.colours.astype(np.float32)[:, None, None, :]
        frames = frames + _cover(body, config.frame_size)[..., None] * (colours - frames)
    frames = seen_through(frames, clutter)
    random = generator(config.seed, split, DRAWING, index).spawn(1)[0]
    noise = scene.noise * random.standard_normal(frames.shape[:3], dtype=np.float32)[..., None]
    return np.asarray(np.clip((frames + noise) * 255.0 + 0.5, 0, 255), dtype=np.uint8)


def _texture(colours: Float[np.ndarray, "4 4 3"], size: int) -> Float[np.ndarray, "height width 3"]:
    """Return the colours of a 4 x 4 grid, blended smoothly and periodically over the frame."""
    at = (np.arange(size, dtype=np.float32) + 0.5) * 4 / size
    near = np.abs((at[:, None] - np.arange(4) + 2.0) % 4 - 2.0)
    weights = np.clip(1.0 - near, 0.0, 1.0)
    return np.asarray(np.einsum("yi,xj,ijc->yxc", weights, weights, colours), dtype=np.float32)


def _cover(body: Body, size: int) -> Plane:
    """Return how much of each pixel the body covers, 0 to 1, with edges one pixel soft."""
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    centres = body.track.astype(np.float32)
    away_x = (pixels - centres[:, :1] + 0.5) % 1.0 - 0.5
    away_y = (pixels - centres[:, 1:] + 0.5) % 1.0 - 0.5
    x, y = away_x[:, None, :] / body.radius, away_y[:, :, None] / body.radius
    cosine, sine = float(np.cos(body.tilt_radians)), float(np.sin(body.tilt_radians))
    distance = OUTLINES[body.shape](cosine * x + sine * y, cosine * y - sine * x)
    return np.asarray(np.clip(0.5 - distance * body.radius * size, 0.0, 1.0), dtype=np.float32)


_NUM_HARMONICS = 4
_JITTER_SEMITONES = 1.5
"""Classes are six semitones apart: jittered pitches of two classes stay three apart."""
_RAMP_SECONDS = 0.01
"""Rise and fall of a keyed tone."""
_CLICK_SECONDS = 0.004
_HUM_HZ = (45.0, 65.0)
_Sound = Float[np.ndarray, "num_samples"]


def sound_samples(config: SyntheticConfig, split: str, index: int, *, num_frames: int) -> _Sound:
    """Return mono sound of sample `index`, -1 to 1, exactly as long as `num_frames` of its video."""
    random, settings = generator(config.seed, split, SOUNDING, index), config.settings
    num_samples = round(num_frames * config.sample_rate_hz / config.frames_per_second)
    seconds = np.arange(num_samples) / config.sample_rate_hz
    number, rhythm = heard(config, split, index)
    tone = _tone(random, seconds, TONES_HZ[number] * _jitter(random)) * _envelope(random, seconds, rhythm)
    noise = random.standard_normal(num_samples)
    noise /= np.sqrt(np.mean(noise**2))
    loudness, noise_db = random.uniform(0.05, 0.3), random.uniform(*settings.hiss_db)
    clutter = _clutter(generator(config.seed, split, CLUTTERING, index), seconds, settings)
    mixed = loudness * (tone + 10 ** (noise_db / 20) * noise + clutter)
    return np.asarray(np.clip(mixed, -1.0, 1.0), dtype=np.float32)


def heard(config: SyntheticConfig, split: str, index: int) -> tuple[int, str | None]:
    """Return pitch class and rhythm of the sound of sample `index`; None: a steady tone."""
    if config.binding:
        binding = binding_of(config, split, index)
        return binding.tone, RHYTHMS[binding.heard]
    rhythm = RHYTHMS[details_of(config, split, index).rhythm] if config.settings.keyed_sound else None
    return factors_of(config, split, index).audio, rhythm


def _jitter(random: np.random.Generator) -> float:
    return float(2 ** (random.uniform(-_JITTER_SEMITONES, _JITTER_SEMITONES) / 12))


def _tone(random: np.random.Generator, seconds: _Sound, pitch_hz: float) -> _Sound:
    """Return harmonics of random strength and phase; pitch wavers by a quarter of a semitone. Mean square 1."""
    waver = 0.25 / 12 * np.log(2) * np.sin(2 * np.pi * (random.uniform(3, 7) * seconds + random.random()))
    phase = np.cumsum(pitch_hz * np.exp(waver)) * (seconds[1] - seconds[0])
    strengths = random.uniform(0.0, 0.8, _NUM_HARMONICS) / np.arange(1, _NUM_HARMONICS + 1)
    strengths[0] = 1.0
    starts = random.random(_NUM_HARMONICS)
    orders = np.arange(1, _NUM_HARMONICS + 1)
    waves = np.sin(2 * np.pi * (orders[:, None] * phase + starts[:, None]))
    tone = strengths @ waves
    return np.asarray(tone / np.sqrt(np.mean(tone**2)))


def _envelope(random: np.random.Generator, seconds: _Sound, rhythm: str | None) -> _Sound:
    """Return a slow swell or fade; before it a short silence and rise, or the beats of `rhythm`."""
    onset, rise = random.uniform(0.0, 0.3), random.uniform(0.01, 0.1)
    slope = random.uniform(-0.5, 0.5)
    swell = 1.0 + slope * (seconds / seconds[-1] - 0.5)
    gate = np.clip((seconds - onset) / rise, 0.0, 1.0) if rhythm is None else _keyed(rhythm, seconds)
    return np.asarray(gate * swell)


def _keyed(rhythm: str, seconds: _Sound) -> _Sound:
    """1 in the beats, 0 in the rests, with short ramps inside the beats; two beats in a row are two tones."""
    duration_seconds = seconds[-1] + seconds[1]
    moments = seconds / duration_seconds
    from_edge = np.minimum(phases(moments), 1.0 - phases(moments)) * duration_seconds / NUM_QUARTERS
    return np.asarray(beats(rhythm, moments) * np.clip(from_edge / _RAMP_SECONDS, 0.0, 1.0))


def _clutter(random: np.random.Generator, seconds: _Sound, settings: Difficulty) -> _Sound:
    """Return a hum below the tones, and clicks at random times."""
    hum_hz, start = random.uniform(*_HUM_HZ), random.random()
    sound = settings.hum * np.sin(2 * np.pi * (hum_hz * seconds + start))
    for moment in random.uniform(0.0, seconds[-1], random.poisson(settings.clicks_per_second * seconds[-1])):
        since = np.maximum(seconds - moment, 0.0)
        fading = np.where(seconds >= moment, np.exp(-since / _CLICK_SECONDS), 0.0)
        sound = sound + random.uniform(1.0, 3.0) * fading * random.standard_normal(len(seconds))
    return np.asarray(sound)
