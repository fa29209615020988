"""Which factors sample i of a split has, independent of each other.

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
"""

import functools
import itertools
import math
import zlib
from dataclasses import dataclass

import numpy as np

from sharding.synthetic.config import SyntheticConfig
from sharding.synthetic.rhythms import RHYTHMS

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
    """The factors beside the labelled ones, as indices; 0 where the difficulty has no such factor."""

    colour: int
    """Into the difficulty's colours."""
    speed: int
    """Into the difficulty's speeds."""
    rhythm: int
    """Into RHYTHMS."""


def generator(seed: int, split: str, purpose: int, index: int) -> np.random.Generator:
    """Random numbers keyed by (seed, split, purpose, index) and by nothing else."""
    return np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(split.encode()), purpose, index]))


def factors_of(config: SyntheticConfig, split: str, index: int) -> Factors:
    """The combination of sample `index`.

    Samples come in blocks that hold every combination once. Any first N samples hold each combination, and each
    class of a factor, as evenly as N allows: counts differ by at most one.
    """
    block, position = divmod(index, math.prod(config.sizes))
    return _block(config.sizes, config.seed, split, block)[position]


def details_of(config: SyntheticConfig, split: str, index: int) -> Details:
    """Colour, speed and rhythm of sample `index`: three uniform draws."""
    random, settings = generator(config.seed, split, _DETAILS, index), config.settings
    sizes = (len(settings.colours), len(settings.speeds), len(RHYTHMS) if settings.keyed_sound else 0)
    return Details(*(int(random.integers(max(size, 1))) for size in sizes))


@functools.lru_cache(maxsize=64)
def _block(sizes: tuple[int, int, int], seed: int, split: str, block: int) -> tuple[Factors, ...]:
    """Every combination once, in an order whose beginnings are balanced in each factor.

    All three factors step together along diagonals; a diagonal visits each class of a factor equally often. Class
    names, the diagonals' order and the starts are shuffled.
    """
    random = generator(seed, split, _ORDER, block)
    renamed = [random.permutation(size) for size in sizes]
    diagonals = _diagonals(sizes)
    order: list[Factors] = []
    for number in random.permutation(len(diagonals)):
        diagonal = diagonals[number]
        start = int(random.integers(len(diagonal)))
        order += [
            Factors(*(int(names[value]) for names, value in zip(renamed, combination, strict=True)))
            for combination in diagonal[start:] + diagonal[:start]
        ]
    return tuple(order)


def _diagonals(sizes: tuple[int, int, int]) -> list[list[tuple[int, ...]]]:
    length = math.lcm(*sizes)
    seen: set[tuple[int, ...]] = set()
    diagonals = []
    for first in itertools.product(*map(range, sizes)):
        if first not in seen:
            diagonal = [
                tuple((value + step) % size for value, size in zip(first, sizes, strict=True)) for step in range(length)
            ]
            seen.update(diagonal)
            diagonals.append(diagonal)
    return diagonals


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
