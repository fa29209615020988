"""The loaders of one rank: batches in the plan's order, made ahead of the consumer, watched, counted and ended.

::

    EpochPlan        which samples sit in this step, on this rank          order/plan.py
      ~> draws       which frames, crop, augmentation, spectrogram rows    views.py, augment/
      ~> bytes       read by range, compared with the index                storage/samples.py  (threads)
      ~> pixels      decode, crop, resize, flip, RandAugment, erasing      decode/             (DALI's and own threads)
      ~> ClipBatch   with labels, times, spectrograms, how pairs are mixed this file

What a step holds is a function of (record, epoch, step, rank, world size); threads and prefetching only decide when
it is ready. So `batches(epoch, first_step=k)` is exactly the rest of `batches(epoch)`.
"""

import logging
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ca2st.batch import ClipBatch
from ca2st.errors import CA2STError, UserInputError
from ca2st.processes import num_cores
from ca2st.spec import MEL_ROW_SECONDS, ClipSpec
from pipelines.augment.spectrogram import mel_view
from pipelines.config import EvaluationSetup, LoaderConfig, TrainSetup
from pipelines.decode.backends import make_backend
from pipelines.errors import LoaderClosedError, SampleDamageError
from pipelines.order.plan import PlannedSample, SamplePlan
from pipelines.quarantine import DamageGuard, Quarantine, quarantine_limit, replacements
from pipelines.rendering import RenderRequest, ViewBackend
from pipelines.storage.index import SampleEntry
from pipelines.storage.samples import FetchedSample
from pipelines.storage.shard_sets import SetReaders, ShardsAhead
from pipelines.threads import LoaderThreads, StageStats, StallWatch, StatsRecorder, prefetched
from pipelines.views import ClipFacts, Draws, EvaluationDraws, EvaluationViews, SamplingConfig, TrainDraws, ViewDraw
from sharding.format.index import TICKS_PER_SECOND
from sharding.format.shard_set import read_shard_set

T = TypeVar("T")
_log = logging.getLogger(__name__)


_FETCH_AHEAD_STEPS = 2
"""Steps whose bytes are read while earlier ones are rendered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    planned: PlannedSample
    """What was read: for a place in quarantine, its replacement."""
    sample: FetchedSample
    labels: list[int]
    views: tuple[ViewDraw, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """This rank's places of one step, and what is needed to fill them."""

    epoch: int
    number: int
    planned: list[PlannedSample]
    draws: Draws


class RankLoader:
    """What training and evaluation share: the rank's part of planned shard sets, made into batches."""

    def __init__(self, setup: TrainSetup | EvaluationSetup, plan: SamplePlan) -> None:
        """Make the parts; where one of them cannot be made, those made before it are closed."""
        plan.require_enough(world_size=setup.world_size)
        self._setup, self._plan, self._stats = setup, plan, StatsRecorder()
        self._positions = plan.positions(setup.rank, setup.world_size)
        self.record = plan.record
        """What the order depends on: kept with every checkpoint, where a resume compares it field by field."""
        self.num_samples = plan.num_samples
        """Different samples that are read."""
        self._watch = StallWatch(self._stats, timeout_seconds=setup.loader.stall_timeout_seconds)
        self._iterators: weakref.WeakSet[Generator[ClipBatch, None, None]] = weakref.WeakSet()
        self._closed = False
        self._guard: DamageGuard | None = None
        """Keeps damaged samples out; None: the first one ends the run."""
        with ExitStack() as opened:
            self._sets = SetReaders(
                setup.shard_sets,
                setup.clip,
                setup.targets,
                stats=self._stats,
                verify=setup.loader.verify,
                index_cache_bytes=setup.loader.index_cache_bytes,
            )
            opened.callback(self._sets.close)
            self._backend = _backend(setup, self._stats)
            opened.callback(self._backend.close)
            self._opened = opened.pop_all()

    @property
    def backend_name(self) -> str:
        """The backend in use, ``auto`` resolved."""
        return self._backend.name

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.close()

    def _started(self, epoch: int, draws: Draws, first_step: int = 0) -> Iterator[ClipBatch]:
        """Make batches ahead of the consumer, until this loader is closed."""
        if self._closed:
            raise LoaderClosedError("the loader is closed; make a new one for more batches")
        source = self._assembled(epoch, draws, first_step)
        iterator = self._counted(prefetched(source, self._setup.loader.prefetch_steps, watch=self._watch))
        self._iterators.add(iterator)
        return iterator

    def _counted(self, source: Generator[ClipBatch, None, None]) -> Generator[ClipBatch, None, None]:
        with closing(source):
            while True:
                try:
                    with self._stats.timed("wait_seconds"):
                        batch = next(source, None)
                except CA2STError as error:
                    error.add_note(f"raised by the loader of rank {self._setup.rank} of {self._setup.world_size}")
                    raise
                if batch is None:
                    return
                self._stats.add("steps", 1)
                self._stats.add("views", batch.num_clips)
                yield batch

    def _assembled(self, epoch: int, draws: Draws, first_step: int) -> Generator[ClipBatch, None, None]:
        """Yield a batch per step, others being read and rendered meanwhile; closing it ends its threads."""
        # A plan caches the blocks of the step it was last asked for: each reader of other steps gets its own.
        plan, later = self._plan.epoch(epoch), self._plan.epoch(epoch)
        positions, loader = self._positions, self._setup.loader
        lanes = -(-len(positions) * self.record.num_lanes // self.record.global_batch_size)
        numbers = range(first_step, plan.num_steps)

        def shards_of(step: int) -> set[int]:
            return {planned.shard for planned in later.samples(step, positions)}

        with (
            closing(ShardsAhead(self._sets, shards_of, numbers, most_waiting=lanes)) as shards_ahead,
            closing(LoaderThreads("clip-render", loader.rendered_at_once)) as renderers,
            closing(LoaderThreads("clip-fetch", loader.fetch_threads)) as readers,
        ):

            def read(number: int) -> tuple[_Step, list[Future[_Prepared]]]:
                shards_ahead.reached(number)
                step = _Step(epoch=epoch, number=number, planned=plan.samples(number, positions), draws=draws)
                if self._guard is None:
                    return step, [readers.submit(self._prepare, one, draws) for one in step.planned]
                return step, [readers.submit(self._prepare_undamaged, step, place) for place in range(len(positions))]

            being_read = _begun_ahead(map(read, numbers), _FETCH_AHEAD_STEPS)
            rendered = (renderers.submit(self._batch, step, futures) for step, futures in being_read)
            yield from map(Future.result, _begun_ahead(rendered, loader.rendered_at_once - 1))

    def _prepare(self, planned: PlannedSample, draws: Draws) -> _Prepared:
        """Draw the views of a planned sample and read its bytes."""
        reader, own_shard = self._sets.find(planned.shard)
        with self._stats.timed("index_seconds"):
            entry = reader.indexes.entry(own_shard, planned.row)
            facts = ClipFacts(key=entry.key, frame_ticks=entry.frame_ticks, mel_rows=entry.mel_rows)
            views = draws.views(facts, repeat=planned.repeat)
        sample = reader.fetch(entry, [index for view in views for index in view.frame_indices])
        return _Prepared(planned=planned, sample=sample, labels=self._sets.labels(planned.shard, entry), views=views)

    def _prepare_undamaged(self, step: _Step, place: int) -> _Prepared:
        """`_prepare` the sample of a place or, where the guard keeps that out, a replacement."""
        assert self._guard is not None
        others = replacements(self._plan, step.epoch, step.number, self._positions[place])
        return self._guard.read(
            step.planned[place], others, lambda one: self._prepare(one, step.draws), step=step.number
        )

    def _batch(self, step: _Step, futures: list[Future[_Prepared]]) -> ClipBatch:
        prepared, video = self._rendered(step, [future.result() for future in futures])
        flat = [(one, view) for one in prepared for view in one.views]
        has_audio = [one.sample.entry.has_audio for one, _ in flat]
        clip = self._setup.clip
        mels = [
            mel_view(
                one.sample.mel,
                start_row=view.mel_start_row,
                num_rows=clip.mel_rows,
                has_audio=one.sample.entry.has_audio,
                draw=view.spectrogram,
            )
            for one, view in flat
        ]
        return ClipBatch(
            video=video,
            mel=torch.from_numpy(np.stack(mels)),
            intervals_seconds=torch.stack([intervals_seconds(one.sample.entry, view, clip) for one, view in flat]),
            labels=torch.tensor([one.labels for one, _ in flat], dtype=torch.int64),
            labelling=self._sets.labelling,
            sample_ids=tuple(one.sample.entry.key for one, _ in flat),
            has_audio=torch.tensor(has_audio),
            is_padding=torch.tensor([one.planned.is_padding for one, _ in flat]),
            mixing=step.draws.mixing(step.number, has_audio),
        )

    def _rendered(
        self, step: _Step, prepared: list[_Prepared]
    ) -> tuple[list[_Prepared], UInt8[Tensor, "views 3 time height width"]]:
        """Render a step's samples, those in place of samples that cannot be decoded among them."""
        while True:
            try:
                return prepared, self._render(prepared)
            except SampleDamageError:
                if self._guard is None:
                    raise
                replaced = [self._decodable(step, place, one) for place, one in enumerate(prepared)]
                if all(one is other for one, other in zip(prepared, replaced, strict=True)):
                    raise
                prepared = replaced

    def _decodable(self, step: _Step, place: int, prepared: _Prepared) -> _Prepared:
        """Return the sample at `place`, or a replacement if its own pictures cannot be decoded."""
        assert self._guard is not None
        try:
            self._render([prepared])
        except SampleDamageError as error:
            self._guard.reject(prepared.planned, error, step=step.number)
            return self._prepare_undamaged(step, place)
        return prepared

    def _render(self, prepared: Sequence[_Prepared]) -> UInt8[Tensor, "views 3 time height width"]:
        """Render a request per clip: its frames are decoded once for all of its crops."""
        requests = []
        for one in prepared:
            sample, views_per_clip = one.sample, self._setup.views_per_clip
            for first in range(0, len(one.views), views_per_clip):
                views = one.views[first : first + views_per_clip]
                requests.append(
                    RenderRequest(
                        frames=sample.clip_frames(views[0].frame_indices),
                        boxes=tuple(view.crop.box(height=sample.height, width=sample.width) for view in views),
                        flip=views[0].flip,
                        augment=views[0].augment,
                        erased=views[0].erased,
                        where=sample.entry.where,
                    )
                )
        return self._backend.render(requests)


class TrainLoader(RankLoader):
    """Shuffled, augmented batches of one rank, equal in number on every rank, resumable at any (epoch, step)."""

    _setup: TrainSetup

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
        plan, loader = setup.plan(), setup.loader
        super().__init__(setup, plan)
        with ExitStack() as on_error:
            on_error.callback(self.close)
            if loader.on_error == "quarantine":
                budget, percent = loader.quarantine_budget, loader.quarantine_percent
                most = quarantine_limit(budget=budget, percent=percent, num_samples=plan.num_samples)
                quarantine = Quarantine(setup.quarantine_folder, most=most)
                self._guard = DamageGuard(quarantine, sets=self._sets, stats=self._stats, rank=setup.rank)
            lines = [plan.describe(), *self._sets.stride_notes(setup.sampling)]
            on_error.pop_all()
        for line in lines if setup.rank == 0 else []:
            _log.info("%s", line)
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
        return self._started(epoch, draws, first_step)


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
        """Return this rank's batches; entries that only fill the last ones have `is_padding` set."""
        return self._started(0, self._draws)


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


def _backend(setup: TrainSetup | EvaluationSetup, stats: StatsRecorder) -> ViewBackend:
    short_sides: dict[str, int] = {}  # by codec, the smallest of the sets
    videos = [shard_set.manifest.video for shard_set in setup.shard_sets]
    for video in videos:
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
        uneven={video.codec for video in videos if video.side_multiple is None},
    )


def _begun_ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """Yield the items in order, each after `count` more were asked for: what these stand for has begun by then."""
    waiting = deque[T]()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def intervals_seconds(entry: SampleEntry, view: ViewDraw, clip: ClipSpec) -> Float[Tensor, "intervals 2"]:
    """Return row 0: the spectrogram crop, padding included. Then the stored times of frames 2k and 2k+1."""
    first_row = view.mel_start_row - view.spectrogram.roll
    ticks = entry.frame_ticks[list(view.frame_indices)]
    mel = torch.tensor([[first_row, first_row + clip.mel_rows]], dtype=torch.float64) * MEL_ROW_SECONDS
    frames = torch.tensor(ticks.tolist(), dtype=torch.float64).view(-1, 2) / TICKS_PER_SECOND
    return torch.cat([mel, frames]).float()
