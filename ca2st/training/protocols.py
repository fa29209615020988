"""What training asks of the model and of the loaders; the real ones live in `ca2st.model` and `pipelines`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

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
