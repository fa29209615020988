"""Where the seconds of a step go, and what a training asks of its surroundings.

What training asks of the model and of the loaders; the real ones live in `ca2st.model` and `pipelines`.

Where the time of a step goes: one clock that always stands in exactly one stage, so the stages add up to the step.

::

    mark                                                                          mark
     |-- data_wait --|-- gather --|-- to_device --|-- forward --|-- backward --|...|
                          all that belongs to no named stage: other

Times are the host's. On a GPU `forward` and `backward` end when their work is queued; nothing waits for the device
here that did not wait before, so the device's own time shows in the first stage that needs a number from it:
``gather``, which reads the losses. On a CPU every stage is what it says.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

from torch import Tensor

from ca2st.batch import ClipBatch


@runtime_checkable
class HasLogits(Protocol):
    """What a model returns."""

    @property
    def logits(self) -> Mapping[str, Tensor]:
        """One [clips, classes] tensor a head, by the head's name."""
        ...


@runtime_checkable
class TrainSource(Protocol):
    """Shuffled, endless in principle: any epoch from any step."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch; the same on every rank."""
        ...

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[ClipBatch]:
        """This rank's share of each step of `epoch` from `first_step` on; closing the iterator frees its threads."""
        ...


@runtime_checkable
class EvaluationSource(Protocol):
    """Every view of every sample once. Batch i of the ranks, joined in rank order, is batch i of the set."""

    @property
    def num_samples(self) -> int:
        """Samples of the whole set, over all ranks."""
        ...

    def batches(self) -> Iterator[ClipBatch]:
        """This rank's views; the views of a sample share its key; padding is marked."""
        ...


@runtime_checkable
class NamesSamples(Protocol):
    """An evaluation source that can also say which samples must have been scored at the end."""

    def sample_ids(self) -> Sequence[str]:
        """Keys of all samples of the whole set."""
        ...


@runtime_checkable
class StageTotals(Protocol):
    """Running totals of a source's own work."""

    def totals(self) -> Mapping[str, int | float]:
        """By name: thread seconds of a background stage (``..._seconds``) and counts (``bytes_read``); none shrinks."""
        ...


@runtime_checkable
class CountsStages(Protocol):
    """A source that can also say where its threads' time goes; each step of the journal holds what was added."""

    @property
    def stats(self) -> StageTotals:
        """A snapshot."""
        ...


Stage = Literal["data_wait", "to_device", "forward", "backward", "optimizer", "gather", "other"]
Standing = Stage | Literal["checkpoint", "validation"]
"""A stage of a step, or what is done between two steps: there the clock stands in it, and charges it to ``other``."""
STAGES: tuple[Stage, ...] = get_args(Stage)
"""``data_wait``: this rank's loader. ``forward``: with the loss. ``backward``: with the exchange of gradients between
ranks. ``optimizer``: gradient norm, clipping, update. ``gather``: reading losses and meeting the other ranks."""

_OF_A_STEP: Mapping[Standing, Stage] = {stage: stage for stage in STAGES}
_CHARGED: Mapping[Standing, Stage] = {**_OF_A_STEP, "checkpoint": "other", "validation": "other"}


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """One step, from mark to mark, on one rank."""

    seconds: Mapping[Stage, float]
    """By stage; every stage is there."""

    @property
    def step_seconds(self) -> float:
        """Wall time of the step: the sum of its stages."""
        return sum(self.seconds.values())

    def named(self) -> dict[str, float]:
        """Seconds by the names that the journal uses: ``forward_seconds``."""
        return {f"{stage}_seconds": seconds for stage, seconds in self.seconds.items()}


class StageClock:
    """Charges every moment to one stage; for one thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._stage: Standing = "other"
        self._since = clock()
        self._seconds: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)

    def restart(self) -> None:
        """Set the mark at which a step begins."""
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._since = self._clock()

    @contextmanager
    def stage(self, name: Standing) -> Iterator[None]:
        """Charge the block to `name`; the stage around it goes on afterwards."""
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def standing(self) -> tuple[Standing, float]:
        """The stage it stands in now, and for how many seconds; from any thread."""
        return self._stage, self._clock() - self._since

    def times(self) -> StepTimes:
        """What has passed since the mark."""
        self._switch(self._stage)
        return StepTimes(seconds=dict(self._seconds))

    def _switch(self, name: Standing) -> Standing:
        now = self._clock()
        self._seconds[_CHARGED[self._stage]] += now - self._since
        outer, self._stage, self._since = self._stage, name, now
        return outer


class SourceCounts:
    """What a loader's own threads did between two steps, where the loader says so."""

    def __init__(self, source: object) -> None:
        self._source = source if isinstance(source, CountsStages) else None
        self._before = self._totals()

    def since_last(self) -> dict[str, int | float]:
        """Totals now minus totals at the last call; empty where the source does not count.

        Work is counted where it ended: the threads run ahead, so a step's line may hold the decoding of a later batch.
        """
        now = self._totals()
        before, self._before = self._before, now
        return {name: total - before.get(name, 0) for name, total in now.items()}

    def _totals(self) -> dict[str, int | float]:
        return {} if self._source is None else dict(self._source.stats.totals())
