"""A training step fed from shards: how long it waits for data.

Clips are drawn and converted as a user's files are. The loader reads, decodes and augments them as in a training, on
the device that trains where that decodes. The shards are small and stay in the system's memory: how fast storage is,
is not part of it.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ca2st.batch import ClipBatch
from ca2st.spec import ClipSpec
from pipelines.augment.config import AugmentConfig
from pipelines.benchmark.clips import RAND_AUGMENT, DrawnClips, draw_clips, source_list
from pipelines.benchmark.loader import Consumer
from pipelines.config import LoaderConfig, TrainSetup
from pipelines.loader import TrainLoader
from pipelines.order.selection import OrderConfig
from sharding.conversion import convert
from sharding.format.shard_set import ShardSet, read_shard_set
from sharding.settings import ConversionConfig

_STEPS_PER_EPOCH = 100_000
"""No epoch ends while it is measured."""
_WARM_UP_STEPS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class FedConfig:
    """How a step is fed."""

    clip: ClipSpec
    """Sizes of a view."""
    batch: int
    """Clips of a step."""
    seconds: float
    """Measured time, and again of the step alone; two steps at least."""
    device: torch.device
    """Where it trains."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class FedReport:
    """What a step that is fed from shards gave."""

    codec: str
    backend: str
    """What decoded."""
    consumer: str
    """The step."""
    clips_per_second: float
    """Of the step, fed."""
    alone_clips_per_second: float
    """Of the step on one batch again and again."""
    data_wait_fraction: float
    """Part of the fed time in which it waited for a batch."""
    num_steps: int
    """Fed steps that were measured."""


def drawn_shards(drawn: DrawnClips, folder: Path, *, codec: str, clip: ClipSpec, gop: int, workers: int) -> ShardSet:
    """Draw clips under `folder`, unless they are there, and convert them to `codec`."""
    files = draw_clips(drawn, folder / "sources")
    config = ConversionConfig(
        codec=codec,
        num_gop_frames=gop,
        num_mel_bins=clip.num_mel_bins,
        workers=min(workers, len(files)),
        audio_policy="optional",
    )
    convert(source_list(files), folder / codec, config)
    return read_shard_set(folder / codec)


def measure_fed(shard_set: ShardSet, consume: Consumer, config: FedConfig, *, consumer: str) -> FedReport:
    """Feed the step that `consume` takes with training batches, published transform included, then run it alone."""
    setup = TrainSetup(
        shard_sets=[shard_set],
        clip=config.clip,
        targets=shard_set.manifest.targets,
        augment=AugmentConfig(rand_augment=RAND_AUGMENT),
        loader=config.loader,
        order=OrderConfig(epoch_samples=_STEPS_PER_EPOCH * config.batch),
        seed=0,
        global_batch_size=config.batch,
        device=config.device,
    )
    with TrainLoader(setup) as loader:
        batches = loader.batches(0)
        for _ in range(_WARM_UP_STEPS):
            consume(batch := next(batches))
        before = loader.stats
        num_steps, seconds = _timed_steps(batches, consume, config.seconds)
        waited = (loader.stats - before).wait_seconds
        backend = loader.backend_name
    alone_steps, alone_seconds = _timed_steps(itertools.repeat(batch), consume, config.seconds)
    return FedReport(
        codec=shard_set.manifest.video.codec,
        backend=backend,
        consumer=consumer,
        clips_per_second=num_steps * config.batch / seconds,
        alone_clips_per_second=alone_steps * config.batch / alone_seconds,
        data_wait_fraction=waited / seconds,
        num_steps=num_steps,
    )


_FEWEST_STEPS = 2


def _timed_steps(batches: Iterator[ClipBatch], consume: Consumer, seconds: float) -> tuple[int, float]:
    """Return how many steps were made in about that time, and the time."""
    begin, steps = time.perf_counter(), 0
    while steps < _FEWEST_STEPS or time.perf_counter() - begin < seconds:
        consume(next(batches))
        steps += 1
    return steps, time.perf_counter() - begin
