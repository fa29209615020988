"""Which shape, motion and tone sample i of a split has: balanced at every length and independent of each other."""

import functools
import itertools
import math
import zlib
from dataclasses import dataclass

import numpy as np

from sharding.manifest import LabelSpace
from sharding.synthetic.config import SyntheticConfig

SHAPES = ("disc", "square", "triangle", "cross", "ring", "star")

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
"""Unit steps (x right, y down): every motion has the same speed, so speed tells nothing.

A horizontal flip turns left into right: a training on ``time`` or ``holistic`` must not flip.
"""

TONES_HZ = tuple(round(220.0 * 2 ** (number / 2)) for number in range(8))
"""Half an octave apart: the second harmonic of a tone is the fundamental of the next but one."""


@dataclass(frozen=True, slots=True)
class Factors:
    """One combination, as class indices."""

    space: int
    time: int
    audio: int


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


def label_spaces(config: SyntheticConfig) -> tuple[LabelSpace, ...]:
    """The spaces ``space``, ``time``, ``audio`` and ``holistic`` (the combination of the three)."""
    shapes, motions = SHAPES[: config.num_shapes], tuple(MOTIONS)[: config.num_motions]
    tones = tuple(f"{hertz}_hz" for hertz in TONES_HZ[: config.num_tones])
    combinations = tuple(" ".join(parts) for parts in itertools.product(shapes, motions, tones))
    named = {"space": shapes, "time": motions, "audio": tones, "holistic": combinations}
    return tuple(LabelSpace(name=name, classes=classes) for name, classes in named.items())


def labels_of(config: SyntheticConfig, factors: Factors) -> tuple[int, int, int, int]:
    """Labels in the order of `label_spaces`."""
    holistic = (factors.space * config.num_motions + factors.time) * config.num_tones + factors.audio
    return factors.space, factors.time, factors.audio, holistic


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
