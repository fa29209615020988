"""``ca2st shard build|verify|inspect``."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ray_jobs.commands.options import gop_frames, refuse_without_ray, synthetic_config

if TYPE_CHECKING:
    from pipelines.storage.index import SetFacts
    from sharding.conversion import ConversionReport
    from sharding.format.shard_set import ShardSet
    from sharding.settings import ConversionConfig
    from sharding.source import SourceList


app = typer.Typer(no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")]


class Clock(StrEnum):
    """Where the seconds of annotations count from."""

    FILE = "file"
    FIRST_FRAME = "first-frame"


class AudioPolicy(StrEnum):
    """What happens to clips without an audio track."""

    REQUIRED = "required"
    OPTIONAL = "optional"
    NONE = "none"


class HdrPolicy(StrEnum):
    """What happens to clips of a high dynamic range."""

    TONE_MAP = "tone-map"
    REFUSE = "refuse"


class InterlacedPolicy(StrEnum):
    """What happens to interlaced frames."""

    DEINTERLACE = "deinterlace"
    KEEP = "keep"


@app.command(epilog="Example: ca2st shard build --dataset folder --media videos --split train --out shards/train")
def build(  # noqa: PLR0913, RUF100  # the options are the contract
    dataset: Annotated[
        str,
        typer.Option(help="folder, csv, list, synthetic, or a published dataset: epic_kitchens_100, kinetics_400, ..."),
    ],
    split: Annotated[str, typer.Option(help="Name of the split: train, validation, test.")] = "train",
    annotations: Annotated[
        Path | None, typer.Option(help="The dataset's annotation file, as its owners publish it.")
    ] = None,
    media: Annotated[Path | None, typer.Option(help="Folder with the media files.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the shards; rerun with the same one to resume.")] = None,
    codec: Annotated[
        str, typer.Option(help="mjpeg: a JPEG a frame, for CPUs; h264, hevc: for GPUs; vp9: for GPUs, on CPUs by DALI.")
    ] = "mjpeg",
    quality: Annotated[
        int | None, typer.Option(help="Lower is better; default: mjpeg 5 (of 2..31), h264 20, hevc 23, vp9 30.")
    ] = None,
    gop: Annotated[
        int | None, typer.Option(help="h264, hevc, vp9: frames from one key frame to the next; default 8.")
    ] = None,
    short_side: Annotated[int, typer.Option(help="Pixels of the shorter side; smaller sources keep their size.")] = 256,
    frames_per_second: Annotated[float | None, typer.Option(help="Thin to this rate; default: every frame.")] = None,
    hdr: Annotated[
        HdrPolicy, typer.Option(help="PQ and HLG clips: convert to BT.709, or reject.")
    ] = HdrPolicy.TONE_MAP,
    interlaced: Annotated[
        InterlacedPolicy, typer.Option(help="Interlaced frames: deinterlace (yadif), or keep both fields as they are.")
    ] = InterlacedPolicy.DEINTERLACE,
    sample_rate: Annotated[int, typer.Option(help="Audio sample rate in Hz before the filter bank.")] = 16_000,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Decoding processes; default: the machine's cores, with --ray the cluster's."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Decode on a Ray cluster: auto, or host:port of its head.", metavar="ADDRESS"),
    ] = None,
    accept_open_ray: Annotated[
        bool, typer.Option("--i-accept-open-ray", help="Join a cluster that asks nobody for a token.")
    ] = False,
    shard_size: Annotated[str, typer.Option(help="Size of a shard, as 1GB or 256MB.")] = "1GB",
    audio: Annotated[
        AudioPolicy, typer.Option(help="Clips without sound, or of digital silence: reject, keep, or no audio at all.")
    ] = AudioPolicy.REQUIRED,
    clock: Annotated[
        Clock,
        typer.Option(
            help="What seconds of annotations count from: the start of the file, its earliest stream, as players and "
            "ffmpeg -ss do, or the first picture."
        ),
    ] = Clock.FILE,
    max_rejects: Annotated[str, typer.Option(help="Samples that may be rejected: a number or a share like 2%.")] = "0",
    max_missing: Annotated[
        str, typer.Option(help="Samples that may have no media file and are left out: a number or a share like 5%.")
    ] = "0",
    update: Annotated[
        bool,
        typer.Option("--update", help="In a finished set, convert again from the first shard whose sources changed."),
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Only the first N samples.")] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Refuse what questions the data and is only noted otherwise: labels that look alike or may be "
            "several, files left aside, clips shorter than annotated, silent sound, ...",
        ),
    ] = False,
    classes: Annotated[
        Path | None,
        typer.Option(help="csv, folder: class names in label order, one a line; some may have no samples."),
    ] = None,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="csv, folder: links may lead outside --media.")
    ] = False,
    task: Annotated[str | None, typer.Option(help="synthetic: space, time, audio, holistic or binding.")] = None,
    num_samples: Annotated[int | None, typer.Option(help="synthetic: how many clips.")] = None,
    seed: Annotated[int | None, typer.Option(help="synthetic: seed of the world; default 0.")] = None,
    difficulty: Annotated[str | None, typer.Option(help="synthetic: easy (default), medium or hard.")] = None,
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
    from ca2st.processes import num_cores
    from ray_jobs.console import parse_bytes, say
    from ray_jobs.conversion import print_plan, print_report
    from sharding.conversion import check_notes
    from sharding.datasets import DatasetRequest, read_dataset
    from sharding.settings import ConversionConfig, RejectBudget
    from sharding.source import note_lines

    refuse_without_ray(accept_open_ray=accept_open_ray, ray=ray is not None)
    world = {
        "num_samples": num_samples,
        "seed": seed,
        "difficulty": difficulty,
        "frame_size": frame_size,
        "frame_rate": frame_rate,
        "min_frames": min_frames,
        "max_frames": max_frames,
    }
    config = ConversionConfig(
        codec=codec,
        quality=quality,
        num_gop_frames=gop_frames(gop, codec=codec),
        short_side=short_side,
        frames_per_second=frames_per_second,
        hdr=hdr.value,
        interlaced=interlaced.value,
        sample_rate_hz=sample_rate,
        workers=workers or num_cores(),
        shard_bytes=parse_bytes(shard_size),
        audio_policy=audio.value,
        clock=clock.value,
        max_rejects=RejectBudget.parse(max_rejects),
        update=update,
        strict=strict,
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
            follow_links=follow_links,
            max_missing=RejectBudget.parse(max_missing, option="--max-missing"),
            task=task,
            synthetic=synthetic_config(world, dataset=dataset),
        ),
    )
    for line in note_lines(source.notes):
        say(line)
    if dry_run:
        check_notes(source, config)
        print_plan(source, config, as_json=as_json)
        return
    assert out is not None
    if ray is None:
        report = _convert(source, out, config)
    else:
        report = _convert_on_cluster(source, out, config, ray, workers, accept_open_ray)
    print_report(report, as_json=as_json)


def _convert(source: "SourceList", out: Path, config: "ConversionConfig") -> "ConversionReport":
    from ray_jobs.conversion import convert_shown
    from ray_jobs.environment import fault_points

    return convert_shown(source, out, config, faults=fault_points())


def _convert_on_cluster(
    source: "SourceList",
    out: Path,
    config: "ConversionConfig",
    address: str,
    num_workers: int | None,
    accept_open: bool,
) -> "ConversionReport":
    from ray_jobs.cluster.conversion import convert_on_cluster
    from ray_jobs.cluster.ray_access import found_access
    from ray_jobs.environment import fault_points

    access = found_access(accept_open=accept_open)
    return convert_on_cluster(
        source, out, config, address=address, access=access, num_workers=num_workers, faults=fault_points()
    )


@app.command(epilog="Example: ca2st shard verify shards/train, or: ca2st shard verify s3://bucket/shards/train")
def verify(
    shards: Annotated[str, typer.Argument(help="Folder or URL of a shard set.", metavar="DIR_OR_URL")],
    as_json: Json = False,
) -> None:
    """Check every byte against the manifest; ends with 3 and the names when something is damaged."""
    from ray_jobs.console import print_json, progress, result
    from sharding.verify import count_shards, verify_place

    with progress(f"Verifying {shards}", count_shards(shards)) as update:
        problems = verify_place(shards, progress=lambda done, _total: update(done, "shards"))
    if as_json:
        print_json({"ok": not problems, "problems": problems})
    else:
        for problem in problems:
            result(f"{problem.shard} {problem.key or '-'}: {problem.what}")
        if not problems:
            result(f"{shards}: every byte is what the manifest says")
    if problems:
        raise typer.Exit(3)


@app.command(epilog="Example: ca2st shard inspect shards/train --html card.html")
def inspect(
    shards: Annotated[str, typer.Argument(help="Folder or URL of a shard set.", metavar="DIR_OR_URL")],
    html: Annotated[Path | None, typer.Option(help="Write a page with classes, durations and clips.")] = None,
    as_json: Json = False,
) -> None:
    """Counts, classes and durations of a shard set, from its indexes; with --html also stills and spectrograms."""
    from ray_jobs.console import print_json, result, say, table
    from ray_jobs.set_card import facts_in_words

    shard_set, facts = _read_facts(shards, html)
    if html is not None:
        from ray_jobs.set_card import write_set_card

        write_set_card(shard_set, facts, html)
        say(f"wrote {html}")
    if as_json:
        from dataclasses import asdict

        print_json({name: value for name, value in asdict(facts).items() if name != "durations"})
        return
    result(table(facts_in_words(facts)))


@app.command(epilog="Example: ca2st shard overlap shards/train shards/validation --content")
def overlap(
    first: Annotated[str, typer.Argument(help="Folder or URL of a shard set.", metavar="DIR_OR_URL")],
    second: Annotated[str, typer.Argument(help="Folder or URL of another one.", metavar="DIR_OR_URL")],
    content: Annotated[
        bool,
        typer.Option("--content", help="Compare what samples show and sound like, too: decodes three stills each."),
    ] = False,
    as_json: Json = False,
) -> None:
    """List videos that are in both sets, by sample id and source file; ends with 3 when there are any."""
    from ray_jobs.console import print_json, progress, result
    from ray_jobs.overlap import counts, find_overlaps
    from sharding.format.shard_set import read_shard_set

    sets = read_shard_set(first), read_shard_set(second)
    total = sum(shard_set.manifest.num_samples for shard_set in sets)
    with progress("Comparing", total) as update:
        found = find_overlaps(*sets, content=content, progress=lambda done, _total: update(done, ""))
    if as_json:
        print_json({"overlaps": found, "counts": counts(found)})
    else:
        for pair in found:
            result(f"{pair.by}: {pair.first} = {pair.second}")
        if not found:
            by = "id, source file or content" if content else "id or source file"
            result(f"no video is in both sets by {by}")
    if found:
        raise typer.Exit(3)


def _read_facts(place: str, html: Path | None) -> "tuple[ShardSet, SetFacts]":
    from pipelines.storage.index import set_facts
    from ray_jobs.console import require_writable_place
    from sharding.format.shard_set import read_shard_set

    if html is not None:
        require_writable_place(html, "--html")
    shard_set = read_shard_set(place)
    return shard_set, set_facts(shard_set)
