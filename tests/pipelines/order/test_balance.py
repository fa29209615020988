"""Class balance: quotas by formula, exact counts in every pass, the same chance for every sample of a class."""

import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ca2st.errors import UserInputError
from pipelines.order.plan import EpochPlan
from pipelines.order.selection import BalanceConfig, BalanceRule, ClassBalance, class_quotas
from support.plans import balanced_source, make_record, whole_epoch
from support.refusals import forced

few = settings(max_examples=30)
rules = st.sampled_from(["none", "sqrt", "full", "repeat_factor"])
class_sizes = st.lists(st.integers(0, 300), min_size=1, max_size=12).filter(any)


@few
@given(sizes=class_sizes, rule=rules, threshold=st.sampled_from([0.01, 0.3, 1.0]))
def test_quotas_are_the_formulas_rounded_to_whole_readings(
    sizes: list[int], rule: BalanceRule, threshold: float
) -> None:
    total, filled = sum(sizes), sum(size > 0 for size in sizes)
    exact = {
        "none": [float(size) for size in sizes],
        "full": [total / filled * (size > 0) for size in sizes],
        "sqrt": [total * math.sqrt(size) / sum(map(math.sqrt, sizes)) for size in sizes],
        "repeat_factor": [size * max(1.0, math.sqrt(threshold * total / size)) if size else 0.0 for size in sizes],
    }[rule]
    found = class_quotas(np.array(sizes), BalanceConfig(rule=rule, threshold=threshold)).tolist()
    assert all(abs(quota - value) < 1 + 1e-6 for quota, value in zip(found, exact, strict=True))
    if rule != "repeat_factor":
        assert sum(found) == total


def test_repeat_factors_follow_the_lvis_formula() -> None:
    quotas = class_quotas(np.array([9000, 900, 90, 10]), BalanceConfig(rule="repeat_factor", threshold=0.01))
    assert quotas.tolist() == [9000, 900, round(90 * math.sqrt(0.01 / 0.009)), round(10 * math.sqrt(0.01 / 0.001))]


@few
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    rule=st.sampled_from(["sqrt", "full", "repeat_factor"]),
    turn=st.integers(0, 9),
)
def test_every_pass_holds_each_classs_quota_and_no_sample_twice_more_than_another(
    labels: list[int], rule: BalanceRule, turn: int
) -> None:
    config = BalanceConfig(rule=rule, threshold=0.5)
    balance = ClassBalance(np.array(labels, np.uint16), config)
    readings = balance.readings(("pass", turn))
    quotas = class_quotas(np.bincount(labels), config)
    for label in set(labels):
        own = readings[np.array(labels) == label]
        assert own.sum() == quotas[label]
        assert own.max() - own.min() <= 1
    assert readings.sum() == balance.num_readings
    assert readings.max() <= balance.most_readings


def test_samples_of_a_class_have_the_same_chance_over_passes_and_are_not_always_drawn_together() -> None:
    labels = [0] * 12 + [1] * 4
    balance = ClassBalance(np.array(labels, np.uint16), BalanceConfig(rule="full"))
    passes = np.array([balance.readings(("pass", turn)) for turn in range(3000)], np.int64)
    # 8 of the 12 samples of class 0 are read in a pass, each of the 4 of class 1 twice.
    assert np.abs(passes[:, :12].mean(axis=0) - 8 / 12).max() < 0.05
    assert (passes[:, 12:] == 2).all()
    assert len({tuple(one) for one in passes[:, :12].tolist()}) > 20


@pytest.mark.parametrize("chunk", [1, 3, 1 << 18])
def test_readings_do_not_depend_on_how_many_samples_are_counted_at_once(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    balance = ClassBalance(np.array([0, 1, 1, 2, 0, 1, 0, 0, 2, 1]), BalanceConfig(rule="sqrt"))
    expected = balance.readings(("a",)).tolist()
    monkeypatch.setattr("pipelines.order.selection._CHUNK", chunk)
    assert balance.readings(("a",)).tolist() == expected


@few
@given(
    labels=st.lists(st.integers(0, 3), min_size=8, max_size=60),
    rule=st.sampled_from(["sqrt", "full", "repeat_factor"]),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    repeats=st.integers(1, 2),
    epoch=st.integers(0, 2),
)
def test_a_balanced_epoch_reads_each_class_by_its_quota_and_is_as_long_as_any_other(
    labels: list[int], rule: BalanceRule, cuts: list[int], repeats: int, epoch: int
) -> None:
    edges = [0, *sorted(min(cut, len(labels)) for cut in cuts), len(labels)]
    sizes = np.diff(edges).tolist()
    config = BalanceConfig(rule=rule, threshold=0.4)
    source = balanced_source(labels, sizes, config)
    record = make_record(batch=4, remainder="wrap", block=7, repeats=repeats)
    plan = EpochPlan(record, [source], epoch=epoch)
    quotas = class_quotas(np.bincount(labels), config)
    first_pass: Counter[int] = Counter()
    read = [one for step in whole_epoch(plan, 4) for one in step]
    assert len(set(read)) == len(read)
    for shard, row, number in read:
        if number // repeats < source.most_readings:
            first_pass[labels[edges[shard] + row]] += 1
    assert [first_pass[label] for label in range(len(quotas))] == [repeats * quota for quota in quotas.tolist()]
    assert plan.num_steps == EpochPlan(record, [source], epoch=7).num_steps


def test_a_balanced_source_keeps_three_bytes_a_sample() -> None:
    labels = np.arange(1_000_000, dtype=np.int64) % 97 % 31
    classes = labels.astype(np.uint16)
    tracemalloc.start()
    balance = ClassBalance(classes, BalanceConfig(rule="sqrt"))
    readings = balance.readings(("a",))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (classes.itemsize, readings.itemsize) == (2, 1)
    assert held < 1.1 * readings.nbytes
    assert peak < 40 << 20


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rule": "square"}, "balance.rule: expected one of none, sqrt, full, repeat_factor, found 'square'"),
        ({"threshold": 0.0}, "balance.threshold: expected a part of all samples, 0 to 1, found 0.0"),
        ({"target": "noun"}, "balance.target: expected a balance.rule beside it, found 'noun' and rule 'none'"),
    ],
)
def test_a_wrong_balance_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        forced(BalanceConfig(), **values)
