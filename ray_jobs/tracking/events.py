"""From journal lines to the numbers that MLflow gets: pure, but for reading the files."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from ca2st.training.journal import parse_event, read_events

_BATCH_VALUES = 500  # MLflow takes at most 1000 metrics a call
_NOT_METRICS = frozenset({"event", "attempt", "step", "time", "sample_ids_hash"})
WORLD_SIZE = "train/world_size"
"""Training processes of the steps that follow: an elastic run has more and fewer."""
SYSTEM_PREFIX = "system/"
"""Of what is measured on a node, beside the run and not of it."""


class Value(NamedTuple):
    """One number of a metric."""

    name: str
    value: float
    milliseconds: int
    """Since 1970."""
    step: int


class SystemLine(TypedDict):
    """A line of ``system/<node>.jsonl``."""

    time: float
    step: int
    metrics: dict[str, float | None]


def step_values(event: Mapping[str, Any]) -> Iterator[Value]:
    """Numbers of a line: ``train/loss``, ``stage/decode_seconds``, ``validation/top1``, ``train/world_size``.

    A metric of an evaluation that was not finite, which the journal holds by name only, is NaN.
    """
    if event["event"] == "step":
        named = {f"train/{name}": value for name, value in event.items() if name not in _NOT_METRICS}
        for times in ("stages", "loader"):
            named |= {_stage_name(name): value for name, value in event.get(times, {}).items()}
    elif event["event"] == "eval":
        metrics = event["metrics"] | dict.fromkeys(event.get("not_finite", ()), math.nan)
        named = {f"{event['split']}/{name}": value for name, value in metrics.items()}
    elif event["event"] == "start":
        named = {WORLD_SIZE: event.get("topology", {}).get("world_size")}
    else:
        return
    for name, value in named.items():
        if _is_number(value):
            yield Value(name, float(value), milliseconds(event), event["step"])


def system_values(line: Mapping[str, Any], node: str) -> Iterator[Value]:
    """Numbers of a line of ``system/<node>.jsonl`` as ``system/<node>/<name>``."""
    for name, value in line["metrics"].items():
        if _is_number(value):
            yield Value(f"{SYSTEM_PREFIX}{node}/{name}", float(value), milliseconds(line), int(line["step"]))


def read_batches(path: Path, offset: int, *, kind: type | None = None) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Whole lines behind `offset`, in batches small enough for one call, with the offset behind each.

    Damaged lines are left out with a warning; `kind` as for `parse_event`.
    """
    if not path.exists():
        return
    batch: list[dict[str, Any]] = []
    num_values, begin = 0, offset
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                break
            event = parse_event(line, where=f"{path}: line at byte {offset}", kind=kind)
            if event is None:
                offset += len(line)
                continue
            size = len(event) + sum(len(value) for value in event.values() if isinstance(value, dict))
            if batch and num_values + size > _BATCH_VALUES:
                yield batch, offset
                batch, num_values, begin = [], 0, offset
            batch.append(event)
            num_values += size
            offset += len(line)
    if batch or offset > begin:
        yield batch, offset


def begin_milliseconds(journal: Path) -> int | None:
    """When the first line was written, since 1970; None while there is no whole one."""
    first = next(read_events(journal), None)
    return None if first is None else milliseconds(first)


def milliseconds(line: Mapping[str, Any]) -> int:
    """When a line was written, since 1970."""
    return int(float(line["time"]) * 1000)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _stage_name(name: str) -> str:
    """Times of the step and of the loader's threads side by side; what the loader counts is ``data/bytes_read``."""
    return f"stage/{name}" if name.endswith("_seconds") else f"data/{name}"
