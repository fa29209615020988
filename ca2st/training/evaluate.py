"""Evaluation: every sample exactly once, by all its views, at any number of ranks, or no metric at all.

`scored_batches` is the one way from a model and a source to probabilities, a batch at a time: who needs them keeps them
where they belong (a file, a page), and nothing here grows with the set. `evaluate` is the validation of a training: all
ranks score their share and exchange counts and a few bytes per sample, never predictions.
"""

import hashlib
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from ca2st.batch import ClipBatch, Labelling
from ca2st.errors import listed
from ca2st.training.errors import IncompleteEvaluationError, SourceContractError
from ca2st.training.losses import check_label_range, check_targets
from ca2st.training.metrics import MetricSums, Ranking, class_rankings, ranking_metrics
from ca2st.training.ranks import Ranks
from ca2st.training.step import model_logits

Digests = NDArray[Any]
"""Texts of 16 bytes, one for each key."""
_DIGEST_BYTES = 16
_MOST_NAMED = 1000
"""Keys of a finding that are looked up; more are only counted."""
_CLASSES_AT_A_TIME = 16


@runtime_checkable
class EvaluationSource(Protocol):
    """Every view of every sample once, over all ranks; a batch holds whole samples, the views of one side by side."""

    @property
    def num_samples(self) -> int:
        """Return the samples of the whole set, over all ranks."""

    def batches(self) -> Iterator[ClipBatch]:
        """Return this rank's views; the views of a sample share its key; padding is marked."""


@runtime_checkable
class NamesSamples(Protocol):
    """An evaluation source that can also say which samples must have been scored at the end."""

    def sample_ids(self) -> Iterable[str]:
        """Return the keys of all samples of the whole set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """What a model says of some samples, each by the mean over its views."""

    sample_ids: tuple[str, ...]
    num_views: Int[np.ndarray, " samples"]
    labels: Int[np.ndarray, "samples columns"]
    """As the batches had them: one column per target; of several labels one per class; without labels none."""
    probabilities: Mapping[str, Float[np.ndarray, "samples _"]]
    """By target: float32 `[samples, classes]`."""
    has_audio: Bool[np.ndarray, " samples"]
    labelling: Labelling = "one"

    def __len__(self) -> int:
        return len(self.sample_ids)


def joined(parts: Iterable[Scored]) -> Scored:
    """Return the samples of several batches as one; for sets that fit into memory.

    Raises:
        IncompleteEvaluationError: there is no batch.
    """
    all_parts = list(parts)
    if not all_parts:
        raise IncompleteEvaluationError("evaluation: expected at least one sample, found none; no metric is reported")
    names = tuple(all_parts[0].probabilities)
    return Scored(
        sample_ids=tuple(key for part in all_parts for key in part.sample_ids),
        num_views=np.concatenate([part.num_views for part in all_parts]),
        labels=np.concatenate([part.labels for part in all_parts]),
        probabilities={name: np.concatenate([part.probabilities[name] for part in all_parts]) for name in names},
        has_audio=np.concatenate([part.has_audio for part in all_parts]),
        labelling=all_parts[0].labelling,
    )


def evaluate(
    model: nn.Module,
    source: EvaluationSource,
    *,
    accelerator: Accelerator,
    targets: Mapping[str, int],
    per_device_batch_size: int,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Score every sample of `source` with `model` on all ranks; return the set's metrics, equal on every rank.

    Args:
        model: The model itself, not DistributedDataParallel around it; put in evaluation mode for the time.
        source: This rank's part of the set.
        accelerator: Gives device and autocast.
        targets: Classes of each target, in the order of the label columns.
        per_device_batch_size: Views of one forward pass.
        ranks: How this rank meets the others; None: as `accelerator` does, and nobody reads the times.

    Raises:
        IncompleteEvaluationError: the scored samples are not the set's, each by all its views.
        LabelRangeError: a label beyond the model's heads.
        PeerFailedError: another rank failed.
    """
    ranks = ranks or Ranks(accelerator)
    tally = SampleTally()
    scores_and_truth: list[_ScoresAndTruth] = []

    def score() -> tuple[MetricSums, SampleTally]:
        sums = MetricSums(targets)
        for part in scored_batches(
            model, source, accelerator=accelerator, targets=targets, per_device_batch_size=per_device_batch_size
        ):
            tally.add(part.sample_ids, part.num_views)
            sums.add(part.probabilities, part.labels, labelling=part.labelling)
            if part.labelling == "several":
                scores_and_truth.extend((scores, part.labels > 0) for scores in part.probabilities.values())
        return sums, tally.without_names()

    results = ranks.together(score)
    finding = ranks.on_main(lambda: compare_with_set([one for _, one in results], source))
    if finding is not None:
        names = ranks.together(lambda: tally.names_of(finding, source if ranks.is_main else None))
        raise finding.error(set().union(*names), source)
    metrics = MetricSums.total([sums for sums, _ in results]).metrics()
    return metrics | _mean_average_precision(scores_and_truth, ranks)


_ScoresAndTruth = tuple[Float[np.ndarray, "samples classes"], Bool[np.ndarray, "samples classes"]]


def _mean_average_precision(scores_and_truth: Sequence[_ScoresAndTruth], ranks: Ranks) -> dict[str, float]:
    """Return ``map`` over all ranks; nothing where no rank has samples of several labels.

    The ranking of all samples by a class cannot be added up from parts, so ranks exchange a few classes at a time.
    """
    num_classes = max(ranks.gather(scores_and_truth[0][0].shape[1] if scores_and_truth else 0))
    if num_classes == 0:
        return {}
    none = np.zeros((0, num_classes), np.float32), np.zeros((0, num_classes), np.bool_)
    scores, truth = (np.concatenate(columns) for columns in zip(none, *scores_and_truth, strict=True))
    rankings: list[Ranking] = []
    for first in range(0, num_classes, _CLASSES_AT_A_TIME):
        some = slice(first, first + _CLASSES_AT_A_TIME)
        parts = ranks.gather((scores[:, some], truth[:, some]))
        of_all = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
        rankings += class_rankings(of_all[0], of_all[1])
    return {"map": ranking_metrics(rankings)["map"]}


def scored_batches(
    model: nn.Module,
    source: EvaluationSource,
    *,
    accelerator: Accelerator,
    targets: Mapping[str, int],
    per_device_batch_size: int,
    label_classes: Mapping[str, int] | None = None,
    labelling: Labelling | None = None,
) -> Generator[Scored, None, None]:
    """Yield what `model` says of the samples of each batch, padding left out; raises as `evaluate`.

    `label_classes`: classes of the batches' label columns, where they are not those of the model's `targets`.
    `labelling`: how many labels a sample of its training had, which decides between softmax and sigmoid; None: as many
    as those here. The model is in evaluation mode until the iterator ends or is closed.
    """
    training = model.training
    known = targets if label_classes is None else label_classes
    model.eval()
    try:
        for batch in source.batches():
            if batch.mixing is not None:
                raise SourceContractError(
                    "evaluation: expected clips as they are, found a batch whose pairs are to be mixed"
                )
            check_label_range(batch.labels, batch.sample_ids, num_classes=known, labelling=batch.labelling)
            with torch.no_grad(), accelerator.autocast():
                parts = batch.split(per_device_batch_size)
                logits = [model_logits(model, part.to(accelerator.device)) for part in parts]
            check_targets(logits[0], tuple(targets))
            yield _of_samples(batch, logits, tuple(targets), labelling=labelling or batch.labelling)
    finally:
        model.train(training)


def probabilities_of(logits: Float[Tensor, "*views classes"], labelling: Labelling) -> Float[Tensor, "*views classes"]:
    """Return float32 probabilities: that each class applies where `several` may, else which one does."""
    wide = logits.float()
    return wide.sigmoid() if labelling == "several" else wide.softmax(dim=-1)


def _of_samples(
    batch: ClipBatch, logits: Sequence[Mapping[str, Tensor]], targets: tuple[str, ...], *, labelling: Labelling
) -> Scored:
    """Average the probabilities of the views of each sample, in float64; views of one sample stand side by side."""
    real = (~batch.is_padding).cpu().nonzero().flatten()
    keys = [batch.sample_ids[view] for view in real.tolist()]
    firsts = [view for view, key in enumerate(keys) if view == 0 or key != keys[view - 1]]
    sizes = np.diff([*firsts, len(keys)])
    sample_of_view = torch.from_numpy(np.repeat(np.arange(len(firsts)), sizes))
    probabilities = {}
    for name in targets:
        views = torch.cat([probabilities_of(part[name], labelling).cpu() for part in logits])[real].double()
        sums = views.new_zeros(len(firsts), views.shape[1]).index_add_(0, sample_of_view, views)
        probabilities[name] = (sums / torch.from_numpy(sizes).unsqueeze(1)).float().numpy()
    first_views = real[firsts]
    return Scored(
        sample_ids=tuple(keys[view] for view in firsts),
        num_views=sizes,
        labels=batch.labels.cpu()[first_views].long().numpy(),
        probabilities=probabilities,
        has_audio=batch.has_audio.cpu()[first_views].numpy(),
        labelling=batch.labelling,
    )


def key_digests(keys: Iterable[str]) -> Digests:
    """Return 16 bytes for each key: two different keys with the same do not occur."""
    data = b"".join(hashlib.blake2b(key.encode(), digest_size=_DIGEST_BYTES).digest() for key in keys)
    return np.frombuffer(data, f"S{_DIGEST_BYTES}")


@dataclass(slots=True)
class SampleTally:
    """Which samples one rank has scored, by how many views: 18 bytes each, and the names, which stay on the rank."""

    digests: list[Digests] = field(default_factory=list)
    num_views: list[NDArray[np.uint16]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """Keys of a batch in one text: a fraction of the memory that as many texts take."""

    def add(self, keys: Sequence[str], num_views: Int[np.ndarray, " samples"]) -> None:
        """Count the samples of a batch."""
        self.digests.append(key_digests(keys))
        self.num_views.append(num_views.astype(np.uint16))
        self.names.append("\n".join(keys))

    def without_names(self) -> "SampleTally":
        """Return what the other ranks get."""
        if not self.digests:
            return SampleTally()
        return SampleTally([np.concatenate(self.digests)], [np.concatenate(self.num_views)])

    def num_different(self) -> int:
        """Return how many different samples were scored."""
        return len(np.unique(np.concatenate([key_digests([]), *self.digests])))

    def names_of(self, finding: "Finding", source: EvaluationSource | None) -> set[str]:
        """Return the keys of a finding that this rank has scored, and those that `source` knows."""
        wanted = set(finding.digests[:_MOST_NAMED].tolist())
        of_set = source.sample_ids() if isinstance(source, NamesSamples) else ()
        keys = chain((key for batch in self.names for key in batch.split("\n")), of_set)
        return {key for key in keys if key_digests([key]).tolist()[0] in wanted}


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with an evaluation, in words, and the samples with which it is."""

    what: str
    digests: Digests
    """Of samples that only the rank that scored them, or the set, can name."""

    def error(self, names: Collection[str], source: EvaluationSource) -> IncompleteEvaluationError:
        """Return the error to raise, with the `names` that were found."""
        return IncompleteEvaluationError(
            f"evaluation: expected each of {source.num_samples} samples exactly once, found {len(self.digests)} "
            f"{self.what}: {listed(sorted(names), count=len(self.digests))}; no metric is reported"
        )


def compare_with_set(tallies: Sequence[SampleTally], source: EvaluationSource) -> Finding | None:
    """Return the first thing wrong: each sample of the set must be scored once, by as many views as every other.

    Raises:
        IncompleteEvaluationError: the number of samples is wrong, and the set cannot name them; or there is none.
    """
    scored = np.concatenate([key_digests([]), *(part for tally in tallies for part in tally.digests)])
    views = np.concatenate([np.zeros(0, np.uint16), *(part for tally in tallies for part in tally.num_views)])
    usual = int(np.bincount(views).argmax()) if len(views) else 0
    unique, counts = np.unique(scored, return_counts=True)
    findings = {
        "scored more than once": unique[counts > 1],
        "scored by another number of views than the rest": np.unique(scored[views != usual]),
    }
    if isinstance(source, NamesSamples):
        in_set, times = np.unique(key_digests(source.sample_ids()), return_counts=True)
        findings["never scored"] = np.setdiff1d(in_set, unique, assume_unique=True)
        findings["not in the set"] = np.setdiff1d(unique, in_set, assume_unique=True)
        findings["twice in the set"] = in_set[times > 1]
    elif len(unique) != source.num_samples:
        raise IncompleteEvaluationError(
            f"evaluation: expected {source.num_samples} samples (at least one), found {len(unique)} scored; "
            "no metric is reported"
        )
    for what, digests in findings.items():
        if len(digests):
            return Finding(what, digests)
    if source.num_samples == 0:
        raise IncompleteEvaluationError(
            "evaluation: expected 0 samples (at least one), found 0 scored; no metric is reported"
        )
    return None


def check_complete(tally: SampleTally, source: EvaluationSource) -> None:
    """Refuse an evaluation by this process alone with which anything is wrong, or of no sample.

    Raises:
        IncompleteEvaluationError: the first kind of trouble, with names.
    """
    if (finding := compare_with_set([tally], source)) is not None:
        raise finding.error(tally.names_of(finding, source), source)
