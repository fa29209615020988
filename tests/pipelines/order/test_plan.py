"""Properties of the order. Rows P5, P6 and P10 of the reliability matrix: the part that needs no bytes."""

import hashlib
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipelines.errors import PlanError
from pipelines.order.plan import EpochPlan, count_steps, rank_positions, require_enough_samples
from pipelines.order.sources import plain_source
from support.plans import make_record

few = settings(max_examples=40)
shard_sizes = st.lists(st.integers(0, 12), min_size=1, max_size=20)
batches = st.integers(1, 24)
blocks = st.integers(1, 9)


def ids(plan: EpochPlan, step: int, positions: range) -> list[tuple[int, int]]:
    return [(one.shard, one.row) for one in plan.samples(step, positions)]


def whole_order(plan: EpochPlan, batch: int) -> list[list[tuple[int, int]]]:
    return [ids(plan, step, range(batch)) for step in range(plan.num_steps)]


@few
@given(sizes=shard_sizes, batch=batches, block=blocks, seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_p5_drop_reads_each_sample_at_most_once_and_leaves_out_less_than_a_batch(
    sizes: list[int], batch: int, block: int, seed: int, epoch: int
) -> None:
    assume(sum(sizes) >= batch)
    plan = EpochPlan(make_record(batch=batch, seed=seed, block=block), [plain_source(sizes)], epoch=epoch)
    read = [one for step in whole_order(plan, batch) for one in step]
    assert len(set(read)) == len(read)
    assert sum(sizes) - len(read) < batch
    assert set(read) <= {(shard, row) for shard, size in enumerate(sizes) for row in range(size)}


@few
@given(sizes=shard_sizes, batch=batches)
def test_p5_pad_reads_each_sample_exactly_once_and_marks_the_rest(sizes: list[int], batch: int) -> None:
    assume(sum(sizes) > 0)
    plan = EpochPlan(make_record(batch=batch, pad=True), [plain_source(sizes)], epoch=0)
    parts = [plan.samples(step, range(batch)) for step in range(plan.num_steps)]
    marked = np.array([one.is_padding for part in parts for one in part])
    read = [one for step in whole_order(plan, batch) for one in step]
    real = [one for one, padding in zip(read, marked, strict=True) if not padding]
    everything = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    assert sorted(real) == everything
    assert set(read) == set(everything)
    assert marked.sum() < batch


@pytest.mark.parametrize("samples", [1, 3, 7])
def test_a_lane_without_samples_repeats_those_of_another_whether_shuffled_or_not(samples: int) -> None:
    record = make_record(batch=16, lanes=8, shuffle_block=4, remainder="pad")
    step = EpochPlan(record, [plain_source([samples])], epoch=0).samples(0, range(16))
    assert sorted(one.row for one in step if not one.is_padding) == list(range(samples))
    assert {one.row for one in step} == set(range(samples))


@few
@given(sizes=shard_sizes, batch=batches, world=st.integers(1, 8), block=blocks, pad=st.booleans())
def test_p5_every_world_size_reads_the_same_order_and_no_rank_starves(
    sizes: list[int], batch: int, world: int, block: int, pad: bool
) -> None:
    assume(sum(sizes) >= batch and -(-batch // (1 if pad else 2)) >= world)
    record = make_record(batch=batch, block=block, pad=pad)
    alone = whole_order(EpochPlan(record, [plain_source(sizes)], epoch=1), batch)
    shares = [rank_positions(rank, world, global_batch_size=batch, keep_pairs=not pad) for rank in range(world)]
    plans = [EpochPlan(record, [plain_source(sizes)], epoch=1) for _ in range(world)]
    assert len({plan.num_steps for plan in plans}) == 1
    assert all(len(share) > 0 for share in shares)
    for step, expected in enumerate(alone):
        together = [one for plan, share in zip(plans, shares, strict=True) for one in ids(plan, step, share)]
        assert together == expected


@few
@given(sizes=shard_sizes, batch=batches, block=blocks, epoch=st.integers(0, 3), data=st.data())
def test_p10_a_plan_begun_at_any_step_continues_as_if_it_had_run_from_the_start(
    sizes: list[int], batch: int, block: int, epoch: int, data: st.DataObject
) -> None:
    assume(sum(sizes) >= batch)
    record = make_record(batch=batch, block=block)
    expected = whole_order(EpochPlan(record, [plain_source(sizes)], epoch=epoch), batch)
    step = data.draw(st.integers(0, len(expected) - 1))
    fresh = EpochPlan(record, [plain_source(sizes)], epoch=epoch)
    assert [ids(fresh, later, range(batch)) for later in range(step, fresh.num_steps)] == expected[step:]


@few
@given(data=st.data(), sizes=st.lists(st.integers(1, 12), min_size=4, max_size=20), world=st.integers(1, 4))
def test_where_the_world_divides_the_lanes_a_shard_is_shared_by_ranks_only_at_a_cut(
    data: st.DataObject, sizes: list[int], world: int
) -> None:
    lanes = world * data.draw(st.integers(1, 3))
    batch = 2 * lanes * data.draw(st.integers(1, 2))
    assume(sum(sizes) >= batch)
    record = make_record(batch=batch, lanes=lanes, block=3)
    readers: dict[int, set[int]] = {}
    for rank in range(world):
        share = rank_positions(rank, world, global_batch_size=batch, keep_pairs=True)
        assert len(share) == batch // world
        plan = EpochPlan(record, [plain_source(sizes)], epoch=0)
        for step in range(plan.num_steps):
            for shard, _ in ids(plan, step, share):
                readers.setdefault(shard, set()).add(rank)
    shared = sum(len(ranks) - 1 for ranks in readers.values())
    assert shared <= world - 1


@few
@given(sizes=shard_sizes, lanes=st.integers(1, 12), per_lane=st.integers(1, 4))
def test_position_p_belongs_to_the_lane_the_design_names(sizes: list[int], lanes: int, per_lane: int) -> None:
    batch = lanes * per_lane
    assume(sum(sizes) >= batch)
    plan = EpochPlan(make_record(batch=batch, lanes=lanes, pad=True), [plain_source(sizes)], epoch=0)
    laid = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    starts = [lane * len(laid) // lanes for lane in range(lanes)]
    first = ids(plan, 0, range(batch))
    for position in range(batch):
        lane = position * lanes // batch
        slot = position - lane * batch // lanes
        if starts[lane] + slot < ([*starts, len(laid)])[lane + 1]:
            assert first[position] == laid[starts[lane] + slot]


@given(batch=st.integers(1, 200), world=st.integers(1, 40), pairs=st.booleans())
def test_rank_positions_cover_the_batch_in_order_and_keep_mixup_pairs_whole(
    batch: int, world: int, pairs: bool
) -> None:
    unit = 2 if pairs else 1
    assume(-(-batch // unit) >= world)
    shares = [rank_positions(rank, world, global_batch_size=batch, keep_pairs=pairs) for rank in range(world)]
    assert [position for share in shares for position in share] == list(range(batch))
    assert all(share.start % unit == 0 for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= (2 * unit - 1 if pairs else 1)


def test_epochs_and_seeds_differ_and_the_order_is_pinned() -> None:
    sizes = [5, 3, 4]
    orders = {
        (seed, epoch): whole_order(EpochPlan(make_record(batch=4, seed=seed), [plain_source(sizes)], epoch=epoch), 4)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({str(order) for order in orders.values()}) == 4
    assert orders[0, 0] == PINNED_ORDER


PINNED_ORDER = [[(1, 0), (0, 0), (2, 0), (2, 1)], [(1, 2), (0, 2), (0, 3), (2, 2)], [(1, 1), (0, 1), (0, 4), (2, 3)]]
"""Written down once: if it changes, `selection.ORDER_VERSION` must rise."""


@pytest.mark.parametrize(
    ("values", "epoch", "pinned"),
    [
        ({"batch": 6, "lanes": 2, "block": 5}, 0, "13eac22414b44dc8"),
        ({"batch": 8, "lanes": 8, "block": 64, "seed": 3}, 1, "d3eb505266bc7baf"),
        ({"batch": 12, "lanes": 3, "block": 4096, "seed": 1}, 2, "4a238dc0d3176f24"),
        ({"batch": 7, "lanes": 7, "pad": True}, 0, "d5879f44f62e7ec3"),
        ({"batch": 16, "lanes": 4, "pad": True}, 0, "af7d1310be3e67ce"),
    ],
)
def test_the_order_of_one_set_is_that_of_order_version_1(values: dict[str, Any], epoch: int, pinned: str) -> None:
    plan = EpochPlan(make_record(**values), [plain_source([7, 0, 30, 12, 1, 25])], epoch=epoch)
    order = [one for step in whole_order(plan, values["batch"]) for one in step]
    assert hashlib.sha256(repr(order).encode()).hexdigest()[:16] == pinned


@few
@given(sizes=shard_sizes, batch=batches, block=st.integers(1, 40))
def test_a_block_is_shuffled_within_itself(sizes: list[int], batch: int, block: int) -> None:
    assume(sum(sizes) >= batch)
    stored = EpochPlan(make_record(batch=batch, lanes=1, block=1), [plain_source(sizes)], epoch=0)
    shuffled = EpochPlan(make_record(batch=batch, lanes=1, block=block), [plain_source(sizes)], epoch=0)
    flat = [one for step in whole_order(stored, batch) for one in step]
    mixed = [one for step in whole_order(shuffled, batch) for one in step]
    whole_blocks = len(flat) // block * block
    for start in range(0, whole_blocks, block):
        assert set(mixed[start : start + block]) == set(flat[start : start + block])


@pytest.mark.parametrize(("samples", "batch", "world"), [(0, 4, 1), (3, 4, 1), (3, 2, 4)])
def test_p6_too_few_samples_are_refused_with_the_three_numbers(samples: int, batch: int, world: int) -> None:
    expected = f"{samples} samples, global_batch_size {batch}, world_size {world}"
    with pytest.raises(PlanError, match=expected):
        require_enough_samples(num_samples=samples, global_batch_size=batch, world_size=world, remainder="drop")


def test_p6_an_evaluation_needs_one_sample_a_rank_and_no_whole_batch() -> None:
    require_enough_samples(num_samples=2, global_batch_size=8, world_size=2, remainder="pad")
    with pytest.raises(PlanError, match="1 samples, global_batch_size 8, world_size 2"):
        require_enough_samples(num_samples=1, global_batch_size=8, world_size=2, remainder="pad")


def test_p6_a_plan_without_a_whole_batch_is_refused() -> None:
    with pytest.raises(PlanError, match=r"at least one batch.*found 3 samples"):
        EpochPlan(make_record(batch=4), [plain_source([3])], epoch=0)
    with pytest.raises(PlanError, match=r"at least one batch.*found 0 samples"):
        EpochPlan(make_record(batch=4, pad=True), [plain_source([0])], epoch=0)


@pytest.mark.parametrize(
    ("batch", "world", "pairs", "message"),
    [(2, 2, True, "at least 4"), (6, 4, True, "at least 8"), (2, 3, False, "at least 3")],
)
def test_a_batch_that_leaves_a_rank_without_work_is_refused(batch: int, world: int, pairs: bool, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        rank_positions(0, world, global_batch_size=batch, keep_pairs=pairs)


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(PlanError, match="0 <= rank < world_size 2, found 2"):
        rank_positions(2, 2, global_batch_size=8, keep_pairs=True)


@pytest.mark.parametrize(("step", "positions"), [(3, range(4)), (-1, range(4)), (0, range(5))])
def test_a_step_or_position_outside_the_epoch_is_refused(step: int, positions: range) -> None:
    plan = EpochPlan(make_record(batch=4), [plain_source([12])], epoch=0)
    with pytest.raises(PlanError, match=r"a step below 3 and positions within 0..4"):
        plan.samples(step, positions)


def test_the_number_of_steps_is_rounded_down_for_drop_and_up_for_pad() -> None:
    assert count_steps(11, 4, remainder="drop") == 2
    assert count_steps(11, 4, remainder="pad") == 3


@pytest.mark.parametrize("num_shards", [3_334, 333_334])
def test_a_hundred_million_samples_need_only_the_shard_table_and_a_block_a_lane(num_shards: int) -> None:
    sizes = np.full(num_shards, 300)
    tracemalloc.start()
    plan = EpochPlan(make_record(batch=512, block=4096), [plain_source(sizes)], epoch=0)
    first, last = plan.samples(0, range(512)), plan.samples(plan.num_steps - 1, range(512))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.num_samples == 300 * num_shards
    assert len(first) == len(last) == 512
    # Kept, 8 bytes each: sizes, their sums, the permuted shards and their sums; a block of 4096 in each of 64 lanes.
    blocks = 64 * 4096 * 8
    assert held < 5 * 8 * num_shards + blocks + (1 << 20)
    assert peak < 8 * 8 * num_shards + blocks + (2 << 20)
