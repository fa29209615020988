"""Metrics of evaluation as pure functions of probabilities and labels. Source: the paper's evaluation protocol.

Ties are broken towards the lower class index everywhere, so a constant prediction scores no better than chance.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

VERB, NOUN = "verb", "noun"
_JOINT_CHUNK = 256


def mean_over_views(
    probabilities: Float[Tensor, "views classes"], sample_of_view: Int[Tensor, " views"], *, num_samples: int
) -> Float[Tensor, "samples classes"]:
    """Mean of the softmax of each sample's views, in float64; samples without a view are NaN."""
    wide = probabilities.double()
    sums = wide.new_zeros(num_samples, wide.shape[1]).index_add_(0, sample_of_view, wide)
    counts = torch.bincount(sample_of_view, minlength=num_samples)
    return sums / counts.unsqueeze(1)


def label_ranks(
    probabilities: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]
) -> Int[Tensor, " samples"]:
    """How many classes stand before the label in each sample's ranking; 0 is first."""
    own = probabilities.gather(1, labels.unsqueeze(1))
    before = torch.arange(probabilities.shape[1], device=labels.device) < labels.unsqueeze(1)
    return ((probabilities > own) | ((probabilities == own) & before)).sum(dim=1)


def top_k_hits(
    probabilities: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"], k: int
) -> Bool[Tensor, " samples"]:
    """Whether the label is among the k most probable classes; NaN probabilities never hit."""
    finite = probabilities.isfinite().all(dim=1)
    return (label_ranks(probabilities, labels) < k) & finite


def per_class_accuracy(
    probabilities: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]
) -> Float[Tensor, " classes"]:
    """Top-1 accuracy of the samples of each class; NaN for a class without samples."""
    num_classes = probabilities.shape[1]
    hits = top_k_hits(probabilities, labels, 1).double()
    right = hits.new_zeros(num_classes).index_add_(0, labels, hits)
    return right / torch.bincount(labels, minlength=num_classes)


def mean_class_accuracy(probabilities: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]) -> float:
    """Mean of the per-class accuracies over the classes that have samples."""
    return float(per_class_accuracy(probabilities, labels).nanmean())


def confusion_matrix(
    probabilities: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]
) -> Int[Tensor, "classes classes"]:
    """Counts of (label, predicted class)."""
    num_classes = probabilities.shape[1]
    cells = labels * num_classes + probabilities.argmax(dim=1)
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean across data sets; 0 when any value is 0."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def joint_label_ranks(
    first: Float[Tensor, "samples verbs"],
    second: Float[Tensor, "samples nouns"],
    labels: Int[Tensor, "samples 2"],
) -> Int[Tensor, " samples"]:
    """Rank of the true pair among all pairs by product of probabilities: EPIC-KITCHENS' official action ranking."""
    ranks = []
    for start in range(0, len(labels), _JOINT_CHUNK):
        part = slice(start, start + _JOINT_CHUNK)
        pairs = (first[part].unsqueeze(2) * second[part].unsqueeze(1)).flatten(1)
        ranks.append(label_ranks(pairs, labels[part, 0] * second.shape[1] + labels[part, 1]))
    return torch.cat(ranks)


def evaluation_metrics(probabilities: Mapping[str, Tensor], labels: Int[Tensor, "samples targets"]) -> dict[str, float]:
    """All metrics of a set as fractions of 1; column i of `labels` belongs to the i-th entry of `probabilities`.

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
    """Name of the metric that stands for a run: ``top1``, ``action_top1``, or the first target's."""
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
