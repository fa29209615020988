"""What a synthetic clip is of: factors, outlines, binding, label spaces, and the best that anyone could reach.

Which factors sample i of a split has is independent of each other:

=================  =========  ==========================================
what               label      beside it, where the difficulty names it
=================  =========  ==========================================
one frame shows    shape      colour
the motion         direction  speed
the sound          pitch      rhythm
=================  =========  ==========================================

The labels ``space``, ``time`` and ``audio`` are the first of each pair and are balanced at every length; ``holistic``
is their combination. The second of each pair is drawn on its own, uniformly: it tells nothing of a label, and has a
label space of its own.

Binding scenes have M objects, one of each of the first M shapes, so every clip shows the same shapes:

1. the label y is drawn, evenly over the M objects;
2. independently of it, M different rhythms r_1 .. r_M are drawn in random order, one for each object, and so is
   everything else in the picture: places, colours, clutter;
3. the sound plays the rhythm a = r_y; pitch, loudness and noise are drawn independently.

So y is independent of the whole picture, and of the sound (r_y is uniform over all rhythms whatever y is): only the
pair decides. What that means for models is in README.md here.

Ceilings say how often the best possible model can be right, by what it is given; they are printed beside results, so
that a reason shows. Three senses:

- ``spatial``: a clip's frames without their order. They show shape and colour, and the line along which something
  moves, but not which way: a clip and its reverse have the same frames and are equally likely.
- ``temporal``: the frames in order. They show all of the picture.
- ``audio``: the sound.

A ceiling follows from how the factors are drawn and holds for every difficulty; noise and clutter only keep models
further below it. It bounds what the senses contain, not what a model does with them: cross-attention with time codes
puts frames back in order, so a model that joins images and sound that way (CAVA) is bounded by ``temporal+audio``.
"""

import functools
import itertools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ca2st.errors import check_choice
from sharding.format.shard_set import LabelSpace
from sharding.synthetic.config import RHYTHMS, SyntheticConfig

Plane = Float[np.ndarray, "frames height width"]


def _triangle(x: Plane, y: Plane) -> Plane:
    slope = np.sqrt(0.75)
    return np.asarray(np.maximum(np.maximum(slope * x - 0.5 * y, -slope * x - 0.5 * y), y) - 0.62)


def _cross(x: Plane, y: Plane) -> Plane:
    upright = np.maximum(np.abs(x) - 0.33, np.abs(y) - 0.95)
    lying = np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.33)
    return np.asarray(np.minimum(upright, lying))


def _star(x: Plane, y: Plane) -> Plane:
    """Five points, folded onto one edge: the line from a tip (radius 1.22) to a notch (0.55) half a point further."""
    half_point = np.pi / 5
    angle = np.abs((np.arctan2(x, -y) / (2 * half_point) + 0.5) % 1.0 - 0.5) * 2 * half_point
    along, across = np.cos(angle) * np.hypot(x, y), np.sin(angle) * np.hypot(x, y)
    normal = np.array([0.55 * np.sin(half_point), 1.22 - 0.55 * np.cos(half_point)])
    normal /= np.hypot(*normal)
    return np.asarray((along - 1.22) * float(normal[0]) + across * float(normal[1]))


SHAPES = ("disc", "square", "triangle", "cross", "ring", "star")
"""Shapes that can be labels, in label order; their areas are about equal."""
BAR = "bar"
"""The shape of what hides others; never a label."""

OUTLINES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "disc": lambda x, y: np.asarray(np.hypot(x, y) - 0.8),
    "square": lambda x, y: np.asarray(np.maximum(np.abs(x), np.abs(y)) - 0.71),
    "triangle": _triangle,
    "cross": _cross,
    "ring": lambda x, y: np.asarray(np.abs(np.hypot(x, y) - 0.75) - 0.22),
    "star": _star,
    BAR: lambda x, y: np.asarray(np.abs(x) - 1.0 + 0.0 * y),  # two radii wide and without ends
}
"""Signed distance to each outline at (x right, y down): negative inside, in units of the radius."""


_DIAGONAL = math.sqrt(0.5)
MOTIONS: dict[str, tuple[float, float]] = {
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up_left": (-_DIAGONAL, -_DIAGONAL),
    "up_right": (_DIAGONAL, -_DIAGONAL),
    "down_left": (-_DIAGONAL, _DIAGONAL),
    "down_right": (_DIAGONAL, _DIAGONAL),
}
"""Unit steps (x right, y down): speeds are drawn alike for every direction, so speed tells nothing of it.

A horizontal flip turns left into right: a training on ``time`` or ``holistic`` must not flip.
"""

TONES_HZ = tuple(round(220.0 * 2 ** (number / 2)) for number in range(8))
"""Half an octave apart: the second harmonic of a tone is the fundamental of the next but one."""


@dataclass(frozen=True, slots=True)
class Factors:
    """One combination of the labelled factors, as class indices."""

    space: int
    time: int
    audio: int


@dataclass(frozen=True, slots=True)
class Details:
    """The factors beside the labelled ones, as indices into the difficulty's colours and speeds and into RHYTHMS.

    0 where the difficulty has no such factor.
    """

    colour: int
    speed: int
    rhythm: int


def generator(seed: int, split: str, purpose: int, index: int) -> np.random.Generator:
    """Return random numbers keyed by (seed, split, purpose, index) and by nothing else."""
    return np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(split.encode()), purpose, index]))


def factors_of(config: SyntheticConfig, split: str, index: int) -> Factors:
    """Return the combination of sample `index`.

    Samples come in blocks that hold every combination once. Any first N samples hold each combination, and each
    class of a factor, as evenly as N allows: counts differ by at most one.
    """
    block, position = divmod(index, math.prod(config.sizes))
    return _block(config.sizes, config.seed, split, block)[position]


def details_of(config: SyntheticConfig, split: str, index: int) -> Details:
    """Return colour, speed and rhythm of sample `index`: three uniform draws."""
    random, settings = generator(config.seed, split, _DETAILS, index), config.settings
    sizes = (len(settings.colours), len(settings.speeds), len(RHYTHMS) if settings.keyed_sound else 0)
    return Details(*(int(random.integers(max(size, 1))) for size in sizes))


@functools.lru_cache(maxsize=64)
def _block(sizes: tuple[int, int, int], seed: int, split: str, block: int) -> tuple[Factors, ...]:
    """Return every combination once, in an order whose beginnings are balanced in each factor.

    All three factors step together along diagonals; a diagonal visits each class of a factor equally often. Class
    names, the diagonals' order and the starts are shuffled.
    """
    random = generator(seed, split, _ORDER, block)
    renamed = [random.permutation(size) for size in sizes]
    seen: set[tuple[int, ...]] = set()
    diagonals = []
    for first in itertools.product(*map(range, sizes)):
        if first not in seen:
            diagonals.append(
                [
                    tuple((value + step) % size for value, size in zip(first, sizes, strict=True))
                    for step in range(math.lcm(*sizes))
                ]
            )
            seen.update(diagonals[-1])
    order: list[Factors] = []
    for number in random.permutation(len(diagonals)):
        diagonal = diagonals[number]
        start = int(random.integers(len(diagonal)))
        order += [
            Factors(*(int(names[value]) for names, value in zip(renamed, combination, strict=True)))
            for combination in diagonal[start:] + diagonal[:start]
        ]
    return tuple(order)


_ORDER = 0
DRAWING = 1
"""Purpose of the random numbers behind a clip's picture."""
SOUNDING = 2
"""Purpose of the random numbers behind a clip's sound."""
_DETAILS = 3
DISTURBING = 4
"""Purpose of the random numbers behind what hides and shakes a clip's picture."""
BINDING = 5
"""Purpose of the random numbers behind who keeps time with the sound."""
CLUTTERING = 6
"""Purpose of the random numbers behind clicks and hum."""


@dataclass(frozen=True, slots=True)
class Binding:
    """Who beats when in one clip, and whom the sound follows."""

    keeper: int
    """The label: index of the object (and of its shape) that keeps time with the sound."""
    rhythms: tuple[int, ...]
    """Rhythm of each object, all different, as indices into RHYTHMS."""
    tone: int
    """Pitch class of the sound; tells nothing."""

    @property
    def heard(self) -> int:
        """Rhythm of the sound."""
        return self.rhythms[self.keeper]


def binding_of(config: SyntheticConfig, split: str, index: int) -> Binding:
    """Return the objects' rhythms and the keeper of sample `index`; any first N samples hold the keepers evenly."""
    num_objects = config.settings.num_objects
    block, position = divmod(index, num_objects)
    # Spawned: the stream of (BINDING, block) itself orders the keepers.
    random = generator(config.seed, split, BINDING, index).spawn(1)[0]
    return Binding(
        keeper=_keepers(num_objects, config.seed, split, block)[position],
        rhythms=tuple(int(rhythm) for rhythm in random.permutation(len(RHYTHMS))[:num_objects]),
        tone=int(random.integers(config.num_tones)),
    )


def object_shapes(config: SyntheticConfig) -> tuple[str, ...]:
    """Return the shapes of every clip, which are the classes."""
    return SHAPES[: config.settings.num_objects]


@functools.lru_cache(maxsize=64)
def _keepers(num_objects: int, seed: int, split: str, block: int) -> tuple[int, ...]:
    """Return every object once, in random order."""
    return tuple(int(keeper) for keeper in generator(seed, split, BINDING, block).permutation(num_objects))


def label_spaces(config: SyntheticConfig) -> tuple[LabelSpace, ...]:
    """Return what the samples are labelled with.

    ``space``, ``time``, ``audio`` and ``holistic`` (the combination of the three), then ``colour``, ``speed`` and
    ``rhythm`` where the difficulty has them. Binding scenes: ``binding``, then ``audio`` and ``rhythm`` of the sound
    and the rhythm of each object, from which experts can learn to hear and to see beats.
    """
    tones = tuple(f"{hertz}_hz" for hertz in TONES_HZ[: config.num_tones])
    if config.binding:
        shapes = object_shapes(config)
        named = {"binding": shapes, "audio": tones, "rhythm": RHYTHMS}
        named |= {f"{shape}_rhythm": RHYTHMS for shape in shapes}
    else:
        shapes, motions = SHAPES[: config.num_shapes], tuple(MOTIONS)[: config.num_motions]
        combinations = tuple(" ".join(parts) for parts in itertools.product(shapes, motions, tones))
        named = {"space": shapes, "time": motions, "audio": tones, "holistic": combinations} | _detail_classes(config)
    return tuple(LabelSpace(name=name, classes=classes) for name, classes in named.items())


def labels_of(config: SyntheticConfig, split: str, index: int) -> tuple[int, ...]:
    """Return labels of sample `index` in the order of `label_spaces`."""
    if config.binding:
        binding = binding_of(config, split, index)
        return binding.keeper, binding.tone, binding.heard, *binding.rhythms
    factors, details = factors_of(config, split, index), details_of(config, split, index)
    holistic = (factors.space * config.num_motions + factors.time) * config.num_tones + factors.audio
    beside = tuple(getattr(details, name) for name in _detail_classes(config))
    return factors.space, factors.time, factors.audio, holistic, *beside


def _detail_classes(config: SyntheticConfig) -> dict[str, tuple[str, ...]]:
    settings = config.settings
    named = {
        "colour": settings.colours,
        "speed": tuple(name for name, _ in settings.speeds),
        "rhythm": RHYTHMS if settings.keyed_sound else (),
    }
    return {name: classes for name, classes in named.items() if len(classes) > 1}


TASKS = ("space", "time", "audio", "holistic", "binding")
"""What can be learned: one factor, the combination of all three (those shards carry all four labels), or which of
several objects keeps time with the sound, in scenes of their own."""
_SENSES = ("spatial", "temporal", "audio")
SENSE_SETS = tuple(
    "+".join(senses) for size in range(1, len(_SENSES) + 1) for senses in itertools.combinations(_SENSES, size)
)
"""``spatial``, ``temporal``, ``audio``, ``spatial+temporal``, ``spatial+audio``, ``temporal+audio``, all three."""


def ceilings(task: str, config: SyntheticConfig) -> dict[str, float]:
    """Return best possible top-1 accuracy (0 to 1) of `task` for every set of senses, by its name in SENSE_SETS.

    Classes are equally likely, so it is the number of groups of them that differ to the senses, by that of classes.

    Raises:
        UserInputError: an unknown task.
    """
    check_choice("task", task, TASKS)
    steps = tuple(MOTIONS.values())[: config.num_motions]
    num_lines = len({max(step, (-step[0], -step[1])) for step in steps})  # up and down share one
    found = {}
    for name in SENSE_SETS:
        senses = name.split("+")
        orders, hears = "temporal" in senses, "audio" in senses
        sees = orders or "spatial" in senses
        ceiling = {
            "space": 1.0 if sees else 1 / config.num_shapes,
            "time": 1.0 if orders else (num_lines if sees else 1) / config.num_motions,
            "audio": 1.0 if hears else 1 / config.num_tones,
            "binding": 1.0 if orders and hears else 1 / config.settings.num_objects,
        }
        ceiling["holistic"] = ceiling["space"] * ceiling["time"] * ceiling["audio"]
        found[name] = ceiling[task]
    return found
