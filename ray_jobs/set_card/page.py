"""The card of a shard set as one HTML file that asks nothing of any network."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ca2st import __version__
from ca2st.durable import write_bytes
from pipelines.set_facts import SetFacts
from ray_jobs.pages.clip_pictures import StoredClip, read_spread_clips
from ray_jobs.pages.templates import page_environment
from sharding.shard_set import ShardSet

NUM_CLIPS = 12
_MOST_CLASSES = 30
_NUM_BARS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassBar:
    """Samples of a class."""

    name: str
    count: int
    share: float
    """Of the commonest class's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassTable:
    """A label space, its commonest and its rarest classes."""

    space: str
    is_target: bool
    num_classes: int
    num_empty: int
    commonest: list[ClassBar]
    rarest: list[ClassBar]
    """Of those that are not among the commonest, the rarest last."""
    num_hidden: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DurationBar:
    """Samples that last from `start` to `end` seconds."""

    start: float
    end: float
    count: int
    share: float
    """Of the highest bar."""


def write_set_card(shard_set: ShardSet, facts: SetFacts, file: Path) -> None:
    """Write the card to `file`.

    Raises:
        DataDamageError: the shards are not what was written.
    """
    clips = read_spread_clips(shard_set, most=NUM_CLIPS)
    write_bytes(file, render_set_card(shard_set, facts, clips).encode())


def render_set_card(shard_set: ShardSet, facts: SetFacts, clips: list[StoredClip]) -> str:
    """The whole page."""
    environment = page_environment("ray_jobs.set_card")
    environment.filters["size"] = size_in_words
    spaces = shard_set.manifest.label_spaces
    return environment.get_template("page.html").render(
        version=__version__,
        manifest=shard_set.manifest,
        facts=facts,
        tables=[class_table(name, counts, targets=facts.targets) for name, counts in facts.classes.items()],
        durations=duration_bars(facts.durations),
        clips=[
            (clip, [space.classes[label] for space, label in zip(spaces, clip.labels, strict=True)]) for clip in clips
        ],
    )


def class_table(space: str, counts: Mapping[str, int], *, targets: tuple[str, ...]) -> ClassTable:
    """Classes of a label space by number of samples, the commonest first, at most some dozens shown."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    most = max(ordered[0][1], 1)
    bars = [ClassBar(name=name, count=count, share=count / most) for name, count in ordered]
    split = len(bars) if len(bars) <= _MOST_CLASSES else _MOST_CLASSES // 2
    tail = [] if split == len(bars) else bars[-(_MOST_CLASSES // 2) :]
    return ClassTable(
        space=space,
        is_target=space in targets,
        num_classes=len(bars),
        num_empty=sum(not bar.count for bar in bars),
        commonest=bars[:split],
        rarest=tail,
        num_hidden=len(bars) - split - len(tail),
    )


def duration_bars(durations: tuple[float, ...]) -> list[DurationBar]:
    """How many samples last how long, in even steps from the shortest to the longest."""
    low, high = min(durations), max(durations)
    counts, edges = np.histogram(
        durations, bins=_NUM_BARS if high > low else 1, range=(low, high if high > low else low + 1)
    )
    return [
        DurationBar(start=float(start), end=float(end), count=int(count), share=float(count / counts.max()))
        for count, start, end in zip(counts, edges[:-1], edges[1:], strict=True)
    ]


def size_in_words(num_bytes: float) -> str:
    """``1.2 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
