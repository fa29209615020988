"""The loader: batches of one rank, in the plan's order.

One rank's part of a planned epoch, made into batches ahead of the consumer, watched, counted and ended.

The loaders: plan -> fetch -> checksum -> decode and augment -> ClipBatch.

::

    EpochPlan        which samples sit in this step, on this rank          plan.py
      ~> draws       which frames, crop, augmentation, spectrogram rows    draws.py, augment/
      ~> bytes       read by range, compared with the index                fetch.py     (threads)
      ~> pixels      decode, crop, resize, flip, RandAugment, erasing      backends.py  (DALI's and own threads)
      ~> ClipBatch   with labels, times, spectrograms, how pairs are mixed assembly.py

What a step holds is a function of (record, epoch, step, rank, world size); threads and prefetching only decide when
it is ready. So `batches(epoch, first_step=k)` is exactly the rest of `batches(epoch)`.
"""

import logging
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch

from ca2st.batch import ClipBatch
from ca2st.errors import CA2STError, UserInputError
from ca2st.processes import num_cores
from ca2st.spec import ClipSpec
from pipelines.assembly import BatchAssembler, StallWatch, prefetched
from pipelines.augment.config import AugmentConfig
from pipelines.config import LoaderConfig
from pipelines.decode.backends import make_backend
from pipelines.errors import LoaderClosedError
from pipelines.order.plan import PlannedSamples
from pipelines.order.sample_plan import SamplePlan, evaluation_plan, training_plan
from pipelines.order.selection import OrderConfig
from pipelines.quarantine import DamageGuard, Quarantine, StandIns, quarantine_limit
from pipelines.rendering import ViewBackend
from pipelines.stats import StageStats, StatsRecorder
from pipelines.storage.ahead import ShardsAhead
from pipelines.storage.shard_sets import SetReaders
from pipelines.views.draws import Draws, EvaluationDraws, EvaluationViews, TrainDraws
from pipelines.views.sampling import SamplingConfig
from sharding.format.shard_set import ShardSet, read_shard_set

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


_log = logging.getLogger(__name__)


class TrainLoader(RankLoader):
    """Shuffled, augmented batches of one rank, equal in number on every rank, resumable at any (epoch, step)."""

    def __init__(
        self,
        shard_sets: ShardSet | Sequence[ShardSet],
        clip: ClipSpec,
        targets: Sequence[str],
        sampling: SamplingConfig,
        augment: AugmentConfig,
        loader: LoaderConfig,
        *,
        seed: int,
        global_batch_size: int,
        order: OrderConfig | None = None,
        quarantine_folder: Path | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
    ) -> None:
        """Check the sets and make the backend; no thread of ours starts before the first batch is asked for.

        `order`: weights of several sets, selected samples, class balance, repeats; None: every sample once an epoch.
        `quarantine_folder`: where all ranks and attempts of the run keep what `loader.on_error` leaves out; None: in
        memory alone. `device`: where the batches are wanted; a GPU may decode for itself (`loader.decode_on`).

        Raises:
            PlanError: too few samples, or a batch that cannot be spread over the ranks.
            UserInputError: a target, codec or mel size that a set does not have, sets that do not agree, or a
                selection that matches nothing.
            ShardSetDamageError: files of a set are missing or of another size, or an index that is read already now.
            QuarantineBudgetError: earlier attempts found more damage than the budget allows.
            EnvironmentFault: the backend asked for is not here, or the cache or quarantine cannot be used.
        """
        augment.mixing.check_even("training.global_batch_size", global_batch_size)
        sets = [shard_sets] if isinstance(shard_sets, ShardSet) else [*shard_sets]
        plan = training_plan(
            sets,
            targets,
            order or OrderConfig(),
            seed=seed,
            global_batch_size=global_batch_size,
            num_lanes=loader.num_lanes,
            shuffle_block=loader.shuffle_block,
        )
        super().__init__(
            sets,
            clip,
            targets,
            loader,
            plan,
            views_per_clip=1,
            rank=rank,
            world_size=world_size,
            device=device,
            quarantine=_quarantine(loader, quarantine_folder, plan.num_samples),
        )
        with ExitStack() as on_error:
            on_error.callback(self.close)
            lines = [plan.describe(), *self._sets.stride_notes(sets, sampling)]
            on_error.pop_all()
        for line in lines if rank == 0 else []:
            _log.info("%s", line)
        self._clip, self._sampling, self._augment = clip, sampling, augment
        self.steps_per_epoch = plan.num_steps
        """Batches of an epoch; the same on every rank."""

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[ClipBatch]:
        """This rank's batches of `epoch` from `first_step`; closing the iterator ends its threads.

        Raises:
            DataDamageError: bytes are not what the manifest vouches for; raised at the batch that holds them.
        """
        if epoch < 0 or not 0 <= first_step <= self.steps_per_epoch:
            raise UserInputError(
                f"expected epoch >= 0 and a first step within 0..{self.steps_per_epoch}, found epoch {epoch}, "
                f"step {first_step}"
            )
        draws = TrainDraws(
            clip=self._clip,
            sampling=self._sampling,
            augment=self._augment,
            seed=self.record.seed,
            epoch=epoch,
            first_pair=self._positions.start // 2,
        )
        return self._steps(epoch, draws, first_step)


class EvaluationLoader(RankLoader):
    """Every sample exactly once over all ranks, each lane in stored order; `views.num_views` consecutive views each."""

    def __init__(
        self,
        shard_set: ShardSet,
        clip: ClipSpec,
        targets: Sequence[str],
        sampling: SamplingConfig,
        views: EvaluationViews,
        loader: LoaderConfig,
        *,
        global_batch_size: int,
        num_lanes: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
    ) -> None:
        """`global_batch_size` counts samples, not views; `num_lanes` = 1 gives the set's own order.

        `device` as for `TrainLoader`, and raises as that does.
        """
        plan = evaluation_plan(shard_set, global_batch_size=global_batch_size, num_lanes=num_lanes)
        super().__init__(
            [shard_set],
            clip,
            targets,
            loader,
            plan,
            views_per_clip=views.crops,
            rank=rank,
            world_size=world_size,
            device=device,
        )
        self._draws = EvaluationDraws(clip=clip, sampling=sampling, view_plan=views)
        self.num_steps = plan.num_steps
        """Batches; the same on every rank."""

    def sample_ids(self) -> list[str]:
        """Keys of all samples of the set, over all ranks: what must have been scored at the end."""
        return self._sets.sample_ids()

    def batches(self) -> Iterator[ClipBatch]:
        """This rank's batches; entries that only fill the last ones have `is_padding` set. Raises as training."""
        return self._steps(0, self._draws, 0)


def read_batches(
    place: str | Path,
    *,
    batch_size: int = 8,
    clip: ClipSpec | None = None,
    sampling: SamplingConfig | None = None,
    targets: Sequence[str] | None = None,
    views: EvaluationViews | None = None,
    loader: LoaderConfig | None = None,
) -> Iterator[ClipBatch]:
    """Yield every sample of a shard set once, in stored order, as labelled batches.

    Args:
        place: Folder or URL of the set.
        batch_size: Samples per batch; entries that only fill the last one have `is_padding` set.
        clip: Sizes of a view; None: 16 frames at 224 pixels and 400 rows of sound.
        sampling: Which frames a view takes.
        targets: Label spaces in the order of `ClipBatch.labels`; None: the set's own.
        views: Views per sample; None: one, the centre.
        loader: How batches are made.

    Raises:
        ManifestError: no shard set is there.
        DataDamageError: bytes are not those that were written; the message names shard and sample.
    """
    settings = loader or LoaderConfig()
    shards = read_shard_set(place, storage=settings.storage)
    with EvaluationLoader(
        shards,
        clip or ClipSpec(num_mel_bins=shards.manifest.audio.num_mel_bins),
        targets or shards.manifest.targets,
        sampling or SamplingConfig(),
        views or EvaluationViews(),
        settings,
        global_batch_size=batch_size,
        num_lanes=1,
    ) as batches:
        yield from batches.batches()


def _quarantine(loader: LoaderConfig, folder: Path | None, num_samples: int) -> Quarantine | None:
    if loader.on_error == "fail":
        return None
    most = quarantine_limit(budget=loader.quarantine_budget, percent=loader.quarantine_percent, num_samples=num_samples)
    return Quarantine(folder, most=most)
