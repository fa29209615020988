"""Settings of the loaders (`[data.loader]` of a recipe), and what a loader is made from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch

from ca2st.errors import UserInputError, check_choice
from ca2st.spec import ClipSpec
from pipelines.augment.config import AugmentConfig
from pipelines.errors import check_range
from pipelines.order.plan import SamplePlan
from pipelines.order.selection import OrderConfig, PlanRecord, SetShare, default_num_lanes
from pipelines.order.sources import make_sources, plain_source
from pipelines.quarantine import OnError
from pipelines.storage.shard_files import Verify
from pipelines.storage.shard_sets import check_agreement
from pipelines.views import EvaluationViews, SamplingConfig
from sharding.format.remote import RetryConfig, StorageConfig
from sharding.format.shard_set import ShardSet

BackendName = Literal["auto", "dali", "reference"]
DecodeOn = Literal["auto", "cpu"]


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
    """Threads of the decoding backend; None: the processor cores this process may use, shared with the other workers
    of a training on its machine."""
    prefetch_steps: int = 2
    """Batches kept ready, beside those that are being made; 0 makes each when it is asked for."""
    backend: BackendName = "auto"
    """``dali``, ``reference`` (slow, the oracle), or ``auto``: dali where it is installed."""
    decode_on: DecodeOn = "auto"
    """``auto``: dali runs on the rank's GPU where that decodes the codec of the shards, and on the CPU elsewhere;
    ``cpu``: always on the CPU, which leaves the GPU's memory and video engines alone."""
    verify: Verify = "size"
    """``size``: file sizes at the start. ``sha256``: also every shard's hash at its first use. Frames and
    spectrograms are compared with their own checksums in any case."""
    index_cache_bytes: int = 1 << 30
    """Memory for shard indexes; about 1 MB per shard of 300 clips of 10 s."""
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
        check_choice("loader.backend", self.backend, get_args(BackendName))
        check_choice("loader.decode_on", self.decode_on, get_args(DecodeOn))
        check_choice("loader.on_error", self.on_error, get_args(OnError))
        check_choice("loader.verify", self.verify, get_args(Verify))
        check_range(
            self, "loader.", "num_lanes", "shuffle_block", "fetch_threads", "decode_threads", "cache_bytes", low=1
        )
        check_range(self, "loader.", "prefetch_steps", "quarantine_budget", low=0)
        check_range(self, "loader.", "quarantine_percent", low=0, high=100)
        if not self.stall_timeout_seconds > 0:
            raise UserInputError(f"loader.stall_timeout_seconds: expected > 0, found {self.stall_timeout_seconds}")

    @property
    def rendered_at_once(self) -> int:
        """Batches that are made at a time: where they are made ahead, one is decoded while another is finished."""
        return 2 if self.prefetch_steps else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderSetup:
    """What the loaders of training and evaluation are made from alike."""

    clip: ClipSpec
    targets: Sequence[str]
    """Label spaces in the order of `ClipBatch.labels`."""
    global_batch_size: int
    """Samples of a step on all ranks together; several views of a sample count once."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    rank: int = 0
    world_size: int = 1
    device: torch.device | None = None
    """Where the batches are wanted; a GPU may decode for itself (`LoaderConfig.decode_on`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSetup(LoaderSetup):
    """What a training loader is made from."""

    shard_sets: Sequence[ShardSet]
    """One, or those of a mixture."""
    seed: int
    """Keys the order and every draw."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    order: OrderConfig = field(default_factory=OrderConfig)
    """Weights of several sets, selected samples, class balance, repeats. Default: every sample once per epoch."""
    quarantine_folder: Path | None = None
    """Where all ranks and attempts of the run keep what `loader.on_error` leaves out; None: in memory alone."""

    def __post_init__(self) -> None:
        self.augment.mixing.check_even("training.global_batch_size", self.global_batch_size)

    @property
    def views_per_clip(self) -> int:
        """Consecutive views that read the same frames."""
        return 1

    def plan(self) -> SamplePlan:
        """Read what decides the order: the shard tables, and all indexes where samples are selected or balanced.

        Raises:
            PlanError: a batch, weight or number of lanes that cannot be planned.
            UserInputError: sets that do not agree, or a name of the selection that matches nothing.
            ShardSetDamageError: an index is missing or damaged.
        """
        check_agreement(self.shard_sets, self.targets)
        order, sets = self.order, self.shard_sets
        if order.weights is not None and len(order.weights) != len(sets):
            raise UserInputError(f"expected a weight for each of {len(sets)} sets, found {len(order.weights)}")
        weights: Sequence[float | None] = order.weights or [None] * len(sets)
        shares = [
            SetShare(fingerprint=one.manifest.fingerprint, weight=weight)
            for one, weight in zip(sets, weights, strict=True)
        ]
        record = PlanRecord(
            seed=self.seed,
            global_batch_size=self.global_batch_size,
            num_lanes=self.loader.num_lanes or default_num_lanes(self.global_batch_size, repeats=order.repeats),
            shuffle_block=self.loader.shuffle_block,
            remainder=order.remainder,
            manifest_fingerprint=shares[0].fingerprint,
            mixture=tuple(shares) if len(sets) > 1 else (),
            selection=order.selection,
            balance=order.balance,
            repeats=order.repeats,
            epoch_samples=order.epoch_samples,
        )
        groups = [[one] for one in sets] if order.weights is not None else [list(sets)]
        first_target = self.targets[0]
        sources = make_sources(groups, first_target=first_target, selection=order.selection, balance=order.balance)
        return SamplePlan(record, sources, groups)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSetup(LoaderSetup):
    """What an evaluation loader is made from."""

    shard_set: ShardSet
    views: EvaluationViews = field(default_factory=EvaluationViews)
    num_lanes: int | None = None
    """Parallel runs through the set; 1 gives the set's own order, None as many as in training."""

    @property
    def shard_sets(self) -> tuple[ShardSet]:
        """The one set."""
        return (self.shard_set,)

    @property
    def views_per_clip(self) -> int:
        """Consecutive views that read the same frames: the crops of a clip."""
        return self.views.crops

    def plan(self) -> SamplePlan:
        """Plan every sample once, each lane in stored order.

        Raises:
            PlanError: a batch or number of lanes that cannot be planned.
        """
        record = PlanRecord(
            seed=0,
            global_batch_size=self.global_batch_size,
            num_lanes=self.num_lanes or default_num_lanes(self.global_batch_size),
            shuffle_block=0,
            remainder="pad",
            manifest_fingerprint=self.shard_set.manifest.fingerprint,
        )
        source = plain_source([shard.num_samples for shard in self.shard_set.shards])
        return SamplePlan(record, [source], [[self.shard_set]])
