"""``ca2st shard build|verify``."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sharding.conversion import ConversionConfig
    from sharding.convert import ConversionReport
    from sharding.source import SourceList

app = typer.Typer(no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")]


class AudioPolicy(StrEnum):
    """What happens to clips without an audio track."""

    REQUIRED = "required"
    OPTIONAL = "optional"
    NONE = "none"


@app.command(epilog="Example: ca2st shard build --dataset folder --media videos --split train --out shards/train")
def build(  # noqa: PLR0913, RUF100  # the options are the contract
    dataset: Annotated[str, typer.Option(help="folder, csv, epic_sounds or synthetic.")],
    split: Annotated[str, typer.Option(help="Name of the split: train, validation, test.")] = "train",
    annotations: Annotated[
        Path | None, typer.Option(help="The dataset's annotation file, as its owners publish it.")
    ] = None,
    media: Annotated[Path | None, typer.Option(help="Folder with the media files.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the shards; rerun with the same one to resume.")] = None,
    codec: Annotated[str, typer.Option(help="mjpeg: a JPEG a frame, readable by byte ranges.")] = "mjpeg",
    short_side: Annotated[int, typer.Option(help="Pixels of the shorter side; smaller sources keep their size.")] = 256,
    frames_per_second: Annotated[float | None, typer.Option(help="Thin to this rate; default: every frame.")] = None,
    sample_rate: Annotated[int, typer.Option(help="Audio sample rate in Hz before the filter bank.")] = 16_000,
    workers: Annotated[int | None, typer.Option(help="Decoding processes; default: the machine's cores.")] = None,
    shard_size: Annotated[str, typer.Option(help="Size of a shard, as 1GB or 256MB.")] = "1GB",
    audio: Annotated[
        AudioPolicy, typer.Option(help="Clips without sound: reject, keep, or no audio at all.")
    ] = AudioPolicy.REQUIRED,
    max_rejects: Annotated[str, typer.Option(help="Samples that may be rejected: a number or a share like 2%.")] = "0",
    limit: Annotated[int | None, typer.Option(help="Only the first N samples.")] = None,
    classes: Annotated[Path | None, typer.Option(help="csv: class names in label order, one a line.")] = None,
    task: Annotated[str | None, typer.Option(help="synthetic: space, time, audio, holistic or binding.")] = None,
    num_samples: Annotated[int | None, typer.Option(help="synthetic: how many clips.")] = None,
    seed: Annotated[int, typer.Option(help="synthetic: seed of the world.")] = 0,
    difficulty: Annotated[str, typer.Option(help="synthetic: easy, medium or hard.")] = "easy",
    frame_size: Annotated[int | None, typer.Option(help="synthetic: width and height in pixels; default 64.")] = None,
    frame_rate: Annotated[int | None, typer.Option(help="synthetic: frames a second it draws; default 16.")] = None,
    min_frames: Annotated[int | None, typer.Option(help="synthetic: frames of the shortest clip; default 16.")] = None,
    max_frames: Annotated[int | None, typer.Option(help="synthetic: frames of the longest clip; default 21.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the annotations only; print the expected storage.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Convert one split of a dataset into shards; rerun the same command to resume."""
    from ca2st.errors import UserInputError
    from ray_jobs.environment import num_cores
    from ray_jobs.sizes import parse_bytes
    from sharding.conversion import ConversionConfig, RejectBudget
    from sharding.datasets import DatasetRequest, SyntheticConfig, read_dataset

    sizes = {
        "num_samples": num_samples,
        "frame_size": frame_size,
        "frames_per_second": frame_rate,
        "min_frames": min_frames,
        "max_frames": max_frames,
    }
    given: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    synthetic = SyntheticConfig(seed=seed, difficulty=difficulty, **given)
    config = ConversionConfig(
        codec=codec,
        short_side=short_side,
        frames_per_second=frames_per_second,
        sample_rate_hz=sample_rate,
        workers=workers or num_cores(),
        shard_bytes=parse_bytes(shard_size),
        audio_policy=audio.value,
        max_rejects=RejectBudget.parse(max_rejects),
    )
    if out is None and not dry_run:
        raise UserInputError("--out: required unless --dry-run is given; name a folder for the shards")
    source = read_dataset(
        dataset,
        DatasetRequest(
            annotations=annotations,
            media=media,
            split=split,
            limit=limit,
            check_media=not dry_run,
            classes=classes,
            task=task,
            synthetic=synthetic,
        ),
    )
    if dry_run:
        _print_plan(source, config, as_json=as_json)
        return
    assert out is not None
    _print_report(_convert(source, out, config), as_json=as_json)


def _convert(source: "SourceList", out: Path, config: "ConversionConfig") -> "ConversionReport":
    from ray_jobs.conversion import convert_shown
    from ray_jobs.environment import fault_points

    return convert_shown(source, out, config, faults=fault_points())


def _print_plan(source: "SourceList", config: "ConversionConfig", *, as_json: bool) -> None:
    from ray_jobs.console import counted, print_json, result, table
    from sharding.conversion import estimate_storage
    from sharding.datasets.label_spaces import label_histogram

    estimate = estimate_storage(source, config)
    facts: dict[str, object] = {
        "dataset": source.dataset,
        "split": source.split,
        "manifest": None,
        "num_samples": len(source.samples),
        "num_classes": _class_count(source.num_classes),
        "num_shards": estimate.num_shards,
        "estimated_bytes": estimate.total_bytes,
        "rejected": {},
        "clips_per_second": None,
    }
    histogram = label_histogram(source)
    if as_json:
        print_json(facts | {"samples_per_class": histogram})
        return
    empty = {space: sum(count == 0 for count in counts.values()) for space, counts in histogram.items()}
    facts["classes without samples"] = counted(empty)
    result(table({name: value for name, value in facts.items() if value is not None}))


def _print_report(report: "ConversionReport", *, as_json: bool) -> None:
    from ray_jobs.console import counted, print_json, result, table

    facts = {
        "manifest": str(report.manifest_path),
        "num_samples": report.num_samples,
        "num_classes": _class_count(report.num_classes),
        "num_shards": report.num_shards,
        "rejected": dict(report.rejected),
        "clips_per_second": round(report.clips_per_second, 2),
    }
    if as_json:
        print_json(facts)
        return
    result(table(facts | {"rejected": counted(report.rejected)}))


def _class_count(num_classes: Mapping[str, int]) -> int | dict[str, int]:
    """One number where one label is learned, a number a target otherwise."""
    return next(iter(num_classes.values())) if len(num_classes) == 1 else dict(num_classes)


@app.command(epilog="Example: ca2st shard verify shards/train")
def verify(
    shards: Annotated[Path, typer.Argument(help="Folder of a shard set.", metavar="DIR")],
    as_json: Json = False,
) -> None:
    """Check every byte against the manifest; ends with 3 and the names when something is damaged."""
    from ray_jobs.console import print_json, progress, result
    from sharding.verify import verify_shard_set

    with progress(f"Verifying {shards}", sum(1 for _ in shards.glob("*.tar"))) as update:
        problems = verify_shard_set(shards, progress=lambda done, _total: update(done, "shards"))
    if as_json:
        print_json({"ok": not problems, "problems": problems})
    else:
        for problem in problems:
            result(f"{problem.shard} {problem.key or '-'}: {problem.what}")
        if not problems:
            result(f"{shards}: every byte is what the manifest says")
    if problems:
        raise typer.Exit(3)
