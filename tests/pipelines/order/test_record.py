"""What the order of an epoch depends on."""

from typing import Any

import pytest

from pipelines.errors import PlanError
from pipelines.order.selection import PlanRecord, default_num_lanes
from support.refusals import forced

VALUES: dict[str, Any] = {
    "seed": 3,
    "global_batch_size": 8,
    "num_lanes": 4,
    "shuffle_block": 16,
    "remainder": "drop",
    "manifest_fingerprint": "a" * 64,
}
RECORD = PlanRecord(**VALUES)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_lanes": 3}, "num_lanes: expected a divisor of global_batch_size 8, found 3"),
        ({"global_batch_size": 0}, "expected global_batch_size >= 1"),
        ({"shuffle_block": -1}, "shuffle_block >= 0"),
        ({"remainder": "keep"}, "remainder: expected one of drop, wrap, pad, found 'keep'"),
    ],
)
def test_an_impossible_record_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        forced(RECORD, **values)


@pytest.mark.parametrize(("batch", "lanes"), [(1, 1), (12, 12), (64, 64), (96, 48), (128, 64), (131, 1), (384, 64)])
def test_lanes_default_to_the_largest_divisor_up_to_64(batch: int, lanes: int) -> None:
    assert default_num_lanes(batch) == lanes
