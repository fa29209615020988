"""What a benchmark reads: drawn files and the shards made of them, or somebody's own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ca2st.errors import UserInputError
from sharding.conversion import ConversionConfig
from sharding.datasets.media_root import VIDEO_SUFFIXES
from sharding.manifest import LabelSpace
from sharding.source import SourceList, SourceSample

Convert = Callable[[SourceList, Path, ConversionConfig], object]


@dataclass(frozen=True, slots=True)
class BenchSources:
    """Shards, and the original files that the baseline reads."""

    shards: Path
    files: tuple[Path, ...]


def source_list(files: Sequence[Path]) -> SourceList:
    """Whole files as samples of two classes, taking turns."""
    return SourceList(
        dataset="benchmark",
        split="train",
        label_spaces=(LabelSpace(name="label", classes=("even", "odd")),),
        targets=("label",),
        samples=tuple(
            SourceSample(
                sample_id=file.name,
                path=file,
                start_seconds=None,
                end_seconds=None,
                labels=(number % 2,),
                where=f"{file}:1",
            )
            for number, file in enumerate(files)
        ),
    )


def video_files(folder: Path) -> tuple[Path, ...]:
    """Every video file under `folder`, sorted.

    Raises:
        UserInputError: there is none.
    """
    found = tuple(sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES))
    if not found:
        raise UserInputError(f"--media {folder}: expected video files, found none; name the folder of the originals")
    return found
