"""Test clips to look at: stills over time, the sound beneath them, and what each model answered."""

import base64
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ca2st.spec import MEL_ROW_SECONDS
from pipelines.fetch import ByteFetcher, FetchedSample
from pipelines.shard_files import ShardFiles
from pipelines.shard_index import SampleEntry, ShardIndexCache
from pipelines.stats import StatsRecorder
from ray_jobs.demo_page.answers import Answers, Factors
from ray_jobs.pages.axes import Tick, hertz_ticks, seconds_ticks
from ray_jobs.pages.pictures import spectrogram_png
from sharding.index import TICKS_PER_SECOND
from sharding.manifest import ShardSet, read_shard_set

NUM_STILLS = 8
_INDEX_BYTES = 1 << 24


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
class Pictures:
    """What of a stored clip is shown."""

    stills: list[str]
    """Data URIs, in order."""
    still_seconds: list[float]
    spectrogram: str
    """Data URI, time to the right, low frequencies at the bottom."""
    seconds: list[Tick]
    hertz: list[Tick]


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


def read_pictures(shard_set: ShardSet, keys: Sequence[str]) -> list[Pictures]:
    """The stills, as they are stored, and the spectrogram of each named sample."""
    audio = shard_set.manifest.audio
    files = ShardFiles(shard_set)
    fetcher = ByteFetcher(files, StatsRecorder(), num_mel_bins=audio.num_mel_bins)
    try:
        found = []
        for entry in _entries(shard_set, keys):
            stills = [int((still + 0.5) * entry.num_frames / NUM_STILLS) for still in range(NUM_STILLS)]
            fetched = fetcher.fetch(entry, stills)
            found.append(_pictures(fetched, stills, sample_rate_hz=audio.sample_rate_hz))
        return found
    finally:
        files.close()


def _entries(shard_set: ShardSet, keys: Sequence[str]) -> list[SampleEntry]:
    indexes = ShardIndexCache(shard_set, most_bytes=_INDEX_BYTES)
    places = [(number, row) for number, shard in enumerate(shard_set.shards) for row in range(shard.num_samples)]
    place_of = dict(zip(indexes.sample_ids(), places, strict=True))
    return [indexes.entry(*place_of[key]) for key in keys]


def _pictures(sample: FetchedSample, stills: Sequence[int], *, sample_rate_hz: int) -> Pictures:
    mel = sample.mel.astype(np.float32)
    return Pictures(
        stills=[f"data:image/jpeg;base64,{base64.b64encode(sample.frames[still]).decode()}" for still in stills],
        still_seconds=[float(sample.entry.frame_ticks[still]) / TICKS_PER_SECOND for still in stills],
        spectrogram=spectrogram_png(mel, len(mel)),
        seconds=seconds_ticks(0.0, len(mel) * MEL_ROW_SECONDS),
        hertz=hertz_ticks(sample_rate_hz),
    )
