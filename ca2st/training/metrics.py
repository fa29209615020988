"""Metrics as the field reports them: pure functions of scores and labels, in numpy.

Scores are probabilities or any numbers of which a larger one stands for a likelier class. All of it is exact: no
binning, no sampling. A score that is not a number is taken as the least likely of all.

Ties: in a ranking of classes the lower class index stands first, so a constant prediction is no better than chance.
In a ranking of samples (average precision, area under the curve) equal scores are one threshold, as in scikit-learn.
A class without samples counts in no mean over classes.

Sources: the evaluation code that EPIC-KITCHENS-100, EPIC-SOUNDS and VGG-Sound publish, and the paper's protocol.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from ca2st.batch import Labelling

VERB, NOUN, ACTION = "verb", "noun", "action"
NUM_JOINT = 100
"""EPIC-KITCHENS-100 ranks the pairs of so many likeliest verbs and nouns."""
_JOINT_CHUNK = 256


def label_ranks(
    scores: Float[np.ndarray, "samples classes"], labels: Int[np.ndarray, " samples"]
) -> Int[np.ndarray, " samples"]:
    """Return how many classes stand before the label in each sample's ranking; 0 is first.

    The rank of a sample with a score that is not a number is the number of classes: it is never right.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    ranks = ((scores > own) | ((scores == own) & before)).sum(axis=1)
    finite: NDArray[np.bool_] = np.isfinite(scores).all(axis=1)
    found: NDArray[np.int64] = np.where(finite, ranks, scores.shape[1])
    return found


def predicted_classes(scores: Float[np.ndarray, "samples classes"]) -> Int[np.ndarray, " samples"]:
    """Return the likeliest class of each sample, the lowest of equal ones; -1 where a score is not a number."""
    found: NDArray[np.int64] = np.where(np.isfinite(scores).all(axis=1), np.argmax(scores, axis=1), -1)
    return found


def confusion_matrix(
    labels: Int[np.ndarray, " samples"], predicted: Int[np.ndarray, " samples"], *, num_classes: int
) -> Int[np.ndarray, "classes classes"]:
    """Return counts with a row per true class and a column per predicted class; predictions of -1 are in no column."""
    known = predicted >= 0
    cells = labels[known].astype(np.int64) * num_classes + predicted[known]
    counts = np.bincount(cells, minlength=num_classes * num_classes)
    matrix: NDArray[np.int64] = counts.reshape(num_classes, num_classes)
    return matrix


def mean_over_classes(values: Float[np.ndarray, " classes"]) -> float:
    """Return the mean over the classes whose value is a number: macro over classes present; NaN of none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


@dataclass(frozen=True, slots=True)
class Ranking:
    """How well the scores of one class rank the samples."""

    average_precision: float
    """Sum over thresholds of precision times the recall gained; NaN without a positive sample."""
    area: float
    """Under the ROC curve: how often a positive stands before a negative; NaN without a positive or a negative."""


def class_ranking(scores: Float[np.ndarray, " samples"], positives: Bool[np.ndarray, " samples"]) -> Ranking:
    """Return how the scores of one class rank its positive samples among all.

    Source: scikit-learn's ``average_precision_score`` and ``roc_auc_score`` define both so.
    """
    num_positives = int(positives.sum())
    num_negatives = len(positives) - num_positives
    if num_positives == 0:
        return Ranking(math.nan, math.nan)
    true, false = _above_thresholds(scores, positives)
    gained, lost = np.diff(true, prepend=0), np.diff(false, prepend=0)
    precision = float((true / (true + false) * gained).sum() / num_positives)
    if num_negatives == 0:
        return Ranking(precision, math.nan)
    # A negative of a threshold is beaten by the positives before it, and ties with those of its own threshold.
    won = ((true - gained) * lost).sum() + 0.5 * (gained * lost).sum()
    return Ranking(precision, float(won / (num_positives * num_negatives)))


def interpolated_precision(scores: Float[np.ndarray, " samples"], positives: Bool[np.ndarray, " samples"]) -> float:
    """Return the average precision in which each recall has the best precision of it or any higher one.

    NaN without a positive sample. Source: PASCAL VOC since 2010; ActivityNet's owners measure so.
    """
    num_positives = int(positives.sum())
    if num_positives == 0:
        return math.nan
    true, false = _above_thresholds(scores, positives)
    best = np.maximum.accumulate((true / (true + false))[::-1])[::-1]
    return float((best * np.diff(true, prepend=0)).sum() / num_positives)


def _above_thresholds(
    scores: Float[np.ndarray, " samples"], positives: Bool[np.ndarray, " samples"]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return how many positive and negative samples stand at or above each threshold, the highest first."""
    wide = np.where(np.isfinite(scores), scores, -np.inf)
    order = np.argsort(-wide, kind="stable")
    ranked = wide[order]
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    true = np.cumsum(positives[order])[ends]
    return true, ends + 1 - true


def class_rankings(
    scores: Float[np.ndarray, "samples classes"],
    truth: Bool[np.ndarray, "samples classes"],
) -> list[Ranking]:
    """Return the ranking of each class; `truth` says which classes each sample has."""
    return [class_ranking(*columns) for columns in zip(scores.T, truth.T, strict=True)]


def ranking_metrics(rankings: Sequence[Ranking]) -> dict[str, float]:
    """Return ``map``, ``auc`` and ``d_prime``: the means over the classes present, and the separation of that area."""
    area = mean_over_classes(np.array([one.area for one in rankings]))
    precision = mean_over_classes(np.array([one.average_precision for one in rankings]))
    return {"map": precision, "auc": area, "d_prime": d_prime(area)}


def d_prime(area: float) -> float:
    """Return the separation of two normal distributions of variance 1 whose ROC curve has this area.

    sqrt(2) times the inverse of the normal distribution function; infinite for areas of 0 and 1.
    """
    if not 0 < area < 1:
        return math.nan if math.isnan(area) else math.copysign(math.inf, area - 0.5)
    return math.sqrt(2) * NormalDist().inv_cdf(area)


def joint_label_ranks(
    verb: Float[np.ndarray, "samples verbs"],
    noun: Float[np.ndarray, "samples nouns"],
    labels: Int[np.ndarray, "samples 2"],
) -> Int[np.ndarray, " samples"]:
    """Return the rank of the true action by P(verb) * P(noun), among the pairs of the best 100 verbs and nouns.

    A pair that is not among them has the rank of the number of all pairs. Columns of `labels`: verb, noun.

    Source: the evaluation of EPIC-KITCHENS-100's action recognition challenge.
    """
    num_verbs, num_nouns = verb.shape[1], noun.shape[1]
    ranks = [
        _joint_ranks(verb[part].astype(np.float64), noun[part].astype(np.float64), labels[part])
        for part in (slice(first, first + _JOINT_CHUNK) for first in range(0, len(labels), _JOINT_CHUNK))
    ]
    found = np.concatenate(ranks) if ranks else np.zeros(0, np.int64)
    finite = np.isfinite(verb).all(axis=1) & np.isfinite(noun).all(axis=1)
    return np.where(finite, found, num_verbs * num_nouns)


def _joint_ranks(verb: NDArray[np.float64], noun: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    best = [np.argsort(-scores, axis=1, kind="stable")[:, :NUM_JOINT] for scores in (verb, noun)]
    held = [np.take_along_axis(scores, one, axis=1) for scores, one in zip((verb, noun), best, strict=True)]
    products = (held[0][:, :, None] * held[1][:, None, :]).reshape(len(labels), -1)
    pairs = (best[0][:, :, None] * noun.shape[1] + best[1][:, None, :]).reshape(len(labels), -1)
    wanted = labels[:, :1] * noun.shape[1] + labels[:, 1:]
    own = np.where(pairs == wanted, products, -np.inf).max(axis=1, keepdims=True)
    before = (products > own) | ((products == own) & (pairs < wanted))
    ranks: NDArray[np.int64] = np.where(np.isfinite(own[:, 0]), before.sum(axis=1), verb.shape[1] * noun.shape[1])
    return ranks


def action_hits(
    verb: Float[np.ndarray, "samples verbs"],
    noun: Float[np.ndarray, "samples nouns"],
    labels: Int[np.ndarray, "samples 2"],
) -> dict[str, Bool[np.ndarray, " samples"]]:
    """Return which samples are right as actions, by rule; columns of `labels`: verb, noun.

    ``action_top1``: verb and noun both right. ``action_top5``: each among its own five (CAST's rule).
    ``action_joint_top1``, ``action_joint_top5``: by the ranking of pairs (the challenge's rule).
    """
    joint = joint_label_ranks(verb, noun, labels)
    own = [label_ranks(scores, labels[:, column]) for column, scores in enumerate((verb, noun))]
    return {
        "action_top1": (own[0] < 1) & (own[1] < 1),
        "action_top5": (own[0] < min(5, verb.shape[1])) & (own[1] < min(5, noun.shape[1])),
        "action_joint_top1": joint < 1,
        "action_joint_top5": joint < min(5, verb.shape[1] * noun.shape[1]),
    }


def harmonic_mean(values: Sequence[float]) -> float:
    """Return the harmonic mean across data sets; 0 when any value is 0."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


class MetricSums:
    """Counts from which the metrics of a set follow exactly, added up batch by batch and rank by rank.

    A sample that has no label of a target (-1), or a batch without labels, counts in none of the target's metrics.
    """

    def __init__(self, targets: Mapping[str, int]) -> None:
        """`targets`: classes of each target, in the order of the label columns."""
        self._targets = dict(targets)
        self.right = {name: np.zeros(size, np.int64) for name, size in targets.items()}
        """Samples of each class whose likeliest class is the right one."""
        self.counts = {name: np.zeros(size, np.int64) for name, size in targets.items()}
        """Samples of each class."""
        self.hits: dict[str, list[int]] = {}
        """By metric: samples that are right, and samples that could be."""

    def add(
        self,
        probabilities: Mapping[str, Float[np.ndarray, "samples _"]],
        labels: Int[np.ndarray, "samples columns"],
        *,
        labelling: Labelling = "one",
    ) -> None:
        """Count samples; column i of `labels` belongs to the i-th target.

        Of samples of several labels ``top1`` counts alone: whether the likeliest class is one of theirs.
        """
        names = list(self._targets)
        if labelling == "several":
            answered = predicted_classes(probabilities[names[0]])
            self._count("top1", (labels[np.arange(len(answered)), answered] > 0) & (answered >= 0))
        if labelling != "one":
            return
        for column, name in enumerate(names):
            known, values = labels[:, column] >= 0, probabilities[name]
            own = labels[known, column]
            ranks = label_ranks(values[known], own)
            self.right[name] += np.bincount(own[ranks < 1], minlength=len(self.right[name]))
            self.counts[name] += np.bincount(own, minlength=len(self.counts[name]))
            prefix = target_prefix(name, names)
            self._count(f"{prefix}top1", ranks < 1)
            self._count(f"{prefix}top5", ranks < min(5, values.shape[1]))
        if {VERB, NOUN} <= set(names):
            both = labels[:, [names.index(VERB), names.index(NOUN)]]
            known = (both[:, 0] >= 0) & (both[:, 1] >= 0)
            for rule, hits in action_hits(probabilities[VERB][known], probabilities[NOUN][known], both[known]).items():
                self._count(rule, hits)

    def _count(self, metric: str, hits: Bool[np.ndarray, " samples"]) -> None:
        own = self.hits.setdefault(metric, [0, 0])
        own[0] += int(hits.sum())
        own[1] += len(hits)

    @classmethod
    def total(cls, parts: Sequence["MetricSums"]) -> "MetricSums":
        """Return the counts of all parts together."""
        whole = cls(parts[0]._targets)
        for part in parts:
            for name in whole._targets:
                whole.right[name] += part.right[name]
                whole.counts[name] += part.counts[name]
            for metric, (right, count) in part.hits.items():
                own = whole.hits.setdefault(metric, [0, 0])
                own[0], own[1] = own[0] + right, own[1] + count
        return whole

    def metrics(self) -> dict[str, float]:
        """Return the metrics as fractions of 1; none of a target of which no sample has a label.

        One target: ``top1``, ``top5``, ``mean_class``. Several: the same with the target's name before. With verb and
        noun also those of `action_hits`.
        """
        found = {metric: right / count for metric, (right, count) in self.hits.items() if count}
        for name in self._targets:
            if self.counts[name].any():
                present = self.counts[name] > 0
                accuracies = self.right[name][present] / self.counts[name][present]
                found[f"{target_prefix(name, tuple(self._targets))}mean_class"] = mean_over_classes(accuracies)
        return found


def evaluation_metrics(
    probabilities: Mapping[str, Float[np.ndarray, "samples _"]], labels: Int[np.ndarray, "samples targets"]
) -> dict[str, float]:
    """Return the metrics of a set: see `MetricSums.metrics`; column i of `labels` is of the i-th of `probabilities`."""
    sums = MetricSums({name: values.shape[1] for name, values in probabilities.items()})
    sums.add(probabilities, labels)
    return sums.metrics()


def metric_names(targets: Sequence[str]) -> list[str]:
    """Return the names of the metrics that a validation of these targets has, of one label each."""
    even = {name: np.full((1, 2), 0.5) for name in targets}
    return sorted(evaluation_metrics(even, np.zeros((1, len(targets)), np.int64)))


def target_prefix(target: str, targets: Sequence[str]) -> str:
    """Return what stands before the names of a target's metrics: nothing where it is the only one."""
    return f"{target}_" if len(targets) > 1 else ""


def main_metric(targets: Sequence[str], *, labelling: Labelling = "one") -> str:
    """Return the name of the metric that stands for a run: ``top1``, ``action_top1``, or the first target's.

    Of several labels per sample it is ``map``: the likeliest class alone says little there.
    """
    if labelling == "several":
        return "map"
    if len(targets) == 1:
        return "top1"
    return "action_top1" if {VERB, NOUN} <= set(targets) else f"{targets[0]}_top1"
