"""Evaluation: every sample exactly once, by all its views, at any number of ranks, or no metric at all.

`scored_batches` is the one way from a model and a source to probabilities, a batch at a time: who needs them keeps them
where they belong (a file, a page), and nothing here grows with the set. `evaluate` is the validation of a training: all
ranks score their share and exchange counts, never predictions. In memory is then, beside the counts, 18 bytes per
sample on every rank.
"""

import hashlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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


@runtime_checkable
class EvaluationSource(Protocol):
    """Every view of every sample once, over all ranks; a batch holds whole samples, the views of one side by side."""

    @property
    def num_samples(self) -> int:
        """Return the samples of the whole set, over all ranks."""
        ...

    def batches(self) -> Iterator[ClipBatch]:
        """Return this rank's views; the views of a sample share its key; padding is marked."""
        ...


@runtime_checkable
class NamesSamples(Protocol):
    """An evaluation source that can also say which samples must have been scored at the end."""

    def sample_ids(self) -> Iterable[str]:
        """Return the keys of all samples of the whole set."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """What a model says of some samples, each by the mean over its views."""

    sample_ids: tuple[str, ...]
    num_views: Int[np.ndarray, " samples"]
    """Views of each."""
    labels: Int[np.ndarray, "samples columns"]
    """As the batches had them: a column a target; of several labels a column a class; without labels none."""
    probabilities: Mapping[str, Float[np.ndarray, "samples _"]]
    """By target: float32 `[samples, classes]`."""
    has_audio: Bool[np.ndarray, " samples"]
    labelling: Labelling = "one"
    """How `labels` are to be read."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """Metrics of a set, equal on every rank."""

    metrics: Mapping[str, float]
    """Fractions of 1: see `metrics.evaluation_metrics`."""
    num_samples: int
    """Samples scored."""


def evaluate(
    model: nn.Module,
    source: EvaluationSource,
    *,
    accelerator: Accelerator,
    targets: Mapping[str, int],
    per_device_batch_size: int,
    ranks: Ranks | None = None,
) -> EvaluationResult:
    """Score every sample of `source` with `model` on all ranks, and count what is right.

    Args:
        model: The model itself, not DistributedDataParallel around it; put in evaluation mode for the time.
        source: This rank's part of the set.
        accelerator: Gives device, autocast and the other ranks.
        targets: Classes of each target, in the order of the label columns.
        per_device_batch_size: Views of one forward pass.
        ranks: How this rank meets the others; None: without a clock for it.

    Raises:
        IncompleteEvaluationError: the scored samples are not the set's, each by all its views.
        LabelRangeError: a label beyond the model's heads.
        PeerFailedError: another rank failed.
    """
    ranks = ranks or Ranks(accelerator)
    tally, of_several = SampleTally(), _SeveralLabels()

    def score() -> tuple[MetricSums, SampleTally]:
        sums = MetricSums(targets)
        for part in scored_batches(
            model, source, accelerator=accelerator, targets=targets, per_device_batch_size=per_device_batch_size
        ):
            tally.add(part.sample_ids, part.num_views)
            sums.add(part.probabilities, part.labels, labelling=part.labelling)
            of_several.add(part)
        return sums, tally.without_names()

    results = ranks.together(score)
    findings = ranks.on_main(lambda: compare_with_set([one for _, one in results], source))
    unnamed = {what: found.unnamed for what, found in findings.items() if len(found.unnamed)}
    if unnamed:  # only the rank that scored a sample knows its name
        names = ranks.gather({what: tally.names_of(digests) for what, digests in unnamed.items()})
        findings = {
            what: found.with_names([name for own_names in names for name in own_names.get(what, [])])
            for what, found in findings.items()
        }
    refuse_findings(findings, num_samples=source.num_samples)
    metrics = MetricSums.total([sums for sums, _ in results]).metrics()
    return EvaluationResult(metrics=metrics | of_several.metrics(ranks), num_samples=source.num_samples)


_CLASSES_AT_A_TIME = 16


class _SeveralLabels:
    """Scores of samples of several labels: the ranking of all samples by a class cannot be added up from parts.

    Each rank keeps its own; the ranks exchange those of a few classes at a time.
    """

    def __init__(self) -> None:
        self._scores: list[Float[np.ndarray, "samples classes"]] = []
        self._truth: list[Bool[np.ndarray, "samples classes"]] = []

    def add(self, part: Scored) -> None:
        """Keep the scores of a batch; nothing of samples of one label."""
        if part.labelling == "several":
            self._scores += part.probabilities.values()
            self._truth.append(part.labels > 0)

    def metrics(self, ranks: Ranks) -> dict[str, float]:
        """Return ``map`` over all ranks; nothing where no rank has such samples."""
        num_classes = max(ranks.gather(self._scores[0].shape[1] if self._scores else 0))
        if num_classes == 0:
            return {}
        scores = np.concatenate(self._scores or [np.zeros((0, num_classes), np.float32)])
        truth = np.concatenate(self._truth or [np.zeros((0, num_classes), np.bool_)])
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
    wide = {
        name: torch.cat([probabilities_of(part[name], labelling).cpu() for part in logits])[real] for name in targets
    }
    means = {name: mean_over_views(views, sample_of_view, num_samples=len(firsts)) for name, views in wide.items()}
    first_views = real[firsts]
    return Scored(
        sample_ids=tuple(keys[view] for view in firsts),
        num_views=sizes,
        labels=batch.labels.cpu()[first_views].long().numpy(),
        probabilities={name: mean.float().numpy() for name, mean in means.items()},
        has_audio=batch.has_audio.cpu()[first_views].numpy(),
        labelling=batch.labelling,
    )


def mean_over_views(
    probabilities: Float[Tensor, "views classes"], sample_of_view: Int[Tensor, " views"], *, num_samples: int
) -> Float[Tensor, "samples classes"]:
    """Return the mean of the probabilities of each sample's views, in float64; samples without a view are NaN."""
    wide = probabilities.double()
    sums = wide.new_zeros(num_samples, wide.shape[1]).index_add_(0, sample_of_view, wide)
    counts = torch.bincount(sample_of_view, minlength=num_samples)
    return sums / counts.unsqueeze(1)


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

    def names_of(self, digests: Digests) -> list[str]:
        """Return the keys of the digests that this rank has scored."""
        return _with_digests((key for batch in self.names for key in batch.split("\n")), digests)


@dataclass(frozen=True, slots=True)
class Finding:
    """Samples with which something is wrong: by name, or by digests that only the rank that scored them can name."""

    num_samples: int
    names: tuple[str, ...] = ()
    unnamed: Digests = field(default_factory=lambda: key_digests([]))

    def with_names(self, names: Sequence[str]) -> "Finding":
        """Return the same with the names that the ranks have found."""
        return Finding(self.num_samples, (*self.names, *names))


def compare_with_set(tallies: Sequence[SampleTally], source: EvaluationSource) -> dict[str, Finding]:
    """Return what is wrong, in words: each sample of the set must be scored once, by as many views as every other."""
    empty = key_digests([])
    scored = np.concatenate([empty, *(part for tally in tallies for part in tally.digests)])
    views = np.concatenate([np.zeros(0, np.uint16), *(part for tally in tallies for part in tally.num_views)])
    usual = int(np.bincount(views).argmax()) if len(views) else 0
    unique, counts = np.unique(scored, return_counts=True)
    again, odd = unique[counts > 1], np.unique(scored[views != usual])
    findings = {
        "scored more than once": Finding(len(again), unnamed=again),
        "scored by another number of views than the rest": Finding(len(odd), unnamed=odd),
    }
    if isinstance(source, NamesSamples):
        expected = key_digests(source.sample_ids())
        in_set, times = np.unique(expected, return_counts=True)
        lost = np.setdiff1d(in_set, unique, assume_unique=True)
        twice = in_set[times > 1]
        foreign = np.setdiff1d(unique, in_set, assume_unique=True)
        findings["never scored"] = Finding(len(lost), tuple(_with_digests(source.sample_ids(), lost)))
        findings["not in the set"] = Finding(len(foreign), unnamed=foreign)
        findings["twice in the set"] = Finding(len(twice), tuple(_with_digests(source.sample_ids(), twice)))
    elif len(unique) != source.num_samples:
        raise IncompleteEvaluationError(
            f"evaluation: expected {source.num_samples} samples (at least one), found {len(unique)} scored; "
            "no metric is reported"
        )
    return {what: found for what, found in findings.items() if found.num_samples}


def _with_digests(keys: Iterable[str], digests: Digests) -> list[str]:
    """Return the keys that have one of the first of these digests, each once."""
    wanted = set(digests[:_MOST_NAMED].tolist())
    return list(dict.fromkeys(key for key in keys if key_digests([key]).tolist()[0] in wanted)) if wanted else []


def refuse_findings(findings: Mapping[str, Finding], *, num_samples: int) -> None:
    """Refuse an evaluation with which anything is wrong, or of no sample.

    Raises:
        IncompleteEvaluationError: as said; the first kind of trouble, with names.
    """
    for what, found in findings.items():
        raise IncompleteEvaluationError(
            f"evaluation: expected each of {num_samples} samples exactly once, found {found.num_samples} {what}: "
            f"{listed(sorted(found.names), count=found.num_samples)}; no metric is reported"
        )
    if num_samples == 0:
        raise IncompleteEvaluationError(
            "evaluation: expected 0 samples (at least one), found 0 scored; no metric is reported"
        )
