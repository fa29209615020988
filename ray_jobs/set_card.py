"""The card of a shard set: its facts in a few lines, and as one HTML file that asks nothing of any network."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ca2st import __version__
from ca2st.durable import write_bytes
from pipelines.storage.index import SetFacts
from ray_jobs.console import counted
from sharding.folder import read_rejects
from sharding.format.shard_set import Manifest, ShardSet
from sharding.source import DONE, SILENT_SOUND

if TYPE_CHECKING:  # the pages import torch: whoever asks for the facts alone does not wait for it
    from ray_jobs.pages.charts import StoredClip

NUM_CLIPS = 12
_MOST_CLASSES = 30
_NUM_BARS = 24
_MOST_EXAMPLES = 3
_KEPT = "kept as it is"
_CHANGES = {"orientation": "turned or mirrored by the display matrix", "pixel_aspect": "pixels that are not square"}
"""Of the changes in a sample's JSON those that no note counts, in words."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Quirk:
    """Something unusual that was found in the sources."""

    kind: str
    count: int
    done: str
    """What was done about it."""
    examples: tuple[str, ...]
    """Keys of samples, ids of rejected ones, or places in the annotations."""


def read_quirks(shard_set: ShardSet, *, most: int = 5000) -> tuple[list[Quirk], int]:
    """Return what was unusual, the commonest first, and how many samples were looked into for it.

    Notes and rejects are counted over the whole set. Examples of them, and what was turned or scaled, come from the
    JSON of the first `most` samples; of a remote set, those of its first shard.

    Raises:
        DataDamageError: a shard or an index cannot be read.
    """
    from ray_jobs.overlap import read_records

    manifest = shard_set.manifest
    most = min(most, shard_set.shards[0].num_samples) if shard_set.origin is not None else most
    keys: dict[str, list[str]] = {}
    num_read = 0
    with closing(read_records(shard_set)) as records:
        for _, _, key, record in islice(records, most):
            num_read += 1
            found = [*record.get("notes", []), *(name for name in _CHANGES if name in record.get("changes", {}))]
            for kind in found:
                keys.setdefault(kind, []).append(key)
    quirks = [
        Quirk(kind=kind, count=count, done=DONE.get(kind, _KEPT), examples=_examples(manifest.examples, keys, kind))
        for kind, count in manifest.notes.items()
    ]
    quirks += [
        Quirk(kind=words, count=len(keys[name]), done=DONE[name], examples=tuple(keys[name][:_MOST_EXAMPLES]))
        for name, words in _CHANGES.items()
        if name in keys
    ]
    rejects = read_rejects(shard_set.root)
    for reason, count in manifest.rejected.items():
        ids = tuple(one.sample_id for one in rejects if one.reason == reason)[:_MOST_EXAMPLES]
        quirks.append(Quirk(kind=f"rejected: {reason}", count=count, done="left out", examples=ids))
    return sorted(quirks, key=lambda quirk: -quirk.count), num_read


def _examples(of_list: Mapping[str, Sequence[str]], keys: Mapping[str, Sequence[str]], kind: str) -> tuple[str, ...]:
    return tuple([*of_list.get(kind, ()), *keys.get(kind, ())][:_MOST_EXAMPLES])


def write_set_card(shard_set: ShardSet, facts: SetFacts, file: Path) -> None:
    """Write the card to `file`.

    Raises:
        DataDamageError: the shards are not what was written.
    """
    from ray_jobs.pages.charts import read_spread_clips

    clips = read_spread_clips(shard_set, most=NUM_CLIPS)
    write_bytes(file, render_set_card(shard_set, facts, clips).encode())


def render_set_card(shard_set: ShardSet, facts: SetFacts, clips: "list[StoredClip]") -> str:
    """Return the whole page; raises as `read_quirks`."""
    from ray_jobs.pages.charts import page_environment

    quirks, num_read = read_quirks(shard_set)
    environment = page_environment()
    environment.filters["size"] = size_in_words
    manifest = shard_set.manifest
    return environment.get_template("set_card.html").render(
        version=__version__,
        manifest=manifest,
        facts=facts,
        tables=[class_table(name, counts, targets=facts.targets) for name, counts in facts.classes.items()],
        durations=duration_bars(facts.durations),
        quirks=quirks,
        num_read=num_read,
        clips=[(clip, _names(manifest, clip.labels)) for clip in clips],
    )


def _names(manifest: Manifest, labels: Sequence[int]) -> list[str]:
    """Return the classes of a clip."""
    spaces = manifest.label_spaces
    several = spaces[:1] * len(labels) if manifest.labelling == "several" else spaces[: len(labels)]
    return [space.classes[label] for space, label in zip(several, labels, strict=True)] or ["no label"]


def class_table(space: str, counts: Mapping[str, int], *, targets: tuple[str, ...]) -> ClassTable:
    """Return the classes of a label space by number of samples, the commonest first, at most some dozens shown."""
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
    """Return how many samples last how long, in even steps from the shortest to the longest."""
    low, high = min(durations), max(durations)
    counts, edges = np.histogram(
        durations, bins=_NUM_BARS if high > low else 1, range=(low, high if high > low else low + 1)
    )
    return [
        DurationBar(start=float(start), end=float(end), count=int(count), share=float(count / counts.max()))
        for count, start, end in zip(counts, edges[:-1], edges[1:], strict=True)
    ]


def size_in_words(num_bytes: float) -> str:
    """Return ``1.2 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def facts_in_words(facts: SetFacts) -> dict[str, object]:
    """Return a line per fact, for people."""
    seconds, frames = facts.duration_seconds, facts.num_frames
    words: dict[str, object] = {
        "dataset": f"{facts.dataset}, {facts.split}",
        "samples": f"{facts.num_samples} in {_counted_shards(facts)}, {size_in_words(facts.shard_bytes)}",
        "seconds": f"{seconds.least:.2f} to {seconds.most:.2f}, median {seconds.median:.2f}; all: {seconds.total:.0f}",
        "frames": f"{frames.least:.0f} to {frames.most:.0f}, {facts.frames_per_second.median:.2f} per second",
        "codec": f"{facts.codec}, {size_in_words(facts.video_bytes.mean)} per video",
        "with sound": f"{facts.num_with_audio} of {facts.num_samples}{_silent(facts)}",
        "rejected": counted(facts.rejected),
        "notes": counted(facts.notes),
    }
    if facts.labelling != "one":
        labels = facts.labels_per_sample
        most = f"{labels.least:.0f} to {labels.most:.0f} a sample, mean {labels.mean:.2f}"
        words["labels"] = most if facts.labelling == "several" else "none: a set to predict on"
    for space, counts in facts.classes.items():
        sizes = sorted(counts.values())
        target = " (target)" if space in facts.targets else ""
        empty = sum(not size for size in sizes)
        words[f"{space}{target}"] = f"{len(sizes)} classes of {sizes[0]} to {sizes[-1]} samples, {empty} without any"
    return words


def _silent(facts: SetFacts) -> str:
    count = facts.notes.get(SILENT_SOUND, 0)
    return f", {count} with silence alone" if count else ""


def _counted_shards(facts: SetFacts) -> str:
    return f"{facts.num_shards} shard{'s' if facts.num_shards > 1 else ''}"
