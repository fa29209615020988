"""Says where clips run at another rate than the 30 frames a second that `sampling.frame_stride` counts in."""

from collections.abc import Iterable, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import SampleDamageError
from pipelines.sampling import SamplingConfig, frames_per_second, scaled_stride
from pipelines.shard_index import ShardIndexCache
from sharding.index import TICKS_PER_SECOND
from sharding.shard_set import ShardSet

_MOST_CLIPS = 32


def stride_note(shard_set: ShardSet, indexes: ShardIndexCache, sampling: SamplingConfig) -> str | None:
    """One line on what a dense window reads of this set, judged by clips of its first shard.

    None where it reads every `frame_stride`-th frame as configured, or where there are no dense windows.

    Raises:
        ShardSetDamageError: the first index is damaged.
    """
    if sampling.scheme != "dense":
        return None
    first = next((place for place, shard in enumerate(shard_set.shards) if shard.num_samples), None)
    if first is None:
        return None
    count = shard_set.shards[first].num_samples
    rows = np.unique(np.linspace(0, count - 1, min(count, _MOST_CLIPS)).astype(int)).tolist()
    return _told(shard_set.where, _rates(indexes, first, rows), sampling)


def _rates(indexes: ShardIndexCache, shard: int, rows: Sequence[int]) -> list[float]:
    """Rates of some clips of a shard; one that contradicts itself is left out, for its reading names it."""
    rates = []
    for row in rows:
        with suppress(SampleDamageError):
            rates.append(_rate(indexes.entry(shard, row).frame_ticks))
    return rates


def _rate(ticks: NDArray[np.int32]) -> float:
    return frames_per_second(ticks, ticks_per_second=TICKS_PER_SECOND)


def _told(where: str, rates: Sequence[float], sampling: SamplingConfig) -> str | None:
    strides = {rate: scaled_stride(sampling.frame_stride, rate) for rate in rates}
    scaled = {rate: stride for rate, stride in strides.items() if stride != sampling.frame_stride}
    if not scaled:
        return None
    part = sum(rate in scaled for rate in rates)
    return (
        f"{where}: {part} of the first {len(rates)} clips run at {_range(scaled.keys())} frames a second; their dense "
        f"windows take strides of {_range(scaled.values())} frames in place of {sampling.frame_stride}, the same in "
        "time (sampling.frame_stride counts frames at 30 a second)"
    )


def _range(values: Iterable[float | int]) -> str:
    numbers = sorted({f"{value:.4g}" for value in values}, key=float)
    return numbers[0] if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
