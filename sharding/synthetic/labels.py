"""The label spaces of a synthetic set, and the labels of its samples."""

import itertools

from sharding.manifest import LabelSpace
from sharding.synthetic.binding import binding_of, object_shapes
from sharding.synthetic.config import SyntheticConfig
from sharding.synthetic.factors import MOTIONS, TONES_HZ, details_of, factors_of
from sharding.synthetic.outlines import SHAPES
from sharding.synthetic.rhythms import RHYTHMS


def label_spaces(config: SyntheticConfig) -> tuple[LabelSpace, ...]:
    """What the samples are labelled with.

    ``space``, ``time``, ``audio`` and ``holistic`` (the combination of the three), then ``colour``, ``speed`` and
    ``rhythm`` where the difficulty has them. Binding scenes: ``binding``, then ``audio`` and ``rhythm`` of the sound
    and the rhythm of each object, from which experts can learn to hear and to see beats.
    """
    named = _binding_classes(config) if config.binding else _factor_classes(config)
    return tuple(LabelSpace(name=name, classes=classes) for name, classes in named.items())


def labels_of(config: SyntheticConfig, split: str, index: int) -> tuple[int, ...]:
    """Labels of sample `index` in the order of `label_spaces`."""
    return _binding_labels(config, split, index) if config.binding else _factor_labels(config, split, index)


def _tones(config: SyntheticConfig) -> tuple[str, ...]:
    return tuple(f"{hertz}_hz" for hertz in TONES_HZ[: config.num_tones])


def _factor_classes(config: SyntheticConfig) -> dict[str, tuple[str, ...]]:
    shapes, motions, tones = SHAPES[: config.num_shapes], tuple(MOTIONS)[: config.num_motions], _tones(config)
    combinations = tuple(" ".join(parts) for parts in itertools.product(shapes, motions, tones))
    return {"space": shapes, "time": motions, "audio": tones, "holistic": combinations} | _detail_classes(config)


def _detail_classes(config: SyntheticConfig) -> dict[str, tuple[str, ...]]:
    settings = config.settings
    named = {
        "colour": settings.colours,
        "speed": tuple(name for name, _ in settings.speeds),
        "rhythm": RHYTHMS if settings.keyed_sound else (),
    }
    return {name: classes for name, classes in named.items() if len(classes) > 1}


def _factor_labels(config: SyntheticConfig, split: str, index: int) -> tuple[int, ...]:
    factors, details = factors_of(config, split, index), details_of(config, split, index)
    holistic = (factors.space * config.num_motions + factors.time) * config.num_tones + factors.audio
    beside = tuple(getattr(details, name) for name in _detail_classes(config))
    return factors.space, factors.time, factors.audio, holistic, *beside


def _binding_classes(config: SyntheticConfig) -> dict[str, tuple[str, ...]]:
    shapes = object_shapes(config)
    named = {"binding": shapes, "audio": _tones(config), "rhythm": RHYTHMS}
    return named | {f"{shape}_rhythm": RHYTHMS for shape in shapes}


def _binding_labels(config: SyntheticConfig, split: str, index: int) -> tuple[int, ...]:
    binding = binding_of(config, split, index)
    return binding.keeper, binding.tone, binding.heard, *binding.rhythms
