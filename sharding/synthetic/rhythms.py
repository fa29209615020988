"""Rhythms: in which two of a clip's four quarters there is a beat.

Every rhythm has two beats and two rests, so nothing that is averaged over a clip (mean brightness, mean loudness)
tells one from another. Quarters suit 8 and 16 uniformly sampled frames: of 8, two fall into each quarter, and a model
that pairs its frames has one token time a quarter.
"""

import itertools

import numpy as np
from jaxtyping import Bool, Float, Int

NUM_QUARTERS = 4
_NUM_BEATS = 2

RHYTHMS = tuple(
    "".join("x" if quarter in beats else "." for quarter in range(NUM_QUARTERS))
    for beats in itertools.combinations(range(NUM_QUARTERS), _NUM_BEATS)
)
"""``xx..``, ``x.x.``, ``x..x``, ``.xx.``, ``.x.x``, ``..xx``: x a beat, . a rest."""


def moments_of(num_frames: int) -> Float[np.ndarray, "frames"]:
    """Middle of every frame as a share of the clip, 0 to 1."""
    return np.asarray((np.arange(num_frames) + 0.5) / num_frames)


def quarters(moments: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """The quarter, 0 to 3, in which each moment (0: start of the clip, 1: its end) lies."""
    return np.asarray(np.clip((moments * NUM_QUARTERS).astype(int), 0, NUM_QUARTERS - 1))


def phases(moments: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """How far each moment lies through its quarter, 0 to 1."""
    return np.asarray(moments * NUM_QUARTERS % 1.0)


def beats(rhythm: str, moments: Float[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Whether each moment lies in a beat."""
    return np.asarray(np.array([letter == "x" for letter in rhythm])[quarters(moments)])
