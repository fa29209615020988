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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from ca2st.batch import ClipBatch
from ca2st.errors import UserInputError
from ca2st.spec import ClipSpec
from pipelines.augment.config import AugmentConfig
from pipelines.draws import EvaluationDraws, EvaluationViews, TrainDraws
from pipelines.loader_config import LoaderConfig
from pipelines.order_config import OrderConfig
from pipelines.quarantine import Quarantine, quarantine_limit
from pipelines.rank_loader import RankLoader
from pipelines.sample_plan import evaluation_plan, training_plan
from pipelines.sampling import SamplingConfig
from sharding.shard_set import ShardSet

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


def _quarantine(loader: LoaderConfig, folder: Path | None, num_samples: int) -> Quarantine | None:
    if loader.on_error == "fail":
        return None
    most = quarantine_limit(budget=loader.quarantine_budget, percent=loader.quarantine_percent, num_samples=num_samples)
    return Quarantine(folder, most=most)
