"""The six factors are independent, and the label spaces name them."""

import itertools

import numpy as np
import pytest

from sharding.synthetic.clips import COLOURS, heard, scene_of
from sharding.synthetic.config import RHYTHMS, SyntheticConfig, beats, moments_of, phases, quarters
from sharding.synthetic.factors import MOTIONS, SHAPES, details_of, factors_of, label_spaces, labels_of
from support.independence import dependence

HARD = SyntheticConfig(difficulty="hard")
EXTRA = ["space", "time", "audio", "holistic", "colour", "speed", "rhythm"]


def test_all_six_factors_are_independent_and_uniform() -> None:
    labels = np.array([labels_of(HARD, "train", n) for n in range(4_000)])
    spaces = label_spaces(HARD)
    assert [space.name for space in spaces] == EXTRA
    factors = [number for number, space in enumerate(spaces) if space.name != "holistic"]
    for first, second in itertools.combinations(factors, 2):
        assert dependence(labels[:, first], labels[:, second]) < 4.0
    for number in factors:
        counts = np.bincount(labels[:, number], minlength=len(spaces[number].classes))
        expected = len(labels) / len(counts)
        assert np.abs(counts - expected).max() < 4 * np.sqrt(expected)


def test_the_statistic_of_dependence_sees_a_weak_dependence() -> None:
    random = np.random.default_rng(0)
    first, second = random.integers(4, size=(2, 8_000))
    copied = np.where(random.random(8_000) < 0.1, first, second)
    assert dependence(first, second) < 4.0
    assert dependence(first, copied) > 10.0


@pytest.mark.parametrize("difficulty", ["medium", "hard"])
def test_what_the_labels_name_is_what_is_drawn_and_sounded(difficulty: str) -> None:
    config = SyntheticConfig(difficulty=difficulty)
    spaces = {space.name: space.classes for space in label_spaces(config)}
    for n in range(40):
        named = dict(zip(spaces, labels_of(config, "train", n), strict=True))
        (body,) = scene_of(config, "train", n).bodies
        steps = (np.diff(body.track, axis=0) + 0.5) % 1.0 - 0.5
        velocity = steps[0] * config.frames_per_second
        assert body.shape == spaces["space"][named["space"]]
        assert np.allclose(velocity / np.hypot(*velocity), MOTIONS[spaces["time"][named["time"]]], atol=1e-9)
        assert (np.hypot(*velocity) > 0.75) == (spaces["speed"][named["speed"]] == "fast")
        hue = body.colours[0] / body.colours[0].max()
        nearest = min(COLOURS, key=lambda name: float(np.abs(hue - np.array(COLOURS[name])).sum()))
        assert nearest == spaces["colour"][named["colour"]]
        assert heard(config, "train", n) == (named["audio"], spaces["rhythm"][named["rhythm"]])


def test_easy_labels_are_those_of_old_and_carry_no_details() -> None:
    config = SyntheticConfig()
    assert [space.name for space in label_spaces(config)] == EXTRA[:4]
    factors = factors_of(config, "train", 7)
    assert labels_of(config, "train", 7)[:3] == (factors.space, factors.time, factors.audio)
    assert heard(config, "train", 7) == (factors.audio, None)
    assert (details_of(config, "train", 7).colour, details_of(config, "train", 7).speed) == (0, 0)


def test_the_difficulty_changes_no_label() -> None:
    for n in range(64):
        easy, hard = (factors_of(SyntheticConfig(difficulty=name), "train", n) for name in ("easy", "hard"))
        assert easy == hard


def test_every_rhythm_beats_in_half_of_the_clip() -> None:
    assert RHYTHMS == ("xx..", "x.x.", "x..x", ".xx.", ".x.x", "..xx")
    assert len(SHAPES) >= 4
    moments = moments_of(16)
    for rhythm in RHYTHMS:
        assert "".join("x" if beat else "." for beat in beats(rhythm, moments)[::4]) == rhythm
        assert beats(rhythm, moments).sum() == 8
    assert quarters(np.array([0.0, 0.249, 0.25, 0.999, 1.0])).tolist() == [0, 0, 1, 3, 3]
    assert np.allclose(phases(np.array([0.0, 0.125, 0.25, 0.4375])), [0.0, 0.5, 0.0, 0.75])
