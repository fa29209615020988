"""``ca2st bench loader`` and ``ca2st bench convert``: how fast data comes, and how fast it is made."""

import datetime
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_jobs.commands.model import Size

if TYPE_CHECKING:
    from ca2st.spec import ClipSpec
    from pipelines.benchmark.loader import Consumer
    from pipelines.benchmark.report import ConversionBenchmark, LoaderBenchmark, SplitReport


LOADER_EXAMPLE = "Example: ca2st bench loader --json"
CONVERT_EXAMPLE = "Example: ca2st bench convert --clips 8 --json"

Clips = Annotated[int, typer.Option(min=2, help="Source files to draw: 10 s, 30 fps, 320x240, H.264 with sound.")]
Codec = Annotated[str, typer.Option(help="Codec of the shards.")]
Media = Annotated[Path | None, typer.Option(help="Folder with video files of your own instead of drawn ones.")]
Work = Annotated[
    Path | None, typer.Option(help="Folder to keep drawn files and shards in, for the next time; default: temporary.")
]
Out = Annotated[Path | None, typer.Option(help="File for the report, as JSON.")]
Json = Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")]


class Backend(StrEnum):
    """What decodes."""

    AUTO = "auto"
    DALI = "dali"
    REFERENCE = "reference"


class ConsumerKind(StrEnum):
    """What stands behind the loader for headspace."""

    NORMALISE = "normalise"
    CAST = "cast"
    CAVA = "cava"
    CA2ST = "ca2st"


def loader(
    clips: Clips = 24,
    seconds: Annotated[float, typer.Option(help="Time for each variant in training, and in validation.")] = 20.0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that this time is cut into.")] = 3,
    batch: Annotated[int, typer.Option(min=2, help="Clips of a batch.")] = 8,
    codec: Codec = "mjpeg",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Decoding threads, and workers of the baseline; default: the cores.")
    ] = None,
    backend: Annotated[Backend, typer.Option(help="As in a recipe.")] = Backend.AUTO,
    rand_augment: Annotated[bool, typer.Option(help="Train with rand-m7-n4-mstd0.5-inc1, ours and baseline.")] = True,
    baseline: Annotated[bool, typer.Option(help="Measure the baseline too.")] = True,
    consumer: Annotated[
        ConsumerKind, typer.Option(help="Behind the loader for headspace: normalise, or a model's training step.")
    ] = ConsumerKind.NORMALISE,
    size: Annotated[Size, typer.Option(help="Of the consumer's model.")] = Size.VIT_B,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Of its experts; default: all on a GPU, 2 on a CPU.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Shards of your own; then --media names their originals.")] = None,
    media: Media = None,
    work: Work = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Clips a second of the training and the validation loader, beside what people use today, in the same run.

    The baseline is a torch DataLoader with a worker a core over the original H.264 files: PyAV from the nearest key
    frame, timm's RandAugment on Pillow frames, torchvision. The variants take turns; medians are reported.
    """
    from ca2st.spec import ClipSpec
    from pipelines.benchmark.loader import NUM_STEPS, LoaderBenchConfig, benchmark_loader
    from ray_jobs.console import progress, require_writable_place
    from ray_jobs.runs.bench_data import bench_sources
    from sharding.format.shard_set import read_shard_set

    config = LoaderBenchConfig(
        seconds=seconds,
        rounds=rounds,
        batch_size=batch,
        threads=threads,
        backend=backend.value,
        rand_augment=rand_augment,
        baseline=baseline,
        clip=ClipSpec(),
    )
    if out is not None:
        require_writable_place(out, "--out")
    with bench_sources(clips, codec=codec, data=data, media=media, work=work) as sources:
        consume, name = _consumer(consumer, size.value, layers, config.clip)
        with progress("Measuring", NUM_STEPS) as update:
            found = benchmark_loader(
                config,
                read_shard_set(sources.shards),
                sources.files,
                consumer=consume,
                consumer_name=name,
                update=update,
            )
    _tell(found, _loader_lines(found), out=out, as_json=as_json)


def convert(
    clips: Clips = 12,
    rounds: Annotated[int, typer.Option(min=1, help="Conversions in each way.")] = 2,
    codec: Codec = "mjpeg",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Decoding processes; default: the machine's cores.")
    ] = None,
    media: Media = None,
    work: Work = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Clips a second of `ca2st shard build`, beside the plain loop that people write first, in the same run.

    The baseline is one process: PyAV, Pillow, torchaudio, webdataset's ShardWriter, without a check of anything.
    """
    from ca2st.processes import num_cores
    from pipelines.benchmark.conversion import benchmark_conversion, num_conversions
    from ray_jobs.console import progress, require_writable_place
    from ray_jobs.runs.bench_data import source_files, work_folder
    from sharding.settings import ConversionConfig

    config = ConversionConfig(codec=codec, workers=workers or num_cores(), audio_policy="optional")
    if out is not None:
        require_writable_place(out, "--out")
    with work_folder(work) as folder:
        files = source_files(clips, media, folder)
        with progress("Converting", num_conversions(rounds)) as update:
            found = benchmark_conversion(config, files, folder, rounds=rounds, update=update)
    _tell(found, _convert_lines(found), out=out, as_json=as_json)


def _consumer(kind: ConsumerKind, size: str, layers: int | None, clip: "ClipSpec") -> "tuple[Consumer, str]":
    if kind is ConsumerKind.NORMALISE:
        from pipelines.benchmark.loader import NORMALISE, normalise

        return normalise, NORMALISE
    from ray_jobs.runs.bench_data import training_consumer

    return training_consumer(kind.value, size, num_layers=layers, clip=clip)


def _tell(found: "LoaderBenchmark | ConversionBenchmark", lines: list[str], *, out: Path | None, as_json: bool) -> None:
    from ray_jobs.console import print_json, result

    facts = _facts(found)
    if out is not None:
        out.write_text(json.dumps(facts, indent=2) + "\n")
    if as_json:
        print_json(facts)
        return
    for line in lines:
        result(line)


def _facts(found: "LoaderBenchmark | ConversionBenchmark") -> dict[str, Any]:
    from dataclasses import asdict
    from importlib import metadata

    import torch

    from ca2st.benchmark.measure import machine
    from ray_jobs.environment import versions

    return {
        **asdict(found),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": " ".join(("ca2st", *sys.argv[1:])),
        "machine": asdict(machine("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": versions() | {name: metadata.version(name) for name in ("av", "timm", "torchvision")},
    }


def _loader_lines(found: "LoaderBenchmark") -> list[str]:
    head = found.headspace
    return [
        f"{found.num_clips} clips, shards {found.codec} ({found.shard_bytes_per_clip / 1e6:.2f} MB a clip, originals "
        f"{found.source_bytes_per_clip / 1e6:.2f} MB), backend {found.backend}, {found.threads} threads; "
        f"load before: {found.load_before:.1f}",
        *_split_lines("train", found.train),
        *_split_lines("validation", found.validation),
        f"headspace: {head.limited_by} is the limit: loader alone {head.loader_clips_per_second:.1f} clips/s, consumer "
        f"alone {head.consumer_clips_per_second:.1f}, together {head.together_clips_per_second:.1f}, waiting "
        f"{head.data_wait_fraction:.0%} of the time ({head.consumer})",
    ]


def _split_lines(name: str, report: "SplitReport") -> list[str]:
    ours = f"{name:<10} {report.clips_per_second:7.1f} clips/s  {_stages(report.stages)}"
    if report.ratio is None or report.baseline_stages is None:
        return [ours]
    return [
        f"{ours}  {report.ratio.median:.1f}x the baseline",
        f"  baseline {report.baseline_clips_per_second:7.1f} clips/s  {_stages(report.baseline_stages)}",
    ]


def _stages(stages: Any) -> str:
    shown = ", ".join(f"{name.removesuffix('_ms')} {value:.1f}" for name, value in stages.items() if value >= 0.05)
    return f"({shown} ms a clip)"


def _convert_lines(found: "ConversionBenchmark") -> list[str]:
    return [
        f"{found.num_clips} clips to {found.codec}; load before: {found.load_before:.1f}",
        f"  {found.workers} workers  {found.clips_per_second:7.2f} clips/s  {found.ratio:.2f}x the baseline",
        f"  1 worker   {found.one_worker_clips_per_second:7.2f} clips/s",
        f"  baseline   {found.baseline_clips_per_second:7.2f} clips/s",
    ]
