"""RandAugment's notation, draws and magnitudes against timm's own."""

import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from timm.data import auto_augment as timm_augment

from ca2st.errors import UserInputError
from pipelines.augment.rand_augment import (
    ENHANCEMENTS,
    GEOMETRIC,
    NUMBERS_PER_OPERATION,
    OPERATION_NAMES,
    ImageAugment,
    Operation,
    argument_of,
    parse_rand_augment,
)

PUBLISHED = "rand-m7-n4-mstd0.5-inc1"
TWO_WAYS = {*GEOMETRIC, *ENHANCEMENTS}


def test_the_published_notation_is_read_as_timm_reads_it() -> None:
    ours, theirs = parse_rand_augment(PUBLISHED), timm_augment.rand_augment_transform(PUBLISHED, {})
    first = theirs.ops[0]
    assert (ours.num_operations, ours.magnitude) == (theirs.num_layers, first.magnitude)
    assert (ours.probability, ours.magnitude_std) == (first.prob, first.magnitude_std)
    assert [op.name for op in theirs.ops] == list(OPERATION_NAMES)


@pytest.mark.parametrize("text", ["rand-inc1", "rand-n3-inc1-p0.25", "rand-mstd101-m9-inc1"])
def test_what_is_left_out_is_as_in_timm(text: str) -> None:
    ours, theirs = parse_rand_augment(text), timm_augment.rand_augment_transform(text, {})
    first = theirs.ops[0]
    assert (ours.num_operations, ours.magnitude, ours.probability) == (theirs.num_layers, first.magnitude, first.prob)
    assert (ours.magnitude_std > 100) == math.isinf(first.magnitude_std)


@pytest.mark.parametrize("name", OPERATION_NAMES)
@pytest.mark.parametrize("negative", [False, True])
def test_arguments_are_timms_at_every_magnitude(name: str, negative: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_augment.random, "random", lambda: 1.0 if negative else 0.0)
    level_to_argument = timm_augment.LEVEL_TO_ARG[name]
    for magnitude in np.linspace(0, 10, 41).tolist():
        ours = argument_of(name, level=magnitude / 10, negative=negative)  # type: ignore[arg-type]
        theirs = level_to_argument(magnitude, {})[0] if level_to_argument else 0.0
        assert ours == pytest.approx(theirs, abs=1e-12), (name, magnitude)


def drawn(rng: np.random.Generator, text: str = PUBLISHED) -> ImageAugment | None:
    rules = parse_rand_augment(text)
    return rules.drawn(rng.random(rules.num_operations * NUMBERS_PER_OPERATION).tolist())


def test_operations_come_as_often_and_as_strong_as_timms() -> None:
    rng = np.random.default_rng(0)
    ours = [operation for _ in range(4000) for operation in getattr(drawn(rng), "operations", ())]
    counts = Counter(operation.name for operation in ours)
    assert len(ours) / 4000 == pytest.approx(4 * 0.5, rel=0.05)
    assert set(counts) == set(OPERATION_NAMES)
    assert max(counts.values()) < 1.25 * min(counts.values())
    degrees = np.array([operation.argument for operation in ours if operation.name == "Rotate"])
    theirs = np.abs(timm_rotations(len(degrees)))
    assert abs((degrees > 0).mean() - 0.5) < 0.08
    assert np.abs(degrees).mean() == pytest.approx(theirs.mean(), rel=0.01)
    assert np.abs(degrees).std() == pytest.approx(theirs.std(), rel=0.15)


def timm_rotations(count: int) -> np.ndarray:
    random.seed(0)
    return np.array(
        [timm_augment._rotate_level_to_arg(min(max(random.gauss(7, 0.5), 0), 10), None)[0] for _ in range(count)]
    )


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=16, max_size=16))
def test_any_numbers_give_operations_within_their_ranges(numbers: list[float]) -> None:
    for operation in getattr(parse_rand_augment(PUBLISHED).drawn(numbers), "operations", ()):
        assert operation.name in OPERATION_NAMES
        assert -30 <= operation.argument <= 256


def test_a_clip_for_which_nothing_is_applied_is_left_alone() -> None:
    assert parse_rand_augment(PUBLISHED).drawn([0.3, 0.99, 0.5, 0.5] * 4) is None


def test_magnitudes_above_100_standard_deviations_are_evenly_spread() -> None:
    rng = np.random.default_rng(1)
    augments = [drawn(rng, "rand-m10-n1-p1-mstd101-inc1") for _ in range(3000)]
    degrees = [abs(one.operations[0].argument) for one in augments if one and one.operations[0].name == "Rotate"]
    assert np.histogram(degrees, bins=3, range=(0, 30))[0] / len(degrees) == pytest.approx([1 / 3] * 3, abs=0.12)


def test_geometric_operations_that_follow_each_other_are_one_run() -> None:
    names = ("ShearX", "Rotate", "Invert", "TranslateXRel", "Equalize", "Invert")
    runs = ImageAugment(tuple(Operation(name) for name in names)).runs()  # type: ignore[arg-type]
    assert [(geometric, [one.name for one in run]) for geometric, run in runs] == [
        (True, ["ShearX", "Rotate"]),
        (False, ["Invert"]),
        (True, ["TranslateXRel"]),
        (False, ["Equalize", "Invert"]),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rand-m7-n4", "expected timm's notation"),
        ("rand-m7-inc0", "expected timm's notation"),
        ("augmix-m7-inc1", "expected timm's notation.*found 'augmix' at its beginning"),
        ("rand-m7-n4", "found no inc1 in 'rand-m7-n4'"),
        ("rand-m7-inc0", "found inc0 in"),
        ("rand-m7-m8-inc1", "found section 'm8'"),
        ("rand-tweights-inc1", "found section 'tweights'"),
        ("rand-m7.5-inc1", "found m = 7.5, expected a whole number"),
        ("rand-m11-inc1", "expected m in 0..10"),
        ("rand-n0-inc1", "n in 1..16"),
        ("rand-p1.5-inc1", "p in 0..1"),
    ],
)
def test_another_notation_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        parse_rand_augment(text)
