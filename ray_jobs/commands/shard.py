"""``ca2st shard build|verify|inspect|overlap``."""

import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from ca2st.durable import write_bytes
from ca2st.errors import UserInputError
from ray_jobs.commands.options import Json, refuse_without_ray, takes
from ray_jobs.console import answer, convert_shown, counted, parse_bytes, progress, require_writable_place, say, table

if TYPE_CHECKING:
    from sharding.datasets import DatasetRequest
    from sharding.settings import ConversionConfig
    from sharding.source import SourceList


app = typer.Typer(no_args_is_help=True)
Shards = Annotated[str, typer.Argument(help="Folder or URL of a shard set.", metavar="DIR_OR_URL")]


def _option(panel: str, text: str, *names: str, **settings: Any) -> Any:
    """Return an option with its help, in a panel of ``--help``."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


_source = partial(_option, "Source")
_video = partial(_option, "Video")
_audio = partial(_option, "Audio")
_output = partial(_option, "Output")
_cluster = partial(_option, "Cluster")
_world = partial(_option, "Synthetic world")


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """The options of ``shard build``, by panel of its help."""

    dataset: Annotated[
        str, _source("folder, csv, list, synthetic, or a published dataset: epic_kitchens_100, kinetics_400, ...")
    ]
    split: Annotated[str, _source("Name of the split: train, validation, test.")] = "train"
    annotations: Annotated[Path | None, _source("The dataset's annotation file, as its owners publish it.")] = None
    media: Annotated[Path | None, _source("Folder with the media files.")] = None
    classes: Annotated[
        Path | None,
        _source("csv, list, folder, kinetics_sound, activitynet: class names in label order, one per line."),
    ] = None
    audio_root: Annotated[
        Path | None, _source("csv: folder that paths of the column `audio`, a file for the sound, start from.")
    ] = None
    label_separator: Annotated[
        str | None, _source("csv: what stands between the labels of the column `labels`; default |.")
    ] = None
    follow_links: Annotated[bool, _source("Links may lead outside --media.", "--follow-links")] = False
    clock: Annotated[
        Literal["file", "first-frame"],
        _source(
            "What seconds of annotations count from: the start of the file, its earliest stream, as players and "
            "ffmpeg -ss do, or the first picture."
        ),
    ] = "file"
    limit: Annotated[int | None, _source("Only the first N samples.")] = None
    max_missing: Annotated[
        str, _source("Samples that may have no media file and are left out: a number or a share like 5%.")
    ] = "0"
    strict: Annotated[
        bool,
        _source(
            "Refuse what questions the data and is only noted otherwise: labels that look alike or may be several, "
            "files left aside, clips shorter than annotated, silent sound, ...",
            "--strict",
        ),
    ] = False

    codec: Annotated[
        str, _video("mjpeg: a JPEG per frame, for CPUs; h264, hevc: for GPUs; vp9: for GPUs, on CPUs by DALI.")
    ] = "mjpeg"
    quality: Annotated[
        int | None, _video("Lower is better; default: mjpeg 5 (of 2..31), h264 20, hevc 23, vp9 30.")
    ] = None
    gop: Annotated[int | None, _video("h264, hevc, vp9: frames from one key frame to the next; default 8.")] = None
    short_side: Annotated[int, _video("Pixels of the shorter side; smaller sources keep their size.")] = 256
    frames_per_second: Annotated[float | None, _video("Thin to this rate; default: every frame.")] = None
    hdr: Annotated[Literal["tone-map", "refuse"], _video("PQ and HLG clips: convert to BT.709, or reject.")] = (
        "tone-map"
    )
    interlaced: Annotated[
        Literal["deinterlace", "keep"],
        _video("Interlaced frames: deinterlace (yadif), or keep both fields as they are."),
    ] = "deinterlace"

    audio: Annotated[
        Literal["required", "optional", "none"],
        _audio("Clips without sound, or of digital silence: reject, keep, or no audio at all."),
    ] = "required"
    sample_rate: Annotated[int, _audio("Sample rate in Hz before the filter bank.")] = 16_000

    out: Annotated[
        str | None,
        _output("Folder or URL (s3, gs) for the shards; rerun with the same one to resume.", metavar="DIR_OR_URL"),
    ] = None
    shard_size: Annotated[str, _output("Size that shards are planned for, as 1GB or 256MB.")] = "1GB"
    clip_seconds: Annotated[
        float | None,
        _output("Length that samples without times are planned with; default: the others' mean, or 10 seconds."),
    ] = None
    max_rejects: Annotated[str, _output("Samples that may be rejected: a number or a share like 2%.")] = "0"
    update: Annotated[
        bool, _output("In a finished set, convert the shards again whose sources changed.", "--update")
    ] = False
    append: Annotated[bool, _output("Add these samples to the finished set in --out.", "--append")] = False
    dry_run: Annotated[
        bool, _output("Read the annotations, and pieces of a few videos; print the expected storage.", "--dry-run")
    ] = False
    as_json: Annotated[bool, _output("Print the facts as one JSON object.", "--json")] = False

    workers: Annotated[
        int | None, _cluster("Decoding processes; default: the machine's cores, with --ray the cluster's.", min=1)
    ] = None
    ray: Annotated[
        str | None, _cluster("Make the shards on a Ray cluster: auto, or host:port of its head.", metavar="ADDRESS")
    ] = None
    accept_open_ray: Annotated[
        bool, _cluster("Join a cluster that asks nobody for a token.", "--i-accept-open-ray")
    ] = False

    task: Annotated[str | None, _world("space, time, audio, holistic or binding; default holistic.")] = None
    num_samples: Annotated[int | None, _world("Number of clips; default 768.")] = None
    seed: Annotated[int | None, _world("Seed of the world; default 0.")] = None
    difficulty: Annotated[str | None, _world("easy (default), medium or hard.")] = None
    frame_size: Annotated[int | None, _world("Width and height in pixels; default 64.")] = None
    frame_rate: Annotated[int | None, _world("Frames per second; default 16.")] = None
    min_frames: Annotated[int | None, _world("Frames of the shortest clip; default 16.")] = None
    max_frames: Annotated[int | None, _world("Frames of the longest clip; default 21.")] = None

    def config(self) -> "ConversionConfig":
        """Return how sources become shards.

        Raises:
            UserInputError: a value is out of range.
        """
        from ca2st.processes import num_cores
        from sharding.media.codecs import DEFAULT_GOP_FRAMES
        from sharding.settings import ConversionConfig, RejectBudget

        if self.gop is not None and self.codec == "mjpeg":
            raise UserInputError(
                f"--gop {self.gop}: --codec mjpeg has none but key frames; leave it out, or choose --codec h264, hevc "
                "or vp9"
            )
        return ConversionConfig(
            codec=self.codec,
            quality=self.quality,
            num_gop_frames=DEFAULT_GOP_FRAMES if self.gop is None else self.gop,
            short_side=self.short_side,
            frames_per_second=self.frames_per_second,
            hdr=self.hdr,
            interlaced=self.interlaced,
            sample_rate_hz=self.sample_rate,
            workers=self.workers or num_cores(),
            shard_bytes=parse_bytes(self.shard_size),
            clip_seconds=self.clip_seconds,
            audio_policy=self.audio,
            clock=self.clock,
            max_rejects=RejectBudget.parse(self.max_rejects),
            update=self.update,
            append=self.append,
            strict=self.strict,
        )

    def request(self) -> "DatasetRequest":
        """Return what to ask the dataset's reader for.

        Raises:
            UserInputError: a value out of range, or one of the synthetic world's for another dataset.
        """
        from sharding.datasets import DatasetRequest, SyntheticConfig
        from sharding.settings import RejectBudget

        world = ("num_samples", "seed", "difficulty", "frame_size", "frame_rate", "min_frames", "max_frames")
        given = {name: value for name in world if (value := getattr(self, name)) is not None}
        if given and self.dataset != "synthetic":
            flag = next(iter(given)).replace("_", "-")
            raise UserInputError(f"--{flag}: --dataset {self.dataset} does not use it; leave it out")
        if "frame_rate" in given:
            given["frames_per_second"] = given.pop("frame_rate")
        return DatasetRequest(
            annotations=self.annotations,
            media=self.media,
            split=self.split,
            limit=self.limit,
            check_media=not self.dry_run,
            classes=self.classes,
            audio_root=self.audio_root,
            label_separator=self.label_separator,
            follow_links=self.follow_links,
            max_missing=RejectBudget.parse(self.max_missing, option="--max-missing"),
            task=self.task,
            synthetic=SyntheticConfig(**given),
        )


@app.command(epilog="Example: ca2st shard build --dataset folder --media videos --split train --out shards/train")
@takes(BuildOptions)
def build(options: BuildOptions) -> None:
    """Convert one split of a dataset into shards; rerun the same command to resume."""
    from ray_jobs.environment import fault_points
    from sharding.conversion import check_notes
    from sharding.datasets import read_dataset
    from sharding.source import note_lines

    refuse_without_ray(accept_open_ray=options.accept_open_ray, ray=options.ray is not None)
    config = options.config()
    if options.out is None and not options.dry_run:
        raise UserInputError("--out: required unless --dry-run is given; name a folder for the shards")
    signal.signal(signal.SIGTERM, _terminated)
    source = read_dataset(options.dataset, options.request())
    for line in note_lines(source.notes):
        say(line)
    if options.dry_run:
        check_notes(source, config)
        _print_plan(source, config, as_json=options.as_json)
        return
    assert options.out is not None
    if options.ray is None:
        report = convert_shown(source, options.out, config, faults=fault_points())
    else:
        from ray_jobs.cluster.conversion import convert_on_cluster
        from ray_jobs.cluster.ray_access import found_access

        report = convert_on_cluster(
            source,
            options.out,
            config,
            address=options.ray,
            access=found_access(accept_open=options.accept_open_ray),
            num_workers=options.workers,
            faults=fault_points(),
        )
    facts = {
        "manifest": str(report.manifest_path),
        "num_samples": report.num_samples,
        "num_classes": _class_count(report.num_classes),
        "num_shards": report.num_shards,
        "rejected": dict(report.rejected),
        "notes": dict(report.notes),
        "clips_per_second": round(report.clips_per_second, 2),
    }
    shown = facts | {"rejected": counted(report.rejected), "notes": counted(report.notes)}
    answer(facts, [table(shown)], as_json=options.as_json)


def _terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    say("terminated; rerun the same command to go on where it stopped")
    raise SystemExit(128 + signal.SIGTERM)


def _print_plan(source: "SourceList", config: "ConversionConfig", *, as_json: bool) -> None:
    """Print the samples, classes and bytes to expect; pieces of a few videos, where they are there, are encoded."""
    from sharding.datasets.label_spaces import label_histogram
    from sharding.forecast import forecast_storage
    from sharding.settings import plan_shards

    estimate = forecast_storage(source, config)
    notes = {kind: len(places) for kind, places in source.notes.items()}
    facts: dict[str, object] = {
        "dataset": source.dataset,
        "split": source.split,
        "manifest": None,
        "num_samples": len(source.samples),
        "num_classes": _class_count(source.num_classes),
        "num_shards": len(plan_shards(source, config)),
        "estimated_bytes": estimate.total_bytes,
        "num_probed": estimate.num_probed,
        "rejected": {},
        "notes": notes,
        "clips_per_second": None,
    }
    histogram = label_histogram(source)
    empty = {space: sum(count == 0 for count in counts.values()) for space, counts in histogram.items()}
    shown = facts | {"notes": counted(notes), "classes without samples": counted(empty)}
    shown = {name: value for name, value in shown.items() if value is not None}
    answer(facts | {"samples_per_class": histogram}, [table(shown)], as_json=as_json)


def _class_count(num_classes: Mapping[str, int]) -> int | dict[str, int]:
    """Return one number where one label is learned, a number per target otherwise."""
    return next(iter(num_classes.values())) if len(num_classes) == 1 else dict(num_classes)


@app.command(epilog="Example: ca2st shard verify shards/train, or: ca2st shard verify s3://bucket/shards/train")
def verify(
    shards: Shards,
    as_json: Json = False,
) -> None:
    """Check every byte against the manifest; ends with 3 and the names when something is damaged."""
    from sharding.verify import count_shards, verify_place

    with progress(f"Verifying {shards}", count_shards(shards)) as update:
        problems = verify_place(shards, progress=lambda done, _total: update(done, "shards"))
    lines = [f"{problem.shard} {problem.key or '-'}: {problem.what}" for problem in problems]
    lines = lines or [f"{shards}: every byte is what the manifest says"]
    answer({"ok": not problems, "problems": problems}, lines, as_json=as_json)
    if problems:
        raise typer.Exit(3)


@app.command(epilog="Example: ca2st shard inspect shards/train --html card.html")
def inspect(
    shards: Shards,
    html: Annotated[Path | None, typer.Option(help="Write a page with classes, durations and clips.")] = None,
    as_json: Json = False,
) -> None:
    """Counts, classes and durations of a shard set, from its indexes; with --html also stills and spectrograms."""
    from pipelines.storage.index import set_facts
    from ray_jobs.set_card import facts_in_words, render_set_card
    from sharding.format.shard_set import read_shard_set

    require_writable_place(html, "--html")
    shard_set = read_shard_set(shards)
    facts = set_facts(shard_set)
    if html is not None:
        write_bytes(html, render_set_card(shard_set, facts).encode())
        say(f"wrote {html}")
    told = {name: value for name, value in asdict(facts).items() if name != "durations"}
    answer(told, [table(facts_in_words(facts))], as_json=as_json)


@app.command(epilog="Example: ca2st shard overlap shards/train shards/validation --content")
def overlap(
    first: Shards,
    second: Annotated[str, typer.Argument(help="Folder or URL of another one.", metavar="DIR_OR_URL")],
    content: Annotated[
        bool,
        typer.Option("--content", help="Compare what samples show and sound like, too: decodes three stills each."),
    ] = False,
    as_json: Json = False,
) -> None:
    """List videos that are in both sets, by sample id and source file; ends with 3 when there are any."""
    from ray_jobs.overlap import counts, find_overlaps
    from sharding.format.shard_set import read_shard_set

    sets = read_shard_set(first), read_shard_set(second)
    total = sum(shard_set.manifest.num_samples for shard_set in sets)
    with progress("Comparing", total) as update:
        found = find_overlaps(*sets, content=content, progress=lambda done: update(done, ""))
    lines = [f"{pair.by}: {pair.first} = {pair.second}" for pair in found]
    by = "id, source file or content" if content else "id or source file"
    lines = lines or [f"no video is in both sets by {by}"]
    answer({"overlaps": found, "counts": counts(found)}, lines, as_json=as_json)
    if found:
        raise typer.Exit(3)
