"""Whether two models differ by more than chance, from their predictions on the same samples.

McNemar's exact test asks of the samples that just one of the two has right whether they fall to both alike. The
bootstrap draws the samples again, with replacement, and gives the interval in which the difference of the accuracies
lies in 95 % of the draws.

Sources: McNemar (1947), the exact form by the binomial distribution; Efron's percentile bootstrap, paired.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ca2st.errors import UserInputError, listed
from ca2st.training.metrics import NOUN, VERB, label_ranks
from ray_jobs.evaluation.predictions import PredictionFacts, read_facts, read_rows

_MOST_DRAWS = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two models on one metric."""

    metric: str
    """``top1``, ``verb_top1``, ``noun_top1`` or ``action_top1``."""
    num_samples: int
    first: float
    """Accuracy of the first model."""
    second: float
    difference: float
    """Second minus first."""
    low: float
    """Lower end of the interval of the difference."""
    high: float
    only_first: int
    """Samples that only the first model has right."""
    only_second: int
    p_value: float
    """Of McNemar's exact test, two-sided: how likely so uneven a split is between models that are equally good."""


def compare_predictions(
    first: Path, second: Path, *, draws: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> list[Comparison]:
    """Compare two predictions files sample by sample, on every target and on the action of verb and noun.

    Raises:
        UserInputError: they have no labels, not the same samples, or other labels.
    """
    if not 1 <= draws <= _MOST_DRAWS or not 0 < confidence < 1 or seed < 0:
        raise UserInputError(
            f"expected 1 to {_MOST_DRAWS} draws, a confidence between 0 and 1 and a seed of 0 or more, found {draws}, "
            f"{confidence} and {seed}"
        )
    facts = [read_facts(path) for path in (first, second)]
    targets = [name for name in facts[0].labelled if name in facts[1].labelled]
    if not targets or any(one.several for one in facts):
        raise UserInputError(
            f"{first} and {second}: expected predictions of samples with a label each, of a target in common; found "
            f"{_labelled(facts[0])} and {_labelled(facts[1])}"
        )
    numbers = {name: {word: number for number, word in enumerate(facts[0].targets[name])} for name in targets}
    hits = [_hits(path, own, numbers) for path, own in zip((first, second), facts, strict=True)]
    places = _paired(hits, (first, second))
    return [
        compare_hits(
            right,
            hits[1].right[name][places],
            metric=f"{name}_top1" if len(hits[0].right) > 1 else "top1",
            draws=draws,
            confidence=confidence,
            seed=seed,
        )
        for name, right in hits[0].right.items()
    ]


def compare_hits(
    first: NDArray[np.bool_],
    second: NDArray[np.bool_],
    *,
    metric: str = "top1",
    draws: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare which of the same samples two models have right.

    Only four counts matter: a draw with replacement of all samples is a draw of these counts.
    """
    count = len(first)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    shares = np.array([only_first, only_second, count - only_first - only_second]) / count
    drawn = np.random.default_rng(seed).multinomial(count, shares, size=draws)
    differences = (drawn[:, 1] - drawn[:, 0]) / count
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Comparison(
        metric=metric,
        num_samples=count,
        first=int(first.sum()) / count,
        second=int(second.sum()) / count,
        difference=(only_second - only_first) / count,
        low=float(low),
        high=float(high),
        only_first=only_first,
        only_second=only_second,
        p_value=mcnemar_p_value(only_first, only_second),
    )


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Return how likely so uneven a split of the samples that differ is when both models are equally good, two-sided.

    The exact binomial test; logarithms keep any number of samples finite.
    """
    total, fewer = only_first + only_second, min(only_first, only_second)
    if total == 0:
        return 1.0
    whole, halves = math.lgamma(total + 1), total * math.log(2)
    logs = (whole - math.lgamma(k + 1) - math.lgamma(total - k + 1) - halves for k in range(fewer + 1))
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


class _Hits(NamedTuple):
    """Which samples of a file have a label and are right."""

    keys: NDArray[np.str_]
    labels: NDArray[np.int64]
    """`[samples, targets]`, by the first model's order of classes; -1: it has none of that name."""
    right: dict[str, NDArray[np.bool_]]
    """By target, and of the ``action`` where there are verb and noun."""


def _hits(path: Path, facts: PredictionFacts, numbers: Mapping[str, Mapping[str, int]]) -> _Hits:
    """`numbers`: of each target the classes by name, as the first model numbers them."""
    keys: list[str] = []
    targets = list(numbers)
    labels, hits = [], {name: [] for name in targets}  # type: ignore[var-annotated]  # lists of arrays
    maps = [np.array([numbers[name].get(word, -1) for word in facts.targets[name]]) for name in targets]
    for rows in read_rows(path, facts, targets=targets):
        own = rows.label_columns(targets)
        known: NDArray[np.bool_] = np.min(own, axis=1) >= 0
        keys += [key for key, keep in zip(rows.keys, known.tolist(), strict=True) if keep]
        labels.append(np.stack([numbered[own[known, column]] for column, numbered in enumerate(maps)], axis=1))
        for column, name in enumerate(targets):
            hits[name].append(label_ranks(rows.probabilities[name][known], own[known, column]) < 1)
    if not keys:
        raise UserInputError(f"{path}: expected samples with labels that the model knows, found none")
    right = {name: np.concatenate(parts) for name, parts in hits.items()}
    if {VERB, NOUN} <= right.keys():
        right["action"] = right[VERB] & right[NOUN]
    return _Hits(np.array(keys), np.concatenate(labels), right)


def _paired(hits: list[_Hits], paths: tuple[Path, Path]) -> NDArray[np.int64]:
    """Return the place in the second file of each sample of the first."""
    order = np.argsort(hits[1].keys)
    places: NDArray[np.int64] = order[
        np.searchsorted(hits[1].keys, hits[0].keys, sorter=order).clip(max=len(order) - 1)
    ]
    alone = [sorted(set(own.keys.tolist()) - set(other.keys.tolist())) for own, other in (hits, hits[::-1])]
    if any(alone):
        told = "; ".join(
            f"only in {path}: {listed(names, most=3)}" for path, names in zip(paths, alone, strict=True) if names
        )
        raise UserInputError(f"expected predictions of the same samples, found others: {told}; evaluate on one set")
    if not (hits[0].labels == hits[1].labels[places]).all():
        raise UserInputError(f"{paths[0]} and {paths[1]}: expected the same labels, found others; evaluate on one set")
    return places


def _labelled(facts: PredictionFacts) -> str:
    return "several labels" if facts.several else ", ".join(facts.labelled) or "none"
