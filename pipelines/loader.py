"""The loaders of one rank: batches in the plan's order, made ahead of the consumer, watched, counted and ended.

::

    EpochPlan        which samples sit in this step, on this rank          order/plan.py
      ~> draws       which frames, crop, augmentation, spectrogram rows    views/, augment/
      ~> bytes       read by range, compared with the index                storage/samples.py  (threads)
      ~> pixels      decode, crop, resize, flip, RandAugment, erasing      decode/             (DALI's and own threads)
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

from ca2st.batch import ClipBatch
from ca2st.errors import CA2STError, UserInputError
from ca2st.processes import num_cores
from ca2st.spec import ClipSpec
from pipelines.assembly import BatchAssembler
from pipelines.config import EvaluationSetup, LoaderConfig, TrainSetup
from pipelines.decode.backends import make_backend
from pipelines.errors import LoaderClosedError
from pipelines.order.plan import SamplePlan
from pipelines.quarantine import DamageGuard, Quarantine, quarantine_limit
from pipelines.rendering import ViewBackend
from pipelines.stats import StageStats, StatsRecorder
from pipelines.storage.shard_sets import SetReaders
from pipelines.threads import StallWatch, prefetched
from pipelines.views import EvaluationDraws, EvaluationViews, SamplingConfig, TrainDraws
from sharding.format.shard_set import read_shard_set

L = TypeVar("L", bound="RankLoader")
_log = logging.getLogger(__name__)


class RankLoader:
    """What training and evaluation share: the rank's part of planned shard sets, made into batches."""

    def __init__(
        self, setup: TrainSetup | EvaluationSetup, plan: SamplePlan, quarantine: Quarantine | None = None
    ) -> None:
        """Make the parts; where one of them cannot be made, those made before it are closed."""
        plan.require_enough(world_size=setup.world_size)
        self._rank_of = f"rank {setup.rank} of {setup.world_size}"
        self._positions = plan.positions(setup.rank, setup.world_size)
        self.record = plan.record
        """What the order depends on: kept with every checkpoint, where a resume compares it field by field."""
        self.num_samples = plan.num_samples
        """Different samples that are read."""
        loader, self._stats, self._closed = setup.loader, StatsRecorder(), False
        self._prefetch_steps = loader.prefetch_steps
        self._watch = StallWatch(self._stats, timeout_seconds=loader.stall_timeout_seconds)
        self._iterators: weakref.WeakSet[Generator[ClipBatch, None, None]] = weakref.WeakSet()
        with ExitStack() as opened:
            self._sets = SetReaders(
                setup.shard_sets,
                setup.clip,
                setup.targets,
                stats=self._stats,
                verify=loader.verify,
                index_cache_bytes=loader.index_cache_bytes,
            )
            opened.callback(self._sets.close)
            backend = _backend(setup, self._stats)
            opened.callback(backend.close)
            self._opened = opened.pop_all()
        guard = None
        if quarantine is not None:
            guard = DamageGuard(quarantine=quarantine, sets=self._sets, stats=self._stats, rank=setup.rank)
        self._assembler = BatchAssembler(
            setup=setup, plan=plan, sets=self._sets, backend=backend, stats=self._stats, guard=guard
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
        self._opened.close()

    def __enter__(self: L) -> L:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _started(self, source: Generator[ClipBatch, None, None]) -> Iterator[ClipBatch]:
        """Make the batches of `source` ahead of the consumer, and end it when this loader is closed."""
        if self._closed:
            raise LoaderClosedError("the loader is closed; make a new one for more batches")
        iterator = self._counted(prefetched(source, self._prefetch_steps, watch=self._watch))
        self._iterators.add(iterator)
        return iterator

    def _counted(self, source: Generator[ClipBatch, None, None]) -> Generator[ClipBatch, None, None]:
        with closing(source):
            while True:
                try:
                    with self._stats.timed("wait_seconds"):
                        batch = next(source, None)
                except CA2STError as error:
                    error.add_note(f"raised by the loader of {self._rank_of}")
                    raise
                if batch is None:
                    return
                self._stats.add("steps", 1)
                self._stats.add("views", batch.num_clips)
                yield batch


class TrainLoader(RankLoader):
    """Shuffled, augmented batches of one rank, equal in number on every rank, resumable at any (epoch, step)."""

    def __init__(self, setup: TrainSetup) -> None:
        """Check the sets and make the backend; no thread of its own starts before the first batch is asked for.

        Raises:
            PlanError: too few samples, or a batch that cannot be spread over the ranks.
            UserInputError: a target, codec or mel size that a set does not have, sets that do not agree, or a
                selection that matches nothing.
            ShardSetDamageError: files of a set are missing or of another size, or an index that is read already now.
            QuarantineBudgetError: earlier attempts found more damage than the budget allows.
            EnvironmentFault: the backend asked for is not here, or the cache or quarantine cannot be used.
        """
        plan = setup.plan()
        super().__init__(setup, plan, _quarantine(setup, plan.num_samples))
        with ExitStack() as on_error:
            on_error.callback(self.close)
            lines = [plan.describe(), *self._sets.stride_notes(setup.sampling)]
            on_error.pop_all()
        for line in lines if setup.rank == 0 else []:
            _log.info("%s", line)
        self._setup = setup
        self.steps_per_epoch = plan.num_steps
        """Batches of an epoch; the same on every rank."""

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[ClipBatch]:
        """Return this rank's batches of `epoch` from `first_step`; closing the iterator ends its threads.

        Raises:
            DataDamageError: bytes are not what the manifest vouches for; raised at the batch that holds them.
        """
        if epoch < 0 or not 0 <= first_step <= self.steps_per_epoch:
            raise UserInputError(
                f"expected epoch >= 0 and a first step within 0..{self.steps_per_epoch}, found epoch {epoch}, "
                f"step {first_step}"
            )
        draws = TrainDraws(
            clip=self._setup.clip,
            sampling=self._setup.sampling,
            augment=self._setup.augment,
            seed=self._setup.seed,
            epoch=epoch,
            first_pair=self._positions.start // 2,
        )
        return self._started(self._assembler.batches(epoch, draws, first_step))


class EvaluationLoader(RankLoader):
    """Every sample exactly once over all ranks, each lane in stored order; `views.num_views` consecutive views each."""

    def __init__(self, setup: EvaluationSetup) -> None:
        """Check the set and make the backend; raises as `TrainLoader`."""
        plan = setup.plan()
        super().__init__(setup, plan)
        self._draws = EvaluationDraws(clip=setup.clip, sampling=setup.sampling, view_plan=setup.views)
        self.num_steps = plan.num_steps
        """Batches; the same on every rank."""

    def sample_ids(self) -> list[str]:
        """Return the keys of all samples of the set, over all ranks: what must have been scored at the end."""
        return self._sets.sample_ids()

    def batches(self) -> Iterator[ClipBatch]:
        """Return this rank's batches; entries that only fill the last ones have `is_padding` set.

        Raises:
            DataDamageError: as in training.
        """
        return self._started(self._assembler.batches(0, self._draws))


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
    setup = EvaluationSetup(
        shard_set=shards,
        clip=clip or ClipSpec(num_mel_bins=shards.manifest.audio.num_mel_bins),
        targets=targets or shards.manifest.targets,
        sampling=sampling or SamplingConfig(),
        views=views or EvaluationViews(),
        loader=settings,
        global_batch_size=batch_size,
        num_lanes=1,
    )
    with EvaluationLoader(setup) as batches:
        yield from batches.batches()


def _quarantine(setup: TrainSetup, num_samples: int) -> Quarantine | None:
    loader = setup.loader
    if loader.on_error == "fail":
        return None
    most = quarantine_limit(budget=loader.quarantine_budget, percent=loader.quarantine_percent, num_samples=num_samples)
    return Quarantine(setup.quarantine_folder, most=most)


def _backend(setup: TrainSetup | EvaluationSetup, stats: StatsRecorder) -> ViewBackend:
    short_sides: dict[str, int] = {}  # by codec, the smallest of the sets
    for video in (shard_set.manifest.video for shard_set in setup.shard_sets):
        short_sides[video.codec] = min(video.short_side, short_sides.get(video.codec, video.short_side))
    return make_backend(
        setup.loader.backend,
        codecs=sorted(short_sides),
        num_frames=setup.clip.num_frames,
        crop_size=setup.clip.crop_size,
        views_per_clip=setup.views_per_clip,
        threads=setup.loader.decode_threads or num_cores(),
        stats=stats,
        device=setup.device if setup.loader.decode_on == "auto" else None,
        short_sides=short_sides,
    )
