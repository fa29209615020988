"""One rank's part of a planned epoch, made into batches ahead of the consumer, watched, counted and ended."""

import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from types import TracebackType
from typing import TypeVar

import torch

from ca2st.batch import ClipBatch
from ca2st.cores import num_cores
from ca2st.errors import CA2STError
from ca2st.spec import ClipSpec
from pipelines.assembly import BatchAssembler
from pipelines.backends import make_backend
from pipelines.draws import Draws
from pipelines.errors import LoaderClosedError
from pipelines.loader_config import LoaderConfig
from pipelines.plan import PlannedSamples
from pipelines.prefetch import prefetched
from pipelines.quarantine import Quarantine
from pipelines.rendering import ViewBackend
from pipelines.sample_plan import SamplePlan
from pipelines.shard_sets import SetReaders
from pipelines.shards_ahead import ShardsAhead
from pipelines.stall_watch import StallWatch
from pipelines.stand_ins import DamageGuard, StandIns
from pipelines.stats import StageStats, StatsRecorder
from sharding.shard_set import ShardSet

L = TypeVar("L", bound="RankLoader")


class RankLoader:
    """What training and evaluation share: the rank's part of planned shard sets, made into batches."""

    def __init__(
        self,
        shard_sets: Sequence[ShardSet],
        clip: ClipSpec,
        targets: Sequence[str],
        loader: LoaderConfig,
        plan: SamplePlan,
        *,
        views_per_clip: int,
        rank: int,
        world_size: int,
        device: torch.device | None,
        quarantine: Quarantine | None = None,
    ) -> None:
        """Make the parts; where one of them cannot be made, those made before it are closed."""
        plan.require_enough(world_size=world_size)
        self._plan, self._rank, self._world_size = plan, rank, world_size
        self.record = plan.record
        """What the order depends on: kept with every checkpoint, where a resume compares it field by field."""
        self._positions = plan.positions(rank, world_size)
        self.num_samples = plan.num_samples
        """Different samples that are read."""
        self._prefetch_steps, self._closed, self._stats = loader.prefetch_steps, False, StatsRecorder()
        self._watch = StallWatch(self._stats, timeout_seconds=loader.stall_timeout_seconds)
        self._iterators: weakref.WeakSet[Generator[ClipBatch, None, None]] = weakref.WeakSet()
        with ExitStack() as opened:
            self._assembler = _assembler(
                opened,
                shard_sets,
                clip,
                targets,
                loader,
                views_per_clip=views_per_clip,
                rank=rank,
                device=device,
                quarantine=quarantine,
                stats=self._stats,
            )
            self._opened = opened.pop_all()
        self._sets = self._assembler.sets

    @property
    def backend_name(self) -> str:
        """The backend in use, ``auto`` resolved."""
        return self._assembler.backend.name

    @property
    def stats(self) -> StageStats:
        """Totals so far; subtract two snapshots for a stretch."""
        return self._stats.snapshot()

    def close(self) -> None:
        """End the iterators still open, then close the backend and the files."""
        self._closed = True
        for iterator in list(self._iterators):
            iterator.close()
        if self._watch.has_tripped:
            return  # a thread that hangs may hold their locks: they end with the process
        self._opened.close()

    def __enter__(self: L) -> L:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _steps(self, epoch: int, draws: Draws, first_step: int) -> Iterator[ClipBatch]:
        if self._closed:
            raise LoaderClosedError("the loader is closed; make a new one for more batches")
        source = prefetched(lambda: self._batches(epoch, draws, first_step), self._prefetch_steps, watch=self._watch)
        iterator = self._counted(source)
        self._iterators.add(iterator)
        return iterator

    def _batches(self, epoch: int, draws: Draws, first_step: int) -> Generator[ClipBatch, None, None]:
        # A plan keeps the blocks of the step it was last asked for: who asks for other steps has one of its own.
        plan, later, others = (self._plan.epoch(epoch) for _ in range(3))
        stand_ins = StandIns(others, global_batch_size=self.record.global_batch_size)
        steps = range(first_step, plan.num_steps)

        def shards_of(step: int) -> set[int]:
            return set(later.samples(step, self._positions).shards.tolist())

        lanes = -(-len(self._positions) * self.record.num_lanes // self.record.global_batch_size)
        with ShardsAhead(self._sets, shards_of, steps, most_waiting=lanes) as ahead:

            def planned(step: int) -> PlannedSamples:
                ahead.reached(step)
                return plan.samples(step, self._positions)

            yield from self._assembler.batches(
                steps,
                planned=planned,
                draws=draws,
                stand_ins=lambda step, place: stand_ins.of(step, self._positions[place]),
            )

    def _counted(self, source: Generator[ClipBatch, None, None]) -> Generator[ClipBatch, None, None]:
        with closing(source):
            while True:
                with self._stats.timed("wait_seconds"):
                    batch = self._next(source)
                if batch is None:
                    return
                self._stats.add("steps", 1)
                self._stats.add("views", batch.num_clips)
                yield batch

    def _next(self, source: Iterator[ClipBatch]) -> ClipBatch | None:
        try:
            return next(source, None)
        except CA2STError as error:
            error.add_note(f"raised by the loader of rank {self._rank} of {self._world_size}")
            raise


def _assembler(
    opened: ExitStack,
    shard_sets: Sequence[ShardSet],
    clip: ClipSpec,
    targets: Sequence[str],
    loader: LoaderConfig,
    *,
    views_per_clip: int,
    rank: int,
    device: torch.device | None,
    quarantine: Quarantine | None,
    stats: StatsRecorder,
) -> BatchAssembler:
    """The parts of a loader; `opened` closes each that was made."""
    sets = SetReaders(
        shard_sets, clip, targets, verify=loader.verify, index_cache_bytes=loader.index_cache_bytes, stats=stats
    )
    opened.callback(sets.close)
    backend = _backend(shard_sets, clip, loader, views_per_clip=views_per_clip, device=device, stats=stats)
    opened.callback(backend.close)
    guard = None if quarantine is None else DamageGuard(quarantine=quarantine, sets=sets, stats=stats, rank=rank)
    return BatchAssembler(
        clip=clip,
        sets=sets,
        backend=backend,
        views_per_clip=views_per_clip,
        fetch_threads=loader.fetch_threads,
        stats=stats,
        guard=guard,
    )


def _backend(
    shard_sets: Sequence[ShardSet],
    clip: ClipSpec,
    loader: LoaderConfig,
    *,
    views_per_clip: int,
    device: torch.device | None,
    stats: StatsRecorder,
) -> ViewBackend:
    return make_backend(
        loader.backend,
        codecs=sorted({shard_set.manifest.video.codec for shard_set in shard_sets}),
        num_frames=clip.num_frames,
        crop_size=clip.crop_size,
        views_per_clip=views_per_clip,
        threads=loader.decode_threads or num_cores(),
        stats=stats,
        device=device if loader.decode_on == "auto" else None,
        short_sides=_short_sides(shard_sets),
    )


def _short_sides(shard_sets: Sequence[ShardSet]) -> dict[str, int]:
    """Pixels of the shorter side of most pictures, by codec: the smallest of the sets."""
    sides: dict[str, int] = {}
    for video in (shard_set.manifest.video for shard_set in shard_sets):
        sides[video.codec] = min(video.short_side, sides.get(video.codec, video.short_side))
    return sides
