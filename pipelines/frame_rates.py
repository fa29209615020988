"""Says where clips run at another rate than the 30 frames a second that `sampling.frame_stride` counts in."""

from collections.abc import Iterable, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import SampleDamageError
from pipelines.sampling import SamplingConfig, VaryingRate, frames_per_second, scaled_stride
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
    ticks = _ticks(indexes, first, rows)
    varying = [one for one in ticks if VaryingRate.of(one, ticks_per_second=TICKS_PER_SECOND)]
    rates = [_rate(one) for one in ticks if VaryingRate.of(one, ticks_per_second=TICKS_PER_SECOND) is None]
    parts = [_strides_in_words(rates, len(ticks), sampling)]
    if varying:
        parts.append(
            f"{len(varying)} of the first {len(ticks)} clips vary in their frame rate; their dense windows take a "
            f"frame every {sampling.frame_stride}/30 s"
        )
    told = "; ".join(part for part in parts if part)
    return f"{shard_set.where}: {told}" if told else None


def _ticks(indexes: ShardIndexCache, shard: int, rows: Sequence[int]) -> list[NDArray[np.int32]]:
    """Frame times of some clips of a shard; one that contradicts itself is left out, for its reading names it."""
    ticks = []
    for row in rows:
        with suppress(SampleDamageError):
            ticks.append(indexes.entry(shard, row).frame_ticks)
    return ticks


def _rate(ticks: NDArray[np.int32]) -> float:
    return frames_per_second(ticks, ticks_per_second=TICKS_PER_SECOND)


def _strides_in_words(rates: Sequence[float], num_clips: int, sampling: SamplingConfig) -> str:
    strides = {rate: scaled_stride(sampling.frame_stride, rate) for rate in rates}
    scaled = {rate: stride for rate, stride in strides.items() if stride != sampling.frame_stride}
    if not scaled:
        return ""
    part = sum(rate in scaled for rate in rates)
    return (
        f"{part} of the first {num_clips} clips run at {_range(scaled.keys())} frames a second; their dense "
        f"windows take strides of {_range(scaled.values())} frames in place of {sampling.frame_stride}, the same in "
        "time (sampling.frame_stride counts frames at 30 a second)"
    )


def _range(values: Iterable[float | int]) -> str:
    numbers = sorted({f"{value:.4g}" for value in values}, key=float)
    return numbers[0] if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
