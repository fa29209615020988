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

`generate_split` writes the clips of a split as mp4 files, in worker processes.
"""

import concurrent.futures
import csv
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import Float, Int, UInt8

from ca2st.checked_json import DocumentError, canonical_json, read_json
from ca2st.durable import sweep_temporaries, write_bytes
from ca2st.errors import EnvironmentFault, UserInputError
from ca2st.processes import SPAWN, die_with_parent
from sharding.folder import folder_lock
from sharding.synthetic import factors
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
    random, settings = factors.generator(config.seed, split, factors.DRAWING, index), config.settings
    bodies = (_objects if config.binding else _one_shape)(config, split, index, random)
    return Scene(
        num_frames=len(bodies[0].track),
        bodies=bodies,
        background=random.uniform(*settings.background, (4, 4, 3)),
        noise=random.uniform(*settings.noise),
    )


def glide(
    start: tuple[float, float], velocity: tuple[float, float], *, num_frames: int, frames_per_second: float
) -> Track:
    """Return steady motion at `velocity` frame sides per second, over edges that meet."""
    seconds = np.arange(num_frames)[:, None] / frames_per_second
    return np.asarray((np.asarray(start) + seconds * np.asarray(velocity)) % 1.0)


def stay(places: Float[np.ndarray, "quarters 2"], *, num_frames: int) -> Track:
    """Return one place in each quarter of the clip, reached at a jump."""
    return np.asarray(places[quarters(moments_of(num_frames))] % 1.0)


def _one_shape(config: SyntheticConfig, split: str, index: int, random: np.random.Generator) -> tuple[Body, ...]:
    """Return the shape of a clip of independent factors."""
    settings = config.settings
    drawn, details = factors.factors_of(config, split, index), factors.details_of(config, split, index)
    right, down = tuple(factors.MOTIONS.values())[drawn.time]
    speed = random.uniform(*settings.speeds[details.speed][1])
    num_frames = int(random.integers(config.min_frames, config.max_frames + 1))
    body = Body(
        shape=factors.SHAPES[drawn.space],
        track=glide(
            (random.random(), random.random()),
            (speed * right, speed * down),
            num_frames=num_frames,
            frames_per_second=config.frames_per_second,
        ),
        radius=random.uniform(*settings.radius),
        tilt_radians=random.uniform(-settings.tilt_radians, settings.tilt_radians),
        colours=np.tile(_colour(random, settings, details.colour), (num_frames, 1)),
    )
    return (body,)


def _objects(config: SyntheticConfig, split: str, index: int, random: np.random.Generator) -> tuple[Body, ...]:
    """Return the objects of a binding scene."""
    settings, moments = config.settings, moments_of(config.min_frames)
    rhythms = factors.binding_of(config, split, index).rhythms
    homes = random.permutation(4)
    bodies = []
    for number, shape in enumerate(factors.object_shapes(config)):
        beating = beats(RHYTHMS[rhythms[number]], moments)
        colour = _colour(random, settings, int(random.integers(max(len(settings.colours), 1))))
        shine = np.where(beating, 1.0, settings.rest_brightness)
        middle = np.array([_COLUMNS[homes[number] % 2], _ROWS[homes[number] // 2]])
        places = middle + random.uniform(-_HOME_JITTER, _HOME_JITTER, (NUM_QUARTERS, 2))
        height = settings.hop * beating * np.sin(np.pi * phases(moments))
        bodies.append(
            Body(
                shape=shape,
                track=(stay(places, num_frames=len(moments)) - height[:, None] * np.array([0.0, 1.0])) % 1.0,
                radius=random.uniform(*settings.object_radius),
                tilt_radians=random.uniform(-settings.tilt_radians, settings.tilt_radians),
                colours=shine[:, None] * colour,
            )
        )
    return tuple(bodies[number] for number in random.permutation(len(bodies)))


def _colour(random: np.random.Generator, settings: Difficulty, number: int) -> Float[np.ndarray, "3"]:
    if not settings.colours:
        return random.uniform(*_BRIGHT, 3)
    return np.asarray(random.uniform(*_SHADES) * np.array(COLOURS[settings.colours[number]]))


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
    random, settings = factors.generator(config.seed, split, factors.DISTURBING, index), config.settings
    size = config.frame_size
    grain = settings.grain * random.standard_normal((size, size), dtype=np.float32)
    distractors, occluders = [], []
    for _ in range(settings.num_distractors):
        track = _track(random, config, num_frames=num_frames)
        distractors.append(
            Body(
                shape=factors.SHAPES[int(random.integers(len(factors.SHAPES)))],
                track=track,
                radius=random.uniform(*settings.distractor_radius),
                tilt_radians=random.uniform(-np.pi, np.pi),
                colours=np.full((num_frames, 3), random.uniform(*_GREYS)),
            )
        )
    if settings.occluder_width:
        occluders.append(
            Body(
                shape=factors.BAR,
                track=np.tile(random.random(2), (num_frames, 1)),
                radius=settings.occluder_width / 2,
                tilt_radians=float(np.pi / 2 * random.integers(2)),
                colours=np.full((num_frames, 3), random.uniform(*_BAR_GREYS)),
            )
        )
    return Clutter(
        grain=grain,
        distractors=tuple(distractors),
        occluders=tuple(occluders),
        shifts=np.rint(settings.camera_shake * size * random.standard_normal((num_frames, 2))).astype(int),
        gains=1.0 + settings.flicker * random.uniform(-1.0, 1.0, num_frames),
        contrast=random.uniform(*settings.contrast),
    )


def _track(random: np.random.Generator, config: SyntheticConfig, *, num_frames: int) -> Track:
    """Return a glide at random; in the binding scenes a place in each quarter, as their objects have."""
    if config.binding:
        return stay(random.random((NUM_QUARTERS, 2)), num_frames=num_frames)
    (x, y), (right, down) = random.random(2), random.uniform(-_DRIFT, _DRIFT, 2)
    return glide((x, y), (right, down), num_frames=num_frames, frames_per_second=config.frames_per_second)


def draw_frames(config: SyntheticConfig, split: str, index: int) -> UInt8[np.ndarray, "frames height width 3"]:
    """Return the RGB frames of sample `index`."""
    scene = scene_of(config, split, index)
    clutter = clutter_of(config, split, index, num_frames=scene.num_frames)
    behind = _texture(scene.background, config.frame_size) + clutter.grain[..., None]
    frames = np.broadcast_to(behind, (scene.num_frames, *behind.shape))
    for body in (*clutter.distractors, *scene.bodies, *clutter.occluders):
        colours = body.colours.astype(np.float32)[:, None, None, :]
        frames = frames + _cover(body, config.frame_size)[..., None] * (colours - frames)
    if (clutter.gains != 1.0).any():
        frames = frames * clutter.gains.astype(np.float32)[:, None, None, None]
    if clutter.contrast != 1.0:
        frames = np.float32(0.5) + np.float32(clutter.contrast) * (frames - np.float32(0.5))
    if clutter.shifts.any():
        frames = np.stack(
            [np.roll(frame, tuple(shift), axis=(0, 1)) for frame, shift in zip(frames, clutter.shifts, strict=True)]
        )
    # Spawned: the stream of DRAWING itself made the scene.
    random = factors.generator(config.seed, split, factors.DRAWING, index).spawn(1)[0]
    noise = scene.noise * random.standard_normal(frames.shape[:3], dtype=np.float32)[..., None]
    return np.asarray(np.clip((frames + noise) * 255.0 + 0.5, 0, 255), dtype=np.uint8)


def _texture(colours: Float[np.ndarray, "4 4 3"], size: int) -> Float[np.ndarray, "height width 3"]:
    """Return the colours of a 4 x 4 grid, blended smoothly and periodically over the frame."""
    at = (np.arange(size, dtype=np.float32) + 0.5) * 4 / size
    near = np.abs((at[:, None] - np.arange(4) + 2.0) % 4 - 2.0)
    weights = np.clip(1.0 - near, 0.0, 1.0)
    return np.asarray(np.einsum("yi,xj,ijc->yxc", weights, weights, colours), dtype=np.float32)


def _cover(body: Body, size: int) -> factors.Plane:
    """Return how much of each pixel the body covers, 0 to 1, with edges one pixel soft."""
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    centres = body.track.astype(np.float32)
    # The frame's edges meet: of all copies of the body the nearest counts.
    away_x = (pixels - centres[:, :1] + 0.5) % 1.0 - 0.5
    away_y = (pixels - centres[:, 1:] + 0.5) % 1.0 - 0.5
    x, y = away_x[:, None, :] / body.radius, away_y[:, :, None] / body.radius
    cosine, sine = float(np.cos(body.tilt_radians)), float(np.sin(body.tilt_radians))
    distance = factors.OUTLINES[body.shape](cosine * x + sine * y, cosine * y - sine * x)
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
    random, settings = factors.generator(config.seed, split, factors.SOUNDING, index), config.settings
    num_samples = round(num_frames * config.sample_rate_hz / config.frames_per_second)
    seconds = np.arange(num_samples) / config.sample_rate_hz
    number, rhythm = heard(config, split, index)
    pitch_hz = factors.TONES_HZ[number] * 2 ** (random.uniform(-_JITTER_SEMITONES, _JITTER_SEMITONES) / 12)
    tone = _tone(random, seconds, pitch_hz) * _envelope(random, seconds, rhythm)
    noise = random.standard_normal(num_samples)
    noise /= np.sqrt(np.mean(noise**2))
    loudness, noise_db = random.uniform(0.05, 0.3), random.uniform(*settings.hiss_db)
    clutter = _clutter(factors.generator(config.seed, split, factors.CLUTTERING, index), seconds, settings)
    mixed = loudness * (tone + 10 ** (noise_db / 20) * noise + clutter)
    return np.asarray(np.clip(mixed, -1.0, 1.0), dtype=np.float32)


def heard(config: SyntheticConfig, split: str, index: int) -> tuple[int, str | None]:
    """Return pitch class and rhythm of the sound of sample `index`; None: a steady tone."""
    if config.binding:
        binding = factors.binding_of(config, split, index)
        return binding.tone, RHYTHMS[binding.heard]
    rhythm = RHYTHMS[factors.details_of(config, split, index).rhythm] if config.settings.keyed_sound else None
    return factors.factors_of(config, split, index).audio, rhythm


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
    """Return a slow swell or fade; before it a short silence and rise, or the beats of `rhythm`.

    Those have short ramps inside: two beats in a row are two tones.
    """
    onset, rise, slope = random.uniform(0.0, 0.3), random.uniform(0.01, 0.1), random.uniform(-0.5, 0.5)
    if rhythm is None:
        gate = np.clip((seconds - onset) / rise, 0.0, 1.0)
    else:
        duration_seconds = seconds[-1] + seconds[1]
        moments = seconds / duration_seconds
        from_edge = np.minimum(phases(moments), 1.0 - phases(moments)) * duration_seconds / NUM_QUARTERS
        gate = beats(rhythm, moments) * np.clip(from_edge / _RAMP_SECONDS, 0.0, 1.0)
    return np.asarray(gate * (1.0 + slope * (seconds / seconds[-1] - 0.5)))


def _clutter(random: np.random.Generator, seconds: _Sound, settings: Difficulty) -> _Sound:
    """Return a hum below the tones, and clicks at random times."""
    hum_hz, start = random.uniform(*_HUM_HZ), random.random()
    sound = settings.hum * np.sin(2 * np.pi * (hum_hz * seconds + start))
    for moment in random.uniform(0.0, seconds[-1], random.poisson(settings.clicks_per_second * seconds[-1])):
        since = np.maximum(seconds - moment, 0.0)
        fading = np.where(seconds >= moment, np.exp(-since / _CLICK_SECONDS), 0.0)
        sound = sound + random.uniform(1.0, 3.0) * fading * random.standard_normal(len(seconds))
    return np.asarray(sound)


_ENCODERS: dict[str, dict[str, str]] = {
    "libx264": {"preset": "veryfast", "crf": "20", "mbtree": "0", "threads": "1", "flags": "+bitexact"},
    "mpeg4": {"qscale": "2", "threads": "1", "flags": "+bitexact"},
}
"""Encoder options. ``mbtree`` off: on frames of a few macroblocks x264's look-ahead gives other bytes every time."""


def make_clip(config: SyntheticConfig, split: str, index: int) -> bytes:
    """Return the mp4 of sample `index`: a pure function of its arguments under the same tool versions."""
    frames = draw_frames(config, split, index)
    sound = sound_samples(config, split, index, num_frames=len(frames))
    sink, name, rate_hz = io.BytesIO(), _video_encoder(), config.sample_rate_hz
    with av.open(sink, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        video = container.add_stream(name, rate=config.frames_per_second, options=_ENCODERS[name])
        assert isinstance(video, av.VideoStream)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1
        audio = container.add_stream("aac", rate=rate_hz, layout="mono", options={"flags": "+bitexact"})
        audio.codec_context.thread_count = 1
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())
        samples = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        samples.sample_rate, samples.pts, samples.time_base = rate_hz, 0, Fraction(1, rate_hz)
        container.mux(audio.encode(samples))
        container.mux(audio.encode())
    return sink.getvalue()


def _video_encoder() -> str:
    """Return name of the video encoder this machine's PyAV offers, the best first."""
    return next(name for name in _ENCODERS if name in av.codecs_available)


ANNOTATIONS_NAME = "annotations.csv"
_WORLD_NAME = "world.json"
_CLIPS_PER_TASK = 16


def clip_name(split: str, index: int) -> str:
    """Return the file name of sample `index`."""
    return f"{split}-{index:06d}.mp4"


def generate_split(
    media: Path,
    split: str,
    config: SyntheticConfig,
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Make the clips of a split (or the first `limit`) that are not there yet; returns the split's folder.

    `progress` is called with (clips done, clips in all).

    Raises:
        UserInputError: the folder holds clips of other settings or tool versions, or another process works there.
        EnvironmentFault: a file cannot be written, or a worker process died.
    """
    folder = media / split
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserInputError(f"--media {media}: expected a folder to make videos in, found a file in its way") from None
    except OSError as error:
        raise EnvironmentFault(f"cannot make {folder}: {error.strerror}; choose another --media") from error
    num_clips = len(range(config.num_samples)[:limit])
    with folder_lock(folder):
        sweep_temporaries(folder)
        _claim(folder, split, config)
        missing = [index for index in range(num_clips) if not (folder / clip_name(split, index)).is_file()]
        done = num_clips - len(missing)
        report = progress or (lambda _done, _total: None)
        report(done, num_clips)
        for made in _make_clips(folder, split, config, missing):
            done += made
            report(done, num_clips)
        write_bytes(folder / ANNOTATIONS_NAME, _annotations(config, split, num_clips))
    return folder


def _claim(folder: Path, split: str, config: SyntheticConfig) -> None:
    """Write down what this folder is made of, or check that it is still the same."""
    libraries = {name: ".".join(map(str, version)) for name, version in av.library_versions.items()}
    tools = {"encoder": _video_encoder(), "av": av.__version__, "numpy": np.__version__, **libraries}
    mine: dict[str, Any] = {"split": split, **config.content(), "tool_versions": tools}
    path = folder / _WORLD_NAME
    if not path.exists():
        write_bytes(path, canonical_json(mine))
        return
    try:
        theirs = read_json(path, dict[str, Any])
    except DocumentError as error:
        raise UserInputError(
            f"{path}: not the settings of a synthetic set ({error}); remove {folder} and run again"
        ) from error
    differing = [name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]
    if differing:
        found = "; ".join(f"{name}: {theirs.get(name)} there, {mine.get(name)} now" for name in differing)
        raise UserInputError(
            f"{folder}: holds a synthetic set of other settings ({found}); choose another --media or remove it"
        )


def _make_clips(folder: Path, split: str, config: SyntheticConfig, indices: list[int]) -> Iterator[int]:
    """Make the clips here when they are few, else in spawned workers; yields how many each task made."""
    tasks = [indices[first : first + _CLIPS_PER_TASK] for first in range(0, len(indices), _CLIPS_PER_TASK)]
    workers = min(config.workers, len(tasks))
    if workers < 2:
        for task in tasks:
            yield _make_task(folder, split, config, task)
        return
    # Spawned, never forked: a fork after PyAV has started its threads hangs.
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=SPAWN, initializer=die_with_parent)
    try:
        futures = [pool.submit(_make_task, folder, split, config, task) for task in tasks]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    except concurrent.futures.BrokenExecutor as error:
        raise EnvironmentFault(
            f"a worker that was making clips in {folder} died (killed, or out of memory?); "
            "run again with fewer --workers: finished clips are kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _make_task(folder: Path, split: str, config: SyntheticConfig, indices: list[int]) -> int:
    for index in indices:
        write_bytes(folder / clip_name(split, index), make_clip(config, split, index))
    return len(indices)


def _annotations(config: SyntheticConfig, split: str, num_clips: int) -> bytes:
    spaces = factors.label_spaces(config)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", *(space.name for space in spaces)])
    for index in range(num_clips):
        labels = factors.labels_of(config, split, index)
        names = (space.classes[label] for space, label in zip(spaces, labels, strict=True))
        rows.writerow([clip_name(split, index), *names])
    return text.getvalue().encode()
