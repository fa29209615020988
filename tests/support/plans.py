"""Records and plans for tests of the order."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.order.plan import EpochPlan
from pipelines.order.selection import BalanceConfig, ClassBalance, PlanRecord, SetShare, default_num_lanes
from pipelines.order.sources import SampleSource, plain_source

Reading = tuple[int, int, int]
"""Shard, row and number of the reading."""


def make_record(
    *, batch: int, seed: int = 0, lanes: int | None = None, block: int = 4, pad: bool = False, **values: Any
) -> PlanRecord:
    """A record of training, or with `pad` of evaluation."""
    given = {
        "seed": seed,
        "global_batch_size": batch,
        "num_lanes": lanes or default_num_lanes(batch, repeats=values.get("repeats", 1)),
        "shuffle_block": 0 if pad else block,
        "remainder": "pad" if pad else "drop",
        "manifest_fingerprint": "f" * 64,
    }
    return PlanRecord(**(given | values))


def make_mixture(
    sets: Sequence[Sequence[int]], weights: Sequence[float], **values: Any
) -> tuple[PlanRecord, tuple[SampleSource, ...]]:
    """A record that mixes sets of these shard sizes, and its sources."""
    shares = tuple(SetShare(fingerprint=str(number), weight=weight) for number, weight in enumerate(weights))
    firsts = np.cumsum([0, *map(len, sets)]).tolist()
    sources = tuple(
        SampleSource(sizes=np.array(sizes, np.int64), first_shard=first)
        for sizes, first in zip(sets, firsts, strict=False)
    )
    return make_record(mixture=shares, **values), sources


def balanced_source(labels: Sequence[int], sizes: Sequence[int], config: BalanceConfig) -> SampleSource:
    """Samples of these labels, spread over shards of these sizes."""
    return SampleSource(sizes=plain_source(sizes).sizes, balance=ClassBalance(np.array(labels, np.uint16), config))


def readings(plan: EpochPlan, step: int, positions: range) -> list[Reading]:
    """What a step reads."""
    return [(one.shard, one.row, one.repeat) for one in plan.samples(step, positions)]


def whole_epoch(plan: EpochPlan, batch: int) -> list[list[Reading]]:
    """What every step reads."""
    return [readings(plan, step, range(batch)) for step in range(plan.num_steps)]


def counts_of(order: Sequence[Sequence[Reading]]) -> Counter[tuple[int, int]]:
    """How often each sample is read."""
    return Counter((shard, row) for step in order for shard, row, _ in step)
