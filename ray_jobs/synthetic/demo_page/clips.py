"""Test clips to look at: stills over time, the sound beneath them, and what each model answered."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ray_jobs.pages.clip_pictures import Pictures, read_pictures
from ray_jobs.synthetic.demo_page.answers import Answers, Factors
from sharding.shard_set import read_shard_set


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A factor of an answer."""

    label: str
    is_right: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One model's answer about one clip."""

    model: str
    parts: list[Part]
    confidence: float
    is_right: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleClip:
    """One clip of the page."""

    key: str
    truth: tuple[str, ...]
    """The true class of each factor."""
    answers: list[Answer]
    alike: int
    """Clips of the test set, this one included, on which the same models were right."""
    pictures: Pictures


def choose_clips(answers: Sequence[Answers], *, most: int = 6) -> list[tuple[int, int]]:
    """(sample, how many are alike) of up to `most` clips.

    One of every pattern of right and wrong models, the commonest first; then a second of each, and so on.
    """
    patterns = [tuple(column) for column in np.stack([one.is_right for one in answers], axis=1).tolist()]
    counts = Counter(patterns)
    samples = {
        pattern: [i for i, found in enumerate(patterns) if found == pattern] for pattern, _ in counts.most_common()
    }
    turns = max(counts.values())
    ordered = [(group[turn], len(group)) for turn in range(turns) for group in samples.values() if turn < len(group)]
    return ordered[:most]


def sample_clips(answers: Sequence[Answers], factors: Factors, shards: Path, *, most: int = 6) -> list[SampleClip]:
    """Up to `most` clips of the test set in `shards` with every model's answer.

    Raises:
        DataDamageError: the shards are not what was written.
    """
    chosen = choose_clips(answers, most=most)
    keys = answers[0].keys
    pictures = read_pictures(read_shard_set(shards), [keys[sample] for sample, _ in chosen])
    return [
        SampleClip(
            key=keys[sample],
            truth=factors.labels(int(answers[0].labels[sample])),
            answers=[_answer(one, factors, sample) for one in answers],
            alike=alike,
            pictures=shown,
        )
        for (sample, alike), shown in zip(chosen, pictures, strict=True)
    ]


def _answer(answers: Answers, factors: Factors, sample: int) -> Answer:
    right = answers.right_parts(factors)[sample].tolist()
    labels = factors.labels(int(answers.chosen[sample]))
    return Answer(
        model=answers.model,
        parts=[Part(label=label, is_right=is_right) for label, is_right in zip(labels, right, strict=True)],
        confidence=float(answers.confidence[sample]),
        is_right=all(right),
    )
