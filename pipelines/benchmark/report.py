"""What the benchmarks of this package say."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    """The number that is reported."""
    lowest: float
    highest: float
    """Far from the median on a busy machine."""
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitReport:
    """One loader, training or validation."""

    clips_per_second: float
    """Median of the rounds; whole passes by their wall time, with what it takes to begin and to end them."""
    baseline_clips_per_second: float | None
    """The same of the baseline; None where it was not measured."""
    ratio: Spread | None
    """Ours over the baseline, round by round."""
    stages: Mapping[str, float]
    """Milliseconds a clip by stage: thread time, which several threads spend at once; ``wait_ms`` is the consumer's."""
    baseline_stages: Mapping[str, float] | None
    """Milliseconds a clip by stage, of a worker."""
    rounds: Spread
    """Clips a second of ours."""
    baseline_rounds: Spread | None
    processor_ms_per_clip: float
    """Processor time of all threads: on a busy machine it says more than the rate."""
    baseline_processor_ms_per_clip: float | None
    """The same of the baseline and its workers."""
    bytes_per_clip: float
    """Read by ours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Headspace:
    """Is it data or compute? Rates of the training loader and of a consumer, apart and together."""

    consumer: str
    """What it is."""
    loader_clips_per_second: float
    """With nobody behind it: the most the data can give."""
    consumer_clips_per_second: float
    """The same batch again and again: the most the consumer can take."""
    together_clips_per_second: float
    """The loader feeding the consumer."""
    data_wait_fraction: float
    """Part of that time in which the consumer waited."""
    limited_by: Literal["data", "compute"]
    """Which of the two is slower alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderBenchmark:
    """Both loaders, and what they were measured on."""

    train: SplitReport
    validation: SplitReport
    headspace: Headspace
    backend: str
    """The backend in use, ``auto`` resolved."""
    threads: int
    """Decoding threads, and workers of the baseline."""
    num_clips: int
    """Clips in the shards."""
    codec: str
    """Of the shards."""
    source_bytes_per_clip: float
    """Of the original files, sound included."""
    shard_bytes_per_clip: float
    load_before: float
    """The machine's load average over the minute before: well below one a core, or others were computing too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionBenchmark:
    """The converter beside the plain loop."""

    clips_per_second: float
    """On all cores: how one converts."""
    one_worker_clips_per_second: float
    """With one decoding process beside the writing one."""
    baseline_clips_per_second: float
    """One process: PyAV, Pillow, torchaudio, webdataset's ShardWriter."""
    ratio: float
    """`clips_per_second` over the baseline's."""
    workers: int
    """Decoding processes of the first figure."""
    num_clips: int
    codec: str
    shard_bytes_per_clip: float
    baseline_bytes_per_clip: float
    load_before: float
    """The machine's load average over the minute before."""


def spread(values: Sequence[float]) -> Spread:
    """Median and range of at least one value."""
    return Spread(median=statistics.median(values), lowest=min(values), highest=max(values), count=len(values))
