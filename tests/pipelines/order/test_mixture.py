"""Several sets by weight, repeats and the wrapped end: planned counts, equal steps, resume, locality. Rows P5, P10."""

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import PlanError
from pipelines.keyed_random import apportion, block_quotas
from pipelines.order.plan import EpochPlan, rank_positions
from pipelines.order.selection import default_num_lanes
from pipelines.order.sources import MixtureOrder
from support.plans import counts_of, make_mixture, make_record, readings, whole_epoch
from support.refusals import forced

few = settings(max_examples=30)
set_sizes = st.lists(
    st.lists(st.integers(0, 30), min_size=1, max_size=7).filter(lambda sizes: sum(sizes) > 0), min_size=1, max_size=3
)
weight_lists = st.lists(st.sampled_from([0.25, 1.0, 2.0, 0.7, 3.3]), min_size=3, max_size=3)


@st.composite
def mixtures(draw: st.DrawFn, *, least_repeats: int = 1) -> dict[str, Any]:
    """One to three sets, repeats and either remainder: what `make_mixture` takes."""
    sets, weights, repeats = draw(set_sizes), draw(weight_lists), draw(st.integers(least_repeats, 3))
    batch = draw(st.integers(1, 7)) if repeats == 1 else 2 * repeats * draw(st.integers(1, 3))
    values: dict[str, Any] = {"block": draw(st.integers(1, 9)), "seed": draw(st.integers(0, 3))}
    fits = repeats * sum(map(sum, sets)) >= batch
    remainder = draw(st.sampled_from(["drop", "wrap"])) if fits else "wrap"
    return values | {
        "sets": sets,
        "weights": weights[: len(sets)],
        "batch": batch,
        "repeats": repeats,
        "remainder": remainder,
    }


@few
@given(given_values=mixtures(), epoch=st.integers(0, 3))
def test_p5_every_sample_is_read_as_often_as_its_sets_share_and_passes_say(
    given_values: dict[str, Any], epoch: int
) -> None:
    record, sources = make_mixture(**given_values)
    plan = EpochPlan(record, sources, epoch=epoch)
    order = whole_epoch(plan, record.global_batch_size)
    read = [one for step in order for one in step]
    assert len(set(read)) == len(read) == plan.num_steps * record.global_batch_size
    dropped = plan.num_samples * record.repeats - len(read)
    assert 0 <= dropped < record.global_batch_size
    quotas = block_quotas([share.weight for share in record.mixture]) if len(sources) > 1 else np.ones(1, int)
    for number, source in enumerate(sources):
        shards = range(source.first_shard, source.first_shard + len(source.sizes))
        counts = {place: count for place, count in counts_of(order).items() if place[0] in shards}
        wanted = plan.num_samples * Fraction(int(quotas[number]), int(quotas.sum()))
        total = Fraction(sum(counts.values()), record.repeats)
        assert abs(total - wanted) <= quotas[number] + Fraction(dropped, record.repeats)
        passes, more = divmod(int(total), source.num_samples)
        if not dropped:  # whole passes, and the beginning of one more
            often = Counter(counts.values())
            assert often[(passes + 1) * record.repeats] == more
            assert sum(counts.values()) == record.repeats * int(total)
            assert often[passes * record.repeats] == (source.num_samples - more if passes else 0)


@settings(max_examples=15)
@given(
    given_values=mixtures(),
    worlds=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    epoch=st.integers(0, 2),
    data=st.data(),
)
def test_p10_a_mixture_resumed_at_any_step_by_another_world_goes_on_in_the_same_order(
    given_values: dict[str, Any], worlds: tuple[int, int], epoch: int, data: st.DataObject
) -> None:
    record, sources = make_mixture(**given_values)
    batch = record.global_batch_size
    worlds = (min(worlds[0], -(-batch // 2)), min(worlds[1], -(-batch // 2)))
    expected = whole_epoch(EpochPlan(record, sources, epoch=epoch), batch)
    cut = data.draw(st.integers(0, len(expected)))
    found: list[list[Any]] = []
    for world, steps in zip(worlds, (range(cut), range(cut, len(expected))), strict=True):
        shares = [rank_positions(rank, world, global_batch_size=batch, keep_pairs=True) for rank in range(world)]
        plans = [EpochPlan(record, sources, epoch=epoch) for _ in shares]
        assert {plan.num_steps for plan in plans} == {len(expected)}
        found += [
            [one for plan, share in zip(plans, shares, strict=True) for one in readings(plan, step, share)]
            for step in steps
        ]
    assert found == expected


@few
@given(given_values=mixtures(least_repeats=2))
def test_a_reading_stands_in_its_batch_as_often_as_repeats_say_and_never_beside_itself(
    given_values: dict[str, Any],
) -> None:
    record, sources = make_mixture(**given_values)
    plan = EpochPlan(record, sources, epoch=0)
    per_lane = record.global_batch_size // record.num_lanes
    for step in whole_epoch(plan, record.global_batch_size):
        for start in range(0, len(step), per_lane):
            groups = [step[i : i + 2 * record.repeats] for i in range(start, start + per_lane, 2 * record.repeats)]
            for group in groups:
                evens, odds = ([(s, r, n // record.repeats) for s, r, n in half] for half in (group[::2], group[1::2]))
                assert len(set(evens)) == len(set(odds)) == 1
                assert evens[0] != odds[0]
                assert [n % record.repeats for _, _, n in group[::2]] == list(range(record.repeats))


@few
@given(
    sets=st.lists(st.lists(st.integers(1, 12), min_size=4, max_size=9), min_size=2, max_size=2),
    world=st.integers(1, 4),
    data=st.data(),
)
def test_where_the_world_divides_the_lanes_a_pass_shares_a_shard_only_at_a_cut(
    sets: list[list[int]], world: int, data: st.DataObject
) -> None:
    lanes = world * data.draw(st.integers(1, 2))
    batch = 2 * lanes * data.draw(st.integers(1, 2))
    record, sources = make_mixture(sets, [1.0, 2.0], batch=batch, lanes=lanes, block=3, remainder="wrap")
    readers: dict[tuple[int, int], set[int]] = {}
    for rank in range(world):
        share = rank_positions(rank, world, global_batch_size=batch, keep_pairs=True)
        plan = EpochPlan(record, sources, epoch=0)
        for step in range(plan.num_steps):
            for shard, _, pass_number in readings(plan, step, share):
                readers.setdefault((shard, pass_number), set()).add(rank)
    # A cut between two ranks may go through one shard of each set.
    assert sum(len(ranks) - 1 for ranks in readers.values()) <= len(sets) * (world - 1)


@pytest.mark.parametrize("remainder", ["drop", "wrap"])
def test_weights_decide_the_shares_of_an_epoch_and_of_every_stretch(remainder: str) -> None:
    record, sources = make_mixture([[40, 60], [300]], [3.0, 1.0], batch=10, lanes=5, remainder=remainder)
    plan = EpochPlan(record, sources, epoch=2)
    assert plan.num_samples == 400
    sets = [[int(shard == 2) for shard, _, _ in step] for step in whole_epoch(plan, 10)]
    assert sum(map(sum, sets)) == pytest.approx(100, abs=16)
    assert sum(map(sum, sets[:20])) == pytest.approx(50, abs=30)


def test_a_small_set_of_a_mixture_is_read_in_passes_of_different_order() -> None:
    record, sources = make_mixture([[5], [95]], [1.0, 1.0], batch=2, lanes=1, block=1, seed=3)
    read = [one for step in whole_epoch(EpochPlan(record, sources, epoch=0), 2) for one in step]
    small = [(row, number) for shard, row, number in read if shard == 0]
    passes = [[row for row, number in small if number == turn] for turn in range(10)]
    assert [sorted(one) for one in passes[:9]] == [list(range(5))] * 9
    assert [number for _, number in small] == sorted(number for _, number in small)


def test_epochs_of_a_mixture_differ_and_its_order_is_pinned() -> None:
    record, sources = make_mixture([[2, 1], [3]], [1.0, 1.0], batch=4, repeats=2)
    orders = [whole_epoch(EpochPlan(record, sources, epoch=epoch), 4) for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert orders[0] == PINNED_MIXTURE


PINNED_MIXTURE = [
    [(2, 2, 0), (2, 0, 0), (2, 2, 1), (2, 0, 1)],
    [(2, 0, 2), (2, 1, 0), (2, 0, 3), (2, 1, 1)],
    [(1, 0, 0), (2, 1, 2), (1, 0, 1), (2, 1, 3)],
]
"""Written down once: if it changes, `selection.ORDER_VERSION` must rise."""


def test_wrap_reads_every_sample_of_a_set_smaller_than_a_batch() -> None:
    _, sources = make_mixture([[3, 2]], [1.0], batch=8)
    plan = EpochPlan(make_record(batch=8, remainder="wrap"), sources, epoch=0)
    (step,) = whole_epoch(plan, 8)
    assert sorted(counts_of([step]).values()) == [1, 1, 2, 2, 2]
    assert {number for _, _, number in step} == {0, 1}


def test_an_epoch_of_a_given_length_reads_so_many_different_samples() -> None:
    _, sources = make_mixture([[50, 50]], [1.0], batch=8)
    orders = [
        counts_of(whole_epoch(EpochPlan(make_record(batch=8, epoch_samples=24), sources, epoch=epoch), 8))
        for epoch in (0, 1)
    ]
    assert [len(order) for order in orders] == [24, 24]
    assert orders[0].keys() != orders[1].keys()


@few
@given(weights=st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any), total=st.integers(0, 500))
def test_apportioned_shares_add_up_and_are_within_one_of_the_exact_ones(weights: list[int], total: int) -> None:
    shares = apportion(weights, total)
    assert sum(shares) == total
    assert all(abs(share - Fraction(total * w, sum(weights))) < 1 for share, w in zip(shares, weights, strict=True))


@pytest.mark.parametrize(
    ("weights", "quotas"), [([2.0, 1.0], [42, 21]), ([0.7, 0.3], [42, 18]), ([5.0], [64]), ([999.0, 1.0], [999, 1])]
)
def test_a_block_holds_the_exact_ratio_where_one_of_1024_slots_can(weights: list[float], quotas: list[int]) -> None:
    assert block_quotas(weights).tolist() == quotas


def test_other_ratios_are_rounded_to_1024ths() -> None:
    quotas = block_quotas([math.pi, math.e])
    assert quotas.sum() == 1024
    assert quotas[0] / 1024 == pytest.approx(math.pi / (math.pi + math.e), abs=1 / 1024)


@few
@given(quotas=st.lists(st.integers(1, 9), min_size=1, max_size=4), slots=st.integers(1, 80), data=st.data())
def test_a_slots_reading_is_the_number_of_earlier_slots_of_its_source(
    quotas: list[int], slots: int, data: st.DataObject
) -> None:
    order = MixtureOrder(np.array(quotas), key=("test",), most_blocks=2)
    sources, numbers = order.at(np.arange(slots))
    for source in range(len(quotas)):
        assert numbers[sources == source].tolist() == list(range(int((sources == source).sum())))
    cut = data.draw(st.integers(0, slots))
    before = [int((sources[:cut] == source).sum()) for source in range(len(quotas))]
    assert order.readings_before(cut).tolist() == before


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 0.0], "expected numbers > 0, found 0.0"),
        ([1.0, -1.0], "expected numbers > 0"),
        ([1.0, float("nan")], "found nan"),
        ([1.0, 1e-9], "at least 1/1024 of their sum"),
    ],
)
def test_an_impossible_weight_is_refused(weights: list[float], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        block_quotas(weights)


def test_sources_without_weights_are_refused() -> None:
    record, sources = make_mixture([[4], [4]], [1.0, 1.0], batch=2)
    with pytest.raises(PlanError, match="a weight for each of 2 sources, found 0"):
        EpochPlan(forced(record, mixture=()), sources, epoch=0)


@pytest.mark.parametrize(("batch", "repeats", "lanes"), [(16, 2, 4), (12, 3, 2), (24, 2, 6), (512, 4, 64), (8, 1, 8)])
def test_lanes_default_to_whole_groups_of_repeated_pairs(batch: int, repeats: int, lanes: int) -> None:
    assert default_num_lanes(batch, repeats=repeats) == lanes
    make_record(batch=batch, repeats=repeats)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch": 10, "repeats": 2}, "global_batch_size 10: with repeats 2 expected a multiple of 4"),
        ({"batch": 16, "repeats": 2, "lanes": 8}, "a multiple of 4, found 16 / 8; leave it out for 4"),
        ({"batch": 4, "repeats": 0}, "repeats >= 1"),
        ({"batch": 4, "epoch_samples": 0}, "epoch_samples >= 1"),
    ],
)
def test_a_batch_that_cannot_hold_its_repeats_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_record(**values)
