"""How often the best possible model can be right, by what it is given: printed beside results, so that a reason shows.

Three senses:

- ``spatial``: a clip's frames without their order. They show shape and colour, and the line along which something
  moves, but not which way: a clip and its reverse have the same frames and are equally likely.
- ``temporal``: the frames in order. They show all of the picture.
- ``audio``: the sound.

A ceiling follows from how the factors are drawn and holds for every difficulty; noise and clutter only keep models
further below it. It bounds what the senses contain, not what a model does with them: cross-attention with time codes
puts frames back in order, so a model that joins images and sound that way (CAVA) is bounded by ``temporal+audio``.
"""

import itertools
import math
from collections.abc import Mapping

from ca2st.errors import UserInputError, did_you_mean
from sharding.synthetic.config import SyntheticConfig
from sharding.synthetic.factors import MOTIONS

SENSES = ("spatial", "temporal", "audio")
SENSE_SETS = tuple(
    "+".join(senses) for size in range(1, len(SENSES) + 1) for senses in itertools.combinations(SENSES, size)
)
"""``spatial``, ``temporal``, ``audio``, ``spatial+temporal``, ``spatial+audio``, ``temporal+audio``, all three."""

_PARTS: Mapping[str, tuple[str, ...]] = {
    "space": ("space",),
    "time": ("time",),
    "audio": ("audio",),
    "holistic": ("space", "time", "audio"),
}


def ceilings(task: str, config: SyntheticConfig) -> dict[str, float]:
    """Best possible top-1 accuracy (0 to 1) of `task` for every set of senses, by its name in SENSE_SETS.

    Raises:
        UserInputError: an unknown task.
    """
    known = [*_PARTS, "binding"]
    if task not in known:
        raise UserInputError(f"task: expected one of {', '.join(known)}, found {task!r}{did_you_mean(task, known)}")
    return {name: _ceiling(task, frozenset(name.split("+")), config) for name in SENSE_SETS}


def _ceiling(task: str, senses: frozenset[str], config: SyntheticConfig) -> float:
    if task == "binding":
        return 1.0 if {"temporal", "audio"} <= senses else 1.0 / config.settings.num_objects
    return math.prod(_share_told_apart(part, senses, config) for part in _PARTS[task])


def _share_told_apart(part: str, senses: frozenset[str], config: SyntheticConfig) -> float:
    """Groups of classes that look or sound different, by number of classes; classes are equally likely."""
    num_shapes, num_motions, num_tones = config.sizes
    if part == "space":
        return 1.0 if senses & {"spatial", "temporal"} else 1.0 / num_shapes
    if part == "audio":
        return 1.0 if "audio" in senses else 1.0 / num_tones
    if "temporal" in senses:
        return 1.0
    return (_num_lines(num_motions) if "spatial" in senses else 1) / num_motions


def _num_lines(num_motions: int) -> int:
    """Lines along which the first `num_motions` directions move: up and down share one."""
    return len({max(step, (-step[0], -step[1])) for step in tuple(MOTIONS.values())[:num_motions]})
