"""The card of a shard set: its facts in a few lines, and as one HTML file that asks nothing of any network."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ca2st import __version__
from pipelines.storage.index import SetFacts
from ray_jobs.console import counted
from sharding.folder import read_rejects
from sharding.format.shard_set import Manifest, ShardSet
from sharding.source import DONE, SILENT_SOUND

_NUM_CLIPS = 12
_MOST_CLASSES = 30
_NUM_BARS = 24
_MOST_EXAMPLES = 3
_CHANGES = {"orientation": "turned or mirrored by the display matrix", "pixel_aspect": "pixels that are not square"}
"""Of the changes in a sample's JSON those that no note counts, in words."""


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
        for key, record in islice(records, most):
            num_read += 1
            found = [*record.get("notes", []), *(name for name in _CHANGES if name in record.get("changes", {}))]
            for kind in found:
                keys.setdefault(kind, []).append(key)
    found_kinds = [
        (kind, count, DONE.get(kind, "kept as it is"), [*manifest.examples.get(kind, ()), *keys.get(kind, ())])
        for kind, count in manifest.notes.items()
    ]
    found_kinds += [
        (words, len(keys[name]), DONE[name], keys[name]) for name, words in _CHANGES.items() if name in keys
    ]
    rejects = read_rejects(shard_set.root)
    for reason, count in manifest.rejected.items():
        ids = [one.sample_id for one in rejects if one.reason == reason]
        found_kinds.append((f"rejected: {reason}", count, "left out", ids))
    quirks = [
        Quirk(kind=kind, count=count, done=done, examples=tuple(examples[:_MOST_EXAMPLES]))
        for kind, count, done, examples in sorted(found_kinds, key=lambda one: -one[1])
    ]
    return quirks, num_read


def render_set_card(shard_set: ShardSet, facts: SetFacts) -> str:
    """Return the whole page.

    Raises:
        DataDamageError: the shards are not what was written.
    """
    from ray_jobs.pages.charts import page_environment, read_spread_clips  # torch: not where the facts are enough

    clips = read_spread_clips(shard_set, most=_NUM_CLIPS)
    quirks, num_read = read_quirks(shard_set)
    environment = page_environment()
    environment.filters["size"] = size_in_words
    manifest = shard_set.manifest
    return environment.get_template("set_card.html").render(
        version=__version__,
        manifest=manifest,
        facts=facts,
        tables=[(space, counts, *class_ends(counts)) for space, counts in facts.classes.items()],
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


def class_ends(counts: Mapping[str, int]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Return the commonest and the rarest classes with their samples, the rarest last; of few classes, all and none."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    if len(ordered) <= _MOST_CLASSES:
        return ordered, []
    return ordered[: _MOST_CLASSES // 2], ordered[-(_MOST_CLASSES // 2) :]


def duration_bars(durations: tuple[float, ...]) -> list[tuple[float, float, int]]:
    """Return (from, to, samples that last so long), in even steps of seconds from the shortest to the longest."""
    low, high = min(durations), max(durations)
    counts, edges = np.histogram(
        durations, bins=_NUM_BARS if high > low else 1, range=(low, high if high > low else low + 1)
    )
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True))


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
    silent = facts.notes.get(SILENT_SOUND, 0)
    shards = f"{facts.num_shards} shard{'s' if facts.num_shards > 1 else ''}"
    words: dict[str, object] = {
        "dataset": f"{facts.dataset}, {facts.split}",
        "samples": f"{facts.num_samples} in {shards}, {size_in_words(facts.shard_bytes)}",
        "seconds": f"{seconds.least:.2f} to {seconds.most:.2f}, median {seconds.median:.2f}; all: {seconds.total:.0f}",
        "frames": f"{frames.least:.0f} to {frames.most:.0f}, {facts.frames_per_second.median:.2f} per second",
        "codec": f"{facts.codec}, {size_in_words(facts.video_bytes.mean)} per video",
        "with sound": f"{facts.num_with_audio} of {facts.num_samples}"
        + (f", {silent} with silence alone" if silent else ""),
        "rejected": counted(facts.rejected),
        "notes": counted(facts.notes),
    }
    if facts.labelling != "one":
        labels = facts.labels_per_sample
        most = f"{labels.least:.0f} to {labels.most:.0f} per sample, mean {labels.mean:.2f}"
        words["labels"] = most if facts.labelling == "several" else "none: a set to predict on"
    for space, counts in facts.classes.items():
        sizes = sorted(counts.values())
        target = " (target)" if space in facts.targets else ""
        empty = sum(not size for size in sizes)
        words[f"{space}{target}"] = f"{len(sizes)} classes of {sizes[0]} to {sizes[-1]} samples, {empty} without any"
    return words
