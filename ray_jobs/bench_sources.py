"""Where ``ca2st bench loader`` and ``convert`` get their files: drawn, or somebody's own."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ca2st.cores import num_cores
from ca2st.errors import UserInputError
from pipelines.benchmark.drawn_clips import DrawnClips, draw_clips
from pipelines.benchmark.sources import BenchSources, source_list, video_files
from ray_jobs.console import progress
from ray_jobs.conversion import convert_shown
from sharding.conversion import ConversionConfig


@contextlib.contextmanager
def work_folder(work: Path | None) -> Iterator[Path]:
    """`work`, made where it is missing and kept, or a temporary folder."""
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="ca2st-bench-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def bench_sources(
    clips: int, *, codec: str, data: Path | None, media: Path | None, work: Path | None
) -> Iterator[BenchSources]:
    """Own shards with their originals, or files (drawn or own) and the shards made of them.

    Raises:
        UserInputError: shards without the folder of their originals, or a folder without videos.
    """
    if data is not None:
        if media is None:
            raise UserInputError("--data: expected --media too, the folder of the shards' originals for the baseline")
        yield BenchSources(data, video_files(media))
        return
    with work_folder(work) as folder:
        files = source_files(clips, media, folder)
        shards = folder / f"shards-{codec}-{len(files)}"
        convert_shown(
            source_list(files), shards, ConversionConfig(codec=codec, workers=num_cores(), audio_policy="optional")
        )
        yield BenchSources(shards, files)


def source_files(clips: int, media: Path | None, folder: Path) -> tuple[Path, ...]:
    """The video files of `media`, or `clips` drawn ones under `folder`.

    Raises:
        UserInputError: `media` holds no video.
    """
    if media is not None:
        return video_files(media)
    with progress("Drawing source files", clips) as update:
        return draw_clips(DrawnClips(count=clips), folder / "sources", update=lambda done: update(done, ""))
