"""Predictions files made of random numbers, written as `ca2st evaluate` writes them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ca2st.training.evaluate import Scored
from ray_jobs.evaluation.predictions import ExpectedKeys, PredictionFacts, join_parts, writing_part
from sharding.format.index import sample_key


def random_probabilities(count: int, size: int, *, seed: int) -> np.ndarray:
    drawn = np.exp(2 * np.random.default_rng(seed).normal(size=(count, size)))
    return (drawn / drawn.sum(axis=1, keepdims=True)).astype(np.float32)


def scored_of(keys: Sequence[str], labels: np.ndarray, probabilities: Mapping[str, np.ndarray]) -> Scored:
    return Scored(
        sample_ids=tuple(keys),
        num_views=np.ones(len(keys), np.int64),
        labels=labels,
        probabilities=probabilities,
        has_audio=np.ones(len(keys), np.bool_),
    )


def write_predictions(
    path: Path,
    labels: np.ndarray,
    probabilities: Mapping[str, np.ndarray],
    *,
    ids: Sequence[str] | None = None,
    classes: Mapping[str, list[str]] | None = None,
    labelled: bool = True,
    **facts: Any,
) -> PredictionFacts:
    """One part, joined: `labels` has a column per target; `ids`: the owners'."""
    count = len(next(iter(probabilities.values())))
    keys = [sample_key(name) for name in ids or [f"clip {number}" for number in range(count)]]
    names = {name: [f"{name} {index}" for index in range(values.shape[1])] for name, values in probabilities.items()}
    about = PredictionFacts(
        targets={**names, **(classes or {})},
        labelled=tuple(probabilities) if labelled else (),
        num_samples=count,
        **facts,
    )
    part = path.with_suffix(".part")
    with writing_part(part, about) as add:
        for first in range(0, count, 100):
            some = slice(first, first + 100)
            add(scored_of(keys[some], labels[some], {name: values[some] for name, values in probabilities.items()}))
    join_parts([part], path, about, ExpectedKeys(lambda: keys, count), num_views=1)
    return about
