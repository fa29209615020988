"""Attention as colour: arrays as pictures inside the page."""

import base64
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ray_jobs.pages.pictures import data_uri

MORE, LESS = (255, 138, 0, 220), (38, 84, 214, 160)
"""Red, green, blue and the highest opacity of more and of less than the even share. Orange and blue stay apart for
every kind of colour vision; what was ignored is veiled, not hidden."""
_EVEN = 127
_LEAST_RANGE, _MOST_RANGE = math.log2(1.25), 6.0


def times_even(share: NDArray[np.float32], *, num_keys: int) -> NDArray[np.float32]:
    """log2 of share / (1 / num_keys): 0 where a key gets what it would get if all got the same."""
    return np.log2(np.maximum(share * num_keys, 2.0**-24)).astype(np.float32)


def colour_range(values: list[NDArray[np.float32]]) -> float:
    """The log2 that gets the full colour: nearly the largest of all, within bounds that keep noise pale."""
    highest = max(float(np.quantile(value, 0.995)) for value in values)
    return min(max(highest, _LEAST_RANGE), _MOST_RANGE)


def levels(log_times: NDArray[np.float32], limit: float) -> NDArray[np.uint8]:
    """0..254 from -limit to limit; 127 is the even share."""
    level: NDArray[np.uint8] = np.round(_EVEN + _EVEN * np.clip(log_times / limit, -1, 1)).astype(np.uint8)
    return level


def heat_png(level: NDArray[np.uint8]) -> str:
    """A data URI of [rows, columns] levels: one pixel a cell, clear at the even share."""
    signed = (level.astype(np.float32) - _EVEN) / _EVEN
    rgba = np.where(signed[..., None] > 0, MORE, LESS).astype(np.float32)
    rgba[..., 3] *= np.abs(signed)
    return data_uri(Image.fromarray(np.round(rgba).astype(np.uint8)), "PNG")


def times(log_times: float) -> str:
    """``3.1×`` for a log2 of it."""
    number = 2.0**log_times
    return f"{number:.0f}×" if number >= 9.95 else f"{number:.2g}×"


def to_base64(values: NDArray[np.uint8]) -> str:
    """Bytes in C order as text."""
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
