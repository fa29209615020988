"""What a run reads, from shard sets and settings: the record, the sources, and every epoch's plan."""

from collections.abc import Sequence

from ca2st.errors import UserInputError
from pipelines.order.plan import (
    EpochPlan,
    count_steps,
    epoch_length,
    mixture_quotas,
    rank_positions,
    require_enough_samples,
    source_passes,
)
from pipelines.order.selection import OrderConfig, PlanRecord, SetShare, default_num_lanes
from pipelines.order.sources import SampleSource, SourcePasses, make_sources, plain_source
from pipelines.storage.shard_sets import check_agreement
from sharding.format.shard_set import ShardSet


class SamplePlan:
    """The order in which shard sets are read: the same object on every rank, and before any rank starts."""

    def __init__(
        self, record: PlanRecord, sources: Sequence[SampleSource], groups: Sequence[Sequence[ShardSet]]
    ) -> None:
        """`groups` are the shard sets of each source."""
        self.record = record
        """What the order depends on, and nothing else but the sets' bytes."""
        self._sources, self._groups = sources, groups
        self._passes: tuple[int, list[SourcePasses]] = (-1, [])
        self.num_samples = sum(source.num_samples for source in sources)
        """Different samples that are read."""
        self.num_clips = epoch_length(record, sources) * record.repeats
        """Clips of an epoch, before what fills no whole batch is dropped or padded."""

    @property
    def num_steps(self) -> int:
        """Batches of an epoch; the same on every rank.

        Raises:
            PlanError: there is not one.
        """
        return count_steps(self.num_clips, self.record.global_batch_size, remainder=self.record.remainder)

    def require_enough(self, *, world_size: int) -> None:
        """Refuse, before anything starts, what cannot feed every rank.

        Raises:
            PlanError: as `require_enough_samples`, or as `rank_positions`.
        """
        require_enough_samples(
            num_samples=self.num_clips,
            global_batch_size=self.record.global_batch_size,
            world_size=world_size,
            remainder=self.record.remainder,
        )
        self.positions(0, world_size)

    def positions(self, rank: int, world_size: int) -> range:
        """The positions of every global batch that `rank` reads; raises as `rank_positions`."""
        return rank_positions(
            rank,
            world_size,
            global_batch_size=self.record.global_batch_size,
            keep_pairs=self.record.remainder != "pad",
        )

    def epoch(self, epoch: int) -> EpochPlan:
        """The order of one epoch. Plans of the same epoch share what takes time and memory."""
        held, passes = self._passes
        if held != epoch:
            passes = source_passes(self.record, self._sources, epoch=epoch)
            self._passes = (epoch, passes)
        return EpochPlan(self.record, self._sources, epoch=epoch, passes=passes)

    def describe(self) -> str:
        """One line: length of an epoch, and how often each source is read in it."""
        quotas = mixture_quotas(self.record, self._sources)
        shares = (self.num_clips * quotas / quotas.sum()).tolist()
        parts = [
            f"{' and '.join(one.where for one in group)}: {source.num_samples} samples, each read "
            f"{share / source.num_samples:.4g} times on average"
            for group, source, share in zip(self._groups, self._sources, shares, strict=True)
        ]
        return (
            f"plan: {self.num_steps} steps of {self.record.global_batch_size} clips an epoch "
            f"(remainder {self.record.remainder}); {'; '.join(parts)}"
        )


def training_plan(
    shard_sets: Sequence[ShardSet],
    targets: Sequence[str],
    order: OrderConfig,
    *,
    seed: int,
    global_batch_size: int,
    num_lanes: int | None,
    shuffle_block: int,
) -> SamplePlan:
    """Read what decides the order: the shard tables, and all indexes where samples are selected or balanced.

    Raises:
        PlanError: a batch, weight or number of lanes that cannot be planned.
        UserInputError: sets that do not agree, or a name of the selection that matches nothing.
        ShardSetDamageError: an index is missing or damaged.
    """
    check_agreement(shard_sets, targets)
    if order.weights is not None and len(order.weights) != len(shard_sets):
        raise UserInputError(f"expected a weight for each of {len(shard_sets)} sets, found {len(order.weights)}")
    record = PlanRecord(
        seed=seed,
        global_batch_size=global_batch_size,
        num_lanes=num_lanes or default_num_lanes(global_batch_size, repeats=order.repeats),
        shuffle_block=shuffle_block,
        remainder=order.remainder,
        manifest_fingerprint=shard_sets[0].manifest.fingerprint,
        mixture=_shares(shard_sets, order.weights),
        selection=order.selection,
        balance=order.balance,
        repeats=order.repeats,
        epoch_samples=order.epoch_samples,
    )
    groups = [[one] for one in shard_sets] if order.weights is not None else [list(shard_sets)]
    sources = make_sources(groups, first_target=targets[0], selection=order.selection, balance=order.balance)
    return SamplePlan(record, sources, groups)


def evaluation_plan(shard_set: ShardSet, *, global_batch_size: int, num_lanes: int | None) -> SamplePlan:
    """Every sample of one set once, each lane in stored order.

    Raises:
        PlanError: a batch or number of lanes that cannot be planned.
    """
    record = PlanRecord(
        seed=0,
        global_batch_size=global_batch_size,
        num_lanes=num_lanes or default_num_lanes(global_batch_size),
        shuffle_block=0,
        remainder="pad",
        manifest_fingerprint=shard_set.manifest.fingerprint,
    )
    return SamplePlan(record, [plain_source([shard.num_samples for shard in shard_set.shards])], [[shard_set]])


def _shares(shard_sets: Sequence[ShardSet], weights: Sequence[float] | None) -> tuple[SetShare, ...]:
    if len(shard_sets) == 1:
        return ()
    given: Sequence[float | None] = weights or [None] * len(shard_sets)
    return tuple(
        SetShare(fingerprint=one.manifest.fingerprint, weight=weight)
        for one, weight in zip(shard_sets, given, strict=True)
    )
