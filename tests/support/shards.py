"""Small source lists and shard sets for tests."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sharding.conversion import ConversionReport, convert
from sharding.folder import SOURCES_NAME
from sharding.format.shard_set import LabelSpace
from sharding.settings import ConversionConfig
from sharding.source import SourceList, SourceSample
from support.media import Sound, make_clip

COUNT = 5
"""Clips of `Reference`."""
SPACE = LabelSpace(name="label", classes=("dot", "dash"))


def sample(
    path: Path, *, name: str = "", start: float | None = None, end: float | None = None, label: int = 0
) -> SourceSample:
    """A source sample for a clip."""
    return SourceSample(
        sample_id=name or path.stem,
        path=path,
        start_seconds=start,
        end_seconds=end,
        labels=(label,),
        where=f"list.csv:{path.stem}",
    )


def source_list(samples: Sequence[SourceSample]) -> SourceList:
    """A list of samples of one label space."""
    return SourceList(dataset="tests", split="train", label_spaces=(SPACE,), targets=("label",), samples=tuple(samples))


def small_clips(folder: Path, count: int, *, sound: Sound | None = None, **options: Any) -> SourceList:
    """`count` clips of four frames, each different in length by a frame."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = []
    for number in range(count):
        path = folder / f"clip_{number}.mp4"
        make_clip(path, seconds=(3 + number % 3) / 30, sound=sound, **({"size": (32, 32)} | options))
        clips.append(sample(path, label=number % 2))
    return source_list(clips)


TWO_CLIPS = 8_400_000
"""Bytes that are forecast for two silent clips of unknown length, 10 s each."""


def small_config(**options: Any) -> ConversionConfig:
    """Silent, two clips in a shard."""
    return ConversionConfig(**({"audio_policy": "none", "shard_bytes": TWO_CLIPS, "workers": 1} | options))


def small_set(root: Path, media: Path, *, count: int = 5, **options: Any) -> tuple[SourceList, ConversionReport]:
    """A converted set of `count` small clips in two or more shards."""
    source = small_clips(media, count)
    return source, convert(source, root, small_config(**options))


def file_hashes(root: Path) -> dict[str, str]:
    """sha256 of every file of a set by name; not of what is kept about the times of its sources."""
    files = sorted(path for path in root.iterdir() if path.name != SOURCES_NAME)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Reference:
    """Five small clips and their undisturbed conversion into three shards."""

    def __init__(self, folder: Path) -> None:
        self.media, self.root = folder / "media", folder / "out"
        self.source, self.report = small_set(self.root, self.media, count=COUNT)
        self.hashes = file_hashes(self.root)
