"""Evaluation: every sample exactly once, by all its views, at any number of ranks, or no metric at all.

The metrics are pure functions of probabilities and labels. Source: the paper's evaluation protocol. Ties are broken
towards the lower class index everywhere, so a constant prediction scores no better than chance.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ca2st.batch import ClipBatch
from ca2st.errors import listed
from ca2st.training.errors import IncompleteEvaluationError, SourceContractError
from ca2st.training.losses import check_label_range, check_targets
from ca2st.training.ranks import Ranks
from ca2st.training.step import model_logits

VERB, NOUN = "verb", "noun"
_JOINT_CHUNK = 256


@runtime_checkable
class EvaluationSource(Protocol):
    """Every view of every sample once. Batch i of the ranks, joined in rank order, is batch i of the set."""

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

    def sample_ids(self) -> Sequence[str]:
        """Return the keys of all samples of the whole set."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """Metrics and predictions of a set, equal on every rank, in the set's order."""

    metrics: Mapping[str, float]
    """Fractions of 1: see `metrics.evaluation_metrics`."""
    sample_ids: tuple[str, ...]
    """Keys of the samples."""
    labels: Tensor
    """[samples, targets]."""
    probabilities: Mapping[str, Tensor]
    """By target: [samples, classes], float64."""

    @property
    def num_samples(self) -> int:
        """Return the samples scored."""
        return len(self.sample_ids)


@dataclass(frozen=True, slots=True)
class _Views:
    """Scored views of one batch of one rank, without padding."""

    keys: list[str]
    labels: Tensor
    probabilities: dict[str, Tensor]


def evaluate(
    model: nn.Module,
    source: EvaluationSource,
    *,
    accelerator: Accelerator,
    targets: Mapping[str, int],
    per_device_batch_size: int,
    ranks: Ranks | None = None,
) -> EvaluationResult:
    """Score every sample of `source` with `model` on all ranks.

    Args:
        model: Prepared or not; put in evaluation mode for the time.
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
    own = accelerator.unwrap_model(model)
    batches_of_rank = (ranks or Ranks(accelerator)).together(
        lambda: _score(own, source, accelerator=accelerator, targets=targets, num_clips=per_device_batch_size)
    )
    views = [batch for step in itertools.zip_longest(*batches_of_rank) for batch in step if batch is not None]
    _check_complete([key for batch in views for key in batch.keys], source)
    return _combine(views, tuple(targets))


def _combine(views: Sequence[_Views], targets: tuple[str, ...]) -> EvaluationResult:
    """Average the views of each sample, in the order the samples first came."""
    keys = [key for batch in views for key in batch.keys]
    order = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    sample_of_view = torch.tensor([order[key] for key in keys], dtype=torch.long)
    labels = torch.zeros(len(order), len(targets), dtype=torch.long)
    labels[sample_of_view] = torch.cat([batch.labels for batch in views]).long()
    probabilities = {
        name: mean_over_views(
            torch.cat([batch.probabilities[name] for batch in views]), sample_of_view, num_samples=len(order)
        )
        for name in targets
    }
    return EvaluationResult(
        metrics=evaluation_metrics(probabilities, labels),
        sample_ids=tuple(order),
        labels=labels,
        probabilities=probabilities,
    )


def _score(
    model: nn.Module, source: EvaluationSource, *, accelerator: Accelerator, targets: Mapping[str, int], num_clips: int
) -> list[_Views]:
    views, training = [], model.training
    model.eval()
    try:
        with torch.no_grad(), accelerator.autocast():
            for batch in source.batches():
                _check_unmixed(batch)
                check_label_range(batch.labels, batch.sample_ids, num_classes=targets)
                parts = batch.split(num_clips)
                logits = [model_logits(model, part.to(accelerator.device)) for part in parts]
                views.append(_without_padding(batch, logits, tuple(targets)))
    finally:
        model.train(training)
    return views


def _check_unmixed(batch: ClipBatch) -> None:
    if batch.mixing is not None:
        raise SourceContractError("evaluation: expected clips as they are, found a batch whose pairs are to be mixed")


def _without_padding(batch: ClipBatch, logits: Sequence[Mapping[str, Tensor]], targets: tuple[str, ...]) -> _Views:
    check_targets(logits[0], targets)
    real = ~batch.is_padding.cpu()
    return _Views(
        keys=[key for key, keep in zip(batch.sample_ids, real.tolist(), strict=True) if keep],
        labels=batch.labels.cpu()[real],
        probabilities={
            name: torch.cat([part[name].float().softmax(dim=-1).cpu() for part in logits])[real] for name in targets
        },
    )


def _check_complete(keys: Sequence[str], source: EvaluationSource) -> None:
    """Compare what was scored with what the set holds: each sample once, by as many views as every other."""
    scored = Counter(keys)
    usual = scored.most_common()[len(scored) // 2][1] if scored else 0
    findings = {
        "scored by another number of views than the rest": [key for key, count in scored.items() if count != usual]
    }
    if isinstance(source, NamesSamples):
        expected = Counter(source.sample_ids())
        findings["never scored"] = [key for key in expected if key not in scored]
        findings["not in the set"] = [key for key in scored if key not in expected]
        findings["twice in the set"] = [key for key, count in expected.items() if count > 1]
    for what, names in findings.items():
        if names:
            raise IncompleteEvaluationError(
                f"evaluation: expected each of {source.num_samples} samples exactly once, found {len(names)} {what}: "
                f"{listed(sorted(names))}; no metric is reported"
            )
    if len(scored) != source.num_samples or not scored:
        raise IncompleteEvaluationError(
            f"evaluation: expected {source.num_samples} samples (at least one), found {len(scored)} scored; "
            "no metric is reported"
        )


def mean_over_views(
    probabilities: Float[Tensor, "views classes"], sample_of_view: Int[Tensor, " views"], *, num_samples: int
) -> Float[Tensor, "samples classes"]:
    """Return the mean of the softmax of each sample's views, in float64; samples without a view are NaN."""
    wide = probabilities.double()
    sums = wide.new_zeros(num_samples, wide.shape[1]).index_add_(0, sample_of_view, wide)
    counts = torch.bincount(sample_of_view, minlength=num_samples)
    return sums / counts.unsqueeze(1)


def label_ranks(
    probabilities: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]
) -> Int[Tensor, " samples"]:
    """Return how many classes stand before the label in each sample's ranking; 0 is first."""
    own = probabilities.gather(1, labels.unsqueeze(1))
    before = torch.arange(probabilities.shape[1], device=labels.device) < labels.unsqueeze(1)
    return ((probabilities > own) | ((probabilities == own) & before)).sum(dim=1)


def top_k_hits(
    probabilities: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"], k: int
) -> Bool[Tensor, " samples"]:
    """Return whether the label is among the k most probable classes; NaN probabilities never hit."""
    finite = probabilities.isfinite().all(dim=1)
    return (label_ranks(probabilities, labels) < k) & finite


def per_class_accuracy(
    probabilities: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]
) -> Float[Tensor, " classes"]:
    """Return the top-1 accuracy of the samples of each class; NaN for a class without samples."""
    num_classes = probabilities.shape[1]
    hits = top_k_hits(probabilities, labels, 1).double()
    right = hits.new_zeros(num_classes).index_add_(0, labels, hits)
    return right / torch.bincount(labels, minlength=num_classes)


def mean_class_accuracy(probabilities: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]) -> float:
    """Return the mean of the per-class accuracies over the classes that have samples."""
    return float(per_class_accuracy(probabilities, labels).nanmean())


def harmonic_mean(values: Sequence[float]) -> float:
    """Return the harmonic mean across data sets; 0 when any value is 0."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def joint_label_ranks(
    first: Float[Tensor, "samples verbs"],
    second: Float[Tensor, "samples nouns"],
    labels: Int[Tensor, "samples 2"],
) -> Int[Tensor, " samples"]:
    """Return the rank of the true pair among all pairs by product of probabilities, as EPIC-KITCHENS ranks actions."""
    ranks = []
    for start in range(0, len(labels), _JOINT_CHUNK):
        part = slice(start, start + _JOINT_CHUNK)
        pairs = (first[part].unsqueeze(2) * second[part].unsqueeze(1)).flatten(1)
        ranks.append(label_ranks(pairs, labels[part, 0] * second.shape[1] + labels[part, 1]))
    return torch.cat(ranks)


def evaluation_metrics(probabilities: Mapping[str, Tensor], labels: Int[Tensor, "samples targets"]) -> dict[str, float]:
    """Return all metrics of a set as fractions of 1; column i of `labels` belongs to the i-th entry of `probabilities`.

    One target: ``top1``, ``top5``, ``mean_class``. Several: the same with the target's name before. With verb and
    noun also ``action_top1`` (both right), ``action_top5`` (both among their own five) and
    ``action_joint_top1/5`` (ranking of pairs by product).
    """
    metrics: dict[str, float] = {}
    for column, (name, values) in enumerate(probabilities.items()):
        prefix = f"{name}_" if len(probabilities) > 1 else ""
        own = labels[:, column]
        metrics[f"{prefix}top1"] = _share(top_k_hits(values, own, 1))
        metrics[f"{prefix}top5"] = _share(top_k_hits(values, own, 5))
        metrics[f"{prefix}mean_class"] = mean_class_accuracy(values, own)
    if {VERB, NOUN} <= probabilities.keys():
        metrics |= _action_metrics(probabilities, labels)
    return metrics


def main_metric(targets: Sequence[str]) -> str:
    """Return the name of the metric that stands for a run: ``top1``, ``action_top1``, or the first target's."""
    if len(targets) == 1:
        return "top1"
    return "action_top1" if {VERB, NOUN} <= set(targets) else f"{targets[0]}_top1"


def _action_metrics(probabilities: Mapping[str, Tensor], labels: Tensor) -> dict[str, float]:
    names = list(probabilities)
    both = labels[:, [names.index(VERB), names.index(NOUN)]]
    verb, noun = probabilities[VERB], probabilities[NOUN]
    finite = verb.isfinite().all(dim=1) & noun.isfinite().all(dim=1)
    joint = joint_label_ranks(verb, noun, both)
    return {
        "action_top1": _share(top_k_hits(verb, both[:, 0], 1) & top_k_hits(noun, both[:, 1], 1)),
        "action_top5": _share(top_k_hits(verb, both[:, 0], 5) & top_k_hits(noun, both[:, 1], 5)),
        "action_joint_top1": _share((joint < 1) & finite),
        "action_joint_top5": _share((joint < 5) & finite),
    }


def _share(hits: Tensor) -> float:
    return int(hits.sum()) / len(hits)
