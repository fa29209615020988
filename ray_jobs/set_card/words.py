"""The facts of a shard set in a few lines of words."""

from pipelines.set_facts import SetFacts
from ray_jobs.console import counted
from ray_jobs.set_card.page import size_in_words
from sharding.notes import SILENT_SOUND


def facts_in_words(facts: SetFacts) -> dict[str, object]:
    """A line a fact, for people."""
    seconds, frames = facts.duration_seconds, facts.num_frames
    words: dict[str, object] = {
        "dataset": f"{facts.dataset}, {facts.split}",
        "samples": f"{facts.num_samples} in {_counted_shards(facts)}, {size_in_words(facts.shard_bytes)}",
        "seconds": f"{seconds.least:.2f} to {seconds.most:.2f}, median {seconds.median:.2f}; all: {seconds.total:.0f}",
        "frames": f"{frames.least:.0f} to {frames.most:.0f}, {facts.frames_per_second.median:.2f} a second",
        "codec": f"{facts.codec}, {size_in_words(facts.video_bytes.mean)} a video",
        "with sound": f"{facts.num_with_audio} of {facts.num_samples}{_silent(facts)}",
        "rejected": counted(facts.rejected),
        "notes": counted(facts.notes),
    }
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
