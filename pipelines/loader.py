"""The loaders: plan -> fetch -> checksum -> decode and augment -> ClipBatch.

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
import os
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar, get_args

import torch

from ca2st.batch import ClipBatch
from ca2st.errors import CA2STError, UserInputError
from ca2st.spec import ClipSpec
from pipelines.assembly import BatchAssembler
from pipelines.augment.config import AugmentConfig
from pipelines.backends import BackendName, make_backend
from pipelines.choices import require_one_of
from pipelines.draws import Draws, EvaluationDraws, EvaluationViews, TrainDraws
from pipelines.errors import LoaderClosedError
from pipelines.plan import PlannedSamples
from pipelines.prefetch import prefetched
from pipelines.quarantine import OnError, Quarantine, quarantine_limit
from pipelines.sample_plan import OrderConfig, SamplePlan, evaluation_plan, training_plan
from pipelines.sampling import SamplingConfig
from pipelines.shard_files import Verify
from pipelines.shard_sets import SetReaders
from pipelines.shards_ahead import ShardsAhead
from pipelines.stall_watch import StallWatch
from pipelines.stand_ins import DamageGuard, StandIns
from pipelines.stats import StageStats, StatsRecorder
from pipelines.steps import rank_positions
from sharding.manifest import ShardSet
from sharding.retry import RetryConfig
from sharding.storage import StorageConfig

L = TypeVar("L", bound="_Loader")
DecodeOn = Literal["auto", "cpu"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderConfig:
    """How batches are made; nothing here but `num_lanes` and `shuffle_block` changes what is in them."""

    num_lanes: int | None = None
    """Parallel runs through the shards in training; None: the largest divisor of the global batch up to 64. Part of
    the order."""
    shuffle_block: int = 4096
    """Samples shuffled together inside a lane: about a dozen shards of 1 GB. Part of the order of training."""
    fetch_threads: int = 4
    """Threads that read bytes; more hide slower storage."""
    decode_threads: int | None = None
    """Threads of the decoding backend; None: the processor cores this process may use."""
    prefetch_steps: int = 2
    """Finished batches kept ready; 0 makes each one when it is asked for, without a thread."""
    backend: BackendName = "auto"
    """``dali``, ``reference`` (slow, the oracle), or ``auto``: dali where it is installed."""
    decode_on: DecodeOn = "auto"
    """``auto``: dali runs on the rank's GPU where that decodes the codec of the shards, and on the CPU elsewhere;
    ``cpu``: always on the CPU, which leaves the GPU's memory and video engines alone."""
    verify: Verify = "size"
    """``size``: file sizes at the start. ``sha256``: also every shard's hash at its first use. Frames and
    spectrograms are compared with their own checksums in any case."""
    index_cache_bytes: int = 1 << 30
    """Memory for shard indexes; about 1 MB a shard of 300 clips of 10 s."""
    stall_timeout_seconds: float = 300.0
    """A step that waits this long while nothing at all moves in the loader ends the run and names where it hangs: more
    than any read or retry takes, less than the ten minutes after which other ranks give up. Needs `prefetch_steps`."""

    cache_dir: str | None = None
    """Shards of a URL: folder that keeps them on this machine, shared by its workers; None: ``~/.cache/ca2st/shards``.
    Better a fast local disk."""
    cache_bytes: int | None = None
    """Most bytes in it, shards being fetched included; the least recently used go first. Enough is a shuffle block of
    every lane this machine reads; less works, and fetches shards several times. None: half of what its disk has."""
    retry: RetryConfig = field(default_factory=RetryConfig)
    """How long a server that fails is tried."""
    on_error: OnError = "fail"
    """A sample whose bytes are damaged: ``fail`` ends the run with its name; ``quarantine`` leaves it out from then on
    and fills its place with another sample of its lane. Training only: evaluation always fails."""
    quarantine_budget: int = 100
    """Samples that may be in quarantine, over all ranks and attempts of the run, before it fails after all."""
    quarantine_percent: float = 0.1
    """The same in percent of the samples read; the smaller of the two counts."""

    @property
    def storage(self) -> StorageConfig:
        """How shards of a URL are kept on this machine."""
        return StorageConfig(cache_dir=self.cache_dir, cache_bytes=self.cache_bytes, retry=self.retry)

    def __post_init__(self) -> None:
        require_one_of("loader.backend", self.backend, get_args(BackendName))
        require_one_of("loader.decode_on", self.decode_on, get_args(DecodeOn))
        require_one_of("loader.on_error", self.on_error, get_args(OnError))
        require_one_of("loader.verify", self.verify, get_args(Verify))
        least = {"num_lanes": 1, "shuffle_block": 1, "fetch_threads": 1, "decode_threads": 1, "prefetch_steps": 0}
        least |= {"cache_bytes": 1, "quarantine_budget": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserInputError(f"loader.{name}: expected at least {low}, found {value}")
        if not self.stall_timeout_seconds > 0:
            raise UserInputError(f"loader.stall_timeout_seconds: expected > 0, found {self.stall_timeout_seconds}")
        if not 0 <= self.quarantine_percent <= 100:
            raise UserInputError(f"loader.quarantine_percent: expected 0 to 100, found {self.quarantine_percent}")


class _Loader:
    """What training and evaluation share: the rank's part of a planned shard set, made into batches."""

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
        plan.require_enough(world_size=world_size)
        self._plan, self._rank, self._world_size = plan, rank, world_size
        self.record = plan.record
        """What the order depends on: kept with every checkpoint, where a resume compares it field by field."""
        self._positions = rank_positions(
            rank,
            world_size,
            global_batch_size=self.record.global_batch_size,
            keep_pairs=self.record.remainder != "pad",
        )
        self.num_samples = plan.num_samples
        """Different samples that are read."""
        self._prefetch_steps, self._closed = loader.prefetch_steps, False
        self._stats = StatsRecorder()
        self._watch = StallWatch(self._stats, timeout_seconds=loader.stall_timeout_seconds)
        self._iterators: weakref.WeakSet[Generator[ClipBatch, None, None]] = weakref.WeakSet()
        self._sets = SetReaders(
            shard_sets,
            clip,
            targets,
            verify=loader.verify,
            index_cache_bytes=loader.index_cache_bytes,
            stats=self._stats,
        )
        self._assembler = BatchAssembler(
            clip=clip,
            sets=self._sets,
            backend=make_backend(
                loader.backend,
                codecs=sorted({shard_set.manifest.video.codec for shard_set in shard_sets}),
                num_frames=clip.num_frames,
                crop_size=clip.crop_size,
                views_per_clip=views_per_clip,
                threads=loader.decode_threads or usable_cores(),
                stats=self._stats,
                device=device if loader.decode_on == "auto" else None,
                short_sides=_short_sides(shard_sets),
            ),
            views_per_clip=views_per_clip,
            fetch_threads=loader.fetch_threads,
            stats=self._stats,
            guard=None
            if quarantine is None
            else DamageGuard(quarantine=quarantine, sets=self._sets, stats=self._stats, rank=rank),
        )

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
        self._assembler.backend.close()
        self._sets.close()

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
        plan, later = self._plan.epoch(epoch), self._plan.epoch(epoch)
        stand_ins = StandIns(self._plan.epoch(epoch), global_batch_size=self.record.global_batch_size)
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


class TrainLoader(_Loader):
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
            ShardSetDamageError: files of a set are missing or of another size.
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
        lines = [plan.describe(), *self._sets.stride_notes(sets, sampling)]
        if rank == 0:
            for line in lines:
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


class EvaluationLoader(_Loader):
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
        """`global_batch_size` counts samples, not views; `num_lanes` = 1 gives the set's own order; `device` as there.

        Raises as `TrainLoader`.
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


def _quarantine(loader: LoaderConfig, folder: Path | None, num_samples: int) -> Quarantine | None:
    if loader.on_error == "fail":
        return None
    most = quarantine_limit(budget=loader.quarantine_budget, percent=loader.quarantine_percent, num_samples=num_samples)
    return Quarantine(folder, most=most)


def _short_sides(shard_sets: Sequence[ShardSet]) -> dict[str, int]:
    """Pixels of the shorter side of most pictures, by codec: the smallest of the sets."""
    sides: dict[str, int] = {}
    for video in (shard_set.manifest.video for shard_set in shard_sets):
        sides[video.codec] = min(video.short_side, sides.get(video.codec, video.short_side))
    return sides


def usable_cores() -> int:
    """Processor cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
