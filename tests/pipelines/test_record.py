"""Row P11: what a resume compares."""

import json
from typing import Any

import pytest

from pipelines.errors import PlanError, ResumeMismatchError
from pipelines.record import PlanRecord, default_num_lanes
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


def test_p11_a_record_survives_json_and_equals_itself() -> None:
    again = PlanRecord.from_dict(json.loads(json.dumps(RECORD.to_dict())))
    assert again == RECORD
    RECORD.require_same(again)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 4),
        ("global_batch_size", 16),
        ("num_lanes", 2),
        ("shuffle_block", 32),
        ("remainder", "pad"),
        ("manifest_fingerprint", "b" * 64),
        ("version", 2),
    ],
)
def test_p11_a_resume_with_another_value_is_refused_and_names_the_field(name: str, value: Any) -> None:
    now = PlanRecord(**VALUES | {name: value})
    assert len(RECORD.differences(now)) == 1
    with pytest.raises(ResumeMismatchError, match=f"{name}: .* -> {value!r}"):
        RECORD.require_same(now)


def test_p11_a_record_with_other_fields_is_refused() -> None:
    with pytest.raises(ResumeMismatchError, match="expected the fields"):
        PlanRecord.from_dict(RECORD.to_dict() | {"world_size": 2})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_lanes": 3}, "num_lanes: expected a divisor of global_batch_size 8, found 3"),
        ({"global_batch_size": 0}, "expected global_batch_size >= 1"),
        ({"shuffle_block": -1}, "shuffle_block >= 0"),
        ({"remainder": "keep"}, "remainder: expected one of drop, pad, found 'keep'"),
    ],
)
def test_an_impossible_record_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        forced(RECORD, **values)


@pytest.mark.parametrize(("batch", "lanes"), [(1, 1), (12, 12), (64, 64), (96, 48), (128, 64), (131, 1), (384, 64)])
def test_lanes_default_to_the_largest_divisor_up_to_64(batch: int, lanes: int) -> None:
    assert default_num_lanes(batch) == lanes
