"""The loaders: plan -> fetch -> checksum -> decode and augment -> ClipBatch.

::

    EpochPlan        which samples sit in this step, on this rank          plan.py
      ~> draws       which frames, which crop, which spectrogram rows      draws.py
      ~> bytes       read by range, compared with the index                fetch.py     (threads)
      ~> pixels      decode, crop, resize, flip                            backends.py  (DALI's threads)
      ~> ClipBatch   with labels, times and spectrograms                   assembly.py

What a step holds is a function of (record, epoch, step, rank, world size); threads and prefetching only decide when
it is ready. So `batches(epoch, first_step=k)` is exactly the rest of `batches(epoch)`.
"""

import os
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar, get_args

from ca2st.batch import ClipBatch
from ca2st.errors import CA2STError, UserInputError
from ca2st.spec import ClipSpec
from pipelines.assembly import BatchAssembler
from pipelines.backends import BackendName, make_backend
from pipelines.choices import require_one_of
from pipelines.draws import AugmentConfig, Draws, EvaluationDraws, EvaluationViews, TrainDraws
from pipelines.errors import LoaderClosedError
from pipelines.fetch import ByteFetcher
from pipelines.plan import EpochPlan, count_steps, rank_positions, require_enough_samples
from pipelines.prefetch import prefetched
from pipelines.preflight import check_manifest, target_columns
from pipelines.record import PlanRecord, default_num_lanes
from pipelines.sampling import SamplingConfig
from pipelines.shard_files import ShardFiles, Verify, check_sizes
from pipelines.shard_index import ShardIndexCache
from pipelines.stats import StageStats, StatsRecorder
from sharding.manifest import ShardSet

L = TypeVar("L", bound="_Loader")


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
    verify: Verify = "size"
    """``size``: file sizes at the start. ``sha256``: also every shard's hash at its first use. Frames and
    spectrograms are compared with their own checksums in any case."""
    index_cache_bytes: int = 1 << 30
    """Memory for shard indexes; about 1 MB a shard of 300 clips of 10 s."""

    def __post_init__(self) -> None:
        require_one_of("loader.backend", self.backend, get_args(BackendName))
        require_one_of("loader.verify", self.verify, get_args(Verify))
        least = {"num_lanes": 1, "shuffle_block": 1, "fetch_threads": 1, "decode_threads": 1, "prefetch_steps": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserInputError(f"loader.{name}: expected at least {low}, found {value}")


class _Loader:
    """What training and evaluation share: the rank's part of a planned shard set, made into batches."""

    def __init__(
        self,
        shard_set: ShardSet,
        clip: ClipSpec,
        targets: Sequence[str],
        loader: LoaderConfig,
        record: PlanRecord,
        *,
        views_per_clip: int,
        rank: int,
        world_size: int,
    ) -> None:
        batch, remainder = record.global_batch_size, record.remainder
        require_enough_samples(
            num_samples=shard_set.manifest.num_samples,
            global_batch_size=batch,
            world_size=world_size,
            remainder=remainder,
        )
        self._rank, self._world_size = rank, world_size
        self._positions = rank_positions(rank, world_size, global_batch_size=batch, keep_pairs=remainder == "drop")
        self.record = record
        """What the order depends on: kept with every checkpoint, where a resume compares it field by field."""
        self.num_samples = shard_set.manifest.num_samples
        """Samples of the shard set."""
        self._sizes = [shard.num_samples for shard in shard_set.shards]
        self._prefetch_steps, self._closed = loader.prefetch_steps, False
        self._stats = StatsRecorder()
        self._iterators: weakref.WeakSet[Generator[ClipBatch, None, None]] = weakref.WeakSet()
        check_manifest(shard_set, clip)
        check_sizes(shard_set)
        self._files = ShardFiles(shard_set, verify=loader.verify)
        self._indexes = ShardIndexCache(shard_set, most_bytes=loader.index_cache_bytes)
        self._assembler = BatchAssembler(
            clip=clip,
            indexes=self._indexes,
            fetcher=ByteFetcher(self._files, self._stats, num_mel_bins=clip.num_mel_bins),
            backend=make_backend(
                loader.backend,
                num_frames=clip.num_frames,
                crop_size=clip.crop_size,
                views_per_clip=views_per_clip,
                threads=loader.decode_threads or usable_cores(),
                stats=self._stats,
            ),
            targets=target_columns(shard_set, targets),
            views_per_clip=views_per_clip,
            fetch_threads=loader.fetch_threads,
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
        self._assembler.backend.close()
        self._files.close()

    def __enter__(self: L) -> L:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _steps(self, plan: EpochPlan, draws: Draws, first_step: int) -> Iterator[ClipBatch]:
        if self._closed:
            raise LoaderClosedError("the loader is closed; make a new one for more batches")
        source = prefetched(
            lambda: self._assembler.batches(
                range(first_step, plan.num_steps),
                planned=lambda step: plan.samples(step, self._positions),
                draws=draws,
            ),
            self._prefetch_steps,
        )
        iterator = self._counted(source)
        self._iterators.add(iterator)
        return iterator

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
        shard_set: ShardSet,
        clip: ClipSpec,
        targets: Sequence[str],
        sampling: SamplingConfig,
        augment: AugmentConfig,
        loader: LoaderConfig,
        *,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Check the set and make the backend; no thread of ours starts before the first batch is asked for.

        Raises:
            PlanError: too few samples, or a batch that cannot be spread over the ranks.
            UserInputError: a target, codec or mel size that the set does not have.
            ShardSetDamageError: files of the set are missing or of another size.
        """
        record = PlanRecord(
            seed=seed,
            global_batch_size=global_batch_size,
            num_lanes=loader.num_lanes or default_num_lanes(global_batch_size),
            shuffle_block=loader.shuffle_block,
            remainder="drop",
            manifest_fingerprint=shard_set.manifest.fingerprint,
        )
        super().__init__(shard_set, clip, targets, loader, record, views_per_clip=1, rank=rank, world_size=world_size)
        self._clip, self._sampling, self._augment = clip, sampling, augment
        self.steps_per_epoch = count_steps(self.num_samples, global_batch_size, remainder="drop")
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
        plan = EpochPlan(self.record, self._sizes, epoch=epoch)
        draws = TrainDraws(
            clip=self._clip, sampling=self._sampling, augment=self._augment, seed=self.record.seed, epoch=epoch
        )
        return self._steps(plan, draws, first_step)


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
    ) -> None:
        """`global_batch_size` counts samples, not views; `num_lanes` = 1 gives the set's own order.

        Raises as `TrainLoader`.
        """
        record = PlanRecord(
            seed=0,
            global_batch_size=global_batch_size,
            num_lanes=num_lanes or default_num_lanes(global_batch_size),
            shuffle_block=0,
            remainder="pad",
            manifest_fingerprint=shard_set.manifest.fingerprint,
        )
        super().__init__(
            shard_set, clip, targets, loader, record, views_per_clip=views.crops, rank=rank, world_size=world_size
        )
        self._draws = EvaluationDraws(clip=clip, sampling=sampling, view_plan=views)
        self.num_steps = count_steps(self.num_samples, global_batch_size, remainder="pad")
        """Batches; the same on every rank."""

    def sample_ids(self) -> list[str]:
        """Keys of all samples of the set, over all ranks: what must have been scored at the end."""
        return self._indexes.sample_ids()

    def batches(self) -> Iterator[ClipBatch]:
        """This rank's batches; entries that only fill the last ones have `is_padding` set. Raises as training."""
        return self._steps(EpochPlan(self.record, self._sizes, epoch=0), self._draws, 0)


def usable_cores() -> int:
    """Processor cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
