"""Ceilings: an ideal classifier that is given what a set of senses tells reaches them, and none goes beyond."""

import functools
from collections import Counter, defaultdict
from collections.abc import Hashable

import numpy as np
import pytest

from ca2st.errors import UserInputError
from sharding.synthetic.clips import heard, scene_of
from sharding.synthetic.config import RHYTHMS, SyntheticConfig
from sharding.synthetic.factors import SENSE_SETS, TASKS, binding_of, ceilings, label_spaces, labels_of

_CLIPS = 3_000
"""Half to learn from, half to be tested on."""
_FACTORS = SyntheticConfig(num_shapes=3, num_motions=5, num_tones=2, min_frames=8, max_frames=8)


def what_is_seen_in_order(config: SyntheticConfig, n: int) -> Hashable:
    """Everything in the picture that bears on a label: shape and velocity, or all objects' rhythms."""
    if config.binding:
        return binding_of(config, "train", n).rhythms
    (body,) = scene_of(config, "train", n).bodies
    step = (body.track[1] - body.track[0] + 0.5) % 1.0 - 0.5
    return body.shape, tuple(int(sign) for sign in np.sign(np.where(np.abs(step) < 1e-9, 0.0, step)))


def what_is_seen_without_order(config: SyntheticConfig, n: int) -> Hashable:
    """The same of a set of frames: both ways along a line look alike; so do all orders of the quarters."""
    if config.binding:
        return tuple(sorted(zip(*(RHYTHMS[rhythm] for rhythm in binding_of(config, "train", n).rhythms), strict=True)))
    shape, step = what_is_seen_in_order(config, n)
    return shape, frozenset([step, (-step[0], -step[1])])


@functools.cache
def drawn(config: SyntheticConfig) -> list[tuple[dict[str, Hashable], tuple[int, ...]]]:
    """What each sense tells of every clip, and its labels."""
    return [
        (
            {
                "spatial": what_is_seen_without_order(config, n),
                "temporal": what_is_seen_in_order(config, n),
                "audio": heard(config, "train", n),
            },
            labels_of(config, "train", n),
        )
        for n in range(_CLIPS)
    ]


def accuracy_of_the_ideal_classifier(config: SyntheticConfig, task: str, senses: str) -> float:
    """Names the commonest label of what was observed, learned on half of the clips and tested on the others."""
    number = [space.name for space in label_spaces(config)].index(task)
    found = [(tuple(told[sense] for sense in senses.split("+")), labels[number]) for told, labels in drawn(config)]
    counts: dict[Hashable, Counter[int]] = defaultdict(Counter)
    for seen, label in found[: _CLIPS // 2]:
        counts[seen][label] += 1
    guesses = {seen: labels.most_common(1)[0][0] for seen, labels in counts.items()}
    return float(np.mean([guesses[seen] == label for seen, label in found[_CLIPS // 2 :]]))


@pytest.mark.parametrize("senses", SENSE_SETS)
@pytest.mark.parametrize("task", TASKS)
def test_the_ideal_classifier_reaches_the_ceiling_and_not_more(task: str, senses: str) -> None:
    config = SyntheticConfig(binding=True, num_tones=2) if task == "binding" else _FACTORS
    ceiling = ceilings(task, config)[senses]
    allowed = 4 * np.sqrt(ceiling * (1 - ceiling) / (_CLIPS // 2))
    assert abs(accuracy_of_the_ideal_classifier(config, task, senses) - ceiling) <= allowed


def test_the_default_world_has_the_ceilings_that_its_page_states() -> None:
    assert ceilings("holistic", SyntheticConfig()) == {
        "spatial": 1 / 8, "temporal": 1 / 4, "audio": 1 / 16, "spatial+temporal": 1 / 4,
        "spatial+audio": 1 / 2, "temporal+audio": 1.0, "spatial+temporal+audio": 1.0,
    }  # fmt: skip
    for difficulty, objects in (("easy", 2), ("medium", 3), ("hard", 4)):
        config = SyntheticConfig(difficulty=difficulty, binding=True)
        assert {name: ceiling for name, ceiling in ceilings("binding", config).items() if ceiling < 1} == dict.fromkeys(
            ["spatial", "temporal", "audio", "spatial+temporal", "spatial+audio"], 1 / objects
        )


def test_another_sense_never_lowers_a_ceiling() -> None:
    for task in TASKS:
        found = {frozenset(name.split("+")): ceiling for name, ceiling in ceilings(task, _FACTORS).items()}
        assert all(found[few] <= found[many] for few in found for many in found if few < many)
        assert found[frozenset(("temporal", "audio"))] == 1.0


def test_a_task_without_ceilings_is_answered_with_those_that_have_them() -> None:
    with pytest.raises(
        UserInputError, match=r"task: expected one of space, .*, binding, found 'bindin' \(did you mean"
    ):
        ceilings("bindin", SyntheticConfig())
