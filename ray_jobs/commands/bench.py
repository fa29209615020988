"""``ca2st bench loader`` and ``ca2st bench model``: how fast data comes, and how fast a model computes."""

import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_jobs.commands.model import Size

if TYPE_CHECKING:
    from ca2st.benchmark.model import ModelBenchmark, ModelReport
    from ca2st.spec import ClipSpec
    from pipelines.benchmark.loader import Consumer, LoaderBenchmark, SplitReport

app = typer.Typer(no_args_is_help=True)

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


@app.command(epilog="Example: ca2st bench loader --json")
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
    from ray_jobs.bench_report import bench_facts, write_report
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
    facts = bench_facts(asdict(found), command=_command())
    write_report(facts, _loader_lines(found), out=out, as_json=as_json)


class Device(StrEnum):
    """Where to measure."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Precision(StrEnum):
    """Types of the passes."""

    FP32 = "fp32"
    BF16 = "bf16"


@app.command(epilog="Example: ca2st bench model --json")
def model(
    models: Annotated[str, typer.Option(help="Kinds of model, comma between.")] = "cast,cava,ca2st",
    size: Annotated[Size, typer.Option(help="Width and depth of the experts.")] = Size.VIT_B,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of every expert; default: all on a GPU, 2 on a CPU.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Clips of a pass; default: 6 on a GPU, 1 on a CPU.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Measured passes of each variant; default: 20 on a GPU, 3 on a CPU.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Instead of --steps: time for each model's passes of a kind.")
    ] = None,
    device: Annotated[Device, typer.Option(help="auto: a GPU where there is one.")] = Device.AUTO,
    precision: Annotated[Precision | None, typer.Option(help="Default: bf16 on a GPU, fp32 on a CPU.")] = None,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Measure torch.compile too; default: on a GPU (slow to start)."),
    ] = None,
    baseline: Annotated[bool, typer.Option(help="Measure the plain formulation too.")] = True,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Clips a second, memory and share of the device's limit, beside the plain formulation in the same run.

    For each model: the forward pass, and the training step with frozen experts (loss, backward, AdamW). The variants
    take turns, pass by pass; medians and ranges are reported. The headline is the first model's training step.
    """
    from ca2st.benchmark.case import ModelBenchConfig
    from ca2st.benchmark.model import benchmark_models
    from ray_jobs.bench_report import bench_facts, write_report
    from ray_jobs.console import progress, require_writable_place

    names = tuple(name.strip() for name in models.split(",") if name.strip())
    config = ModelBenchConfig(
        models=names,
        size=size.value,
        num_layers=layers,
        per_device_batch_size=batch,
        rounds=steps,
        seconds=seconds,
        device=device.value,
        precision=None if precision is None else precision.value,
        compiled=compiled,
        baseline=baseline,
    )
    if out is not None:
        require_writable_place(out, "--out")
    with progress("models", len(names)) as update:
        found = benchmark_models(config, update=update)
    facts = bench_facts(asdict(found), command=_command(), device=found.plan.device)
    write_report(facts, _model_lines(found), out=out, as_json=as_json)


def _command() -> str:
    return " ".join(("ca2st", *sys.argv[1:]))


def _consumer(kind: ConsumerKind, size: str, layers: int | None, clip: "ClipSpec") -> "tuple[Consumer, str]":
    if kind is ConsumerKind.NORMALISE:
        from pipelines.benchmark.loader import NORMALISE, normalise

        return normalise, NORMALISE
    from ray_jobs.runs.bench_data import training_consumer

    return training_consumer(kind.value, size, num_layers=layers, clip=clip)


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


def _model_lines(found: "ModelBenchmark") -> list[str]:
    plan, limit = found.plan, found.limit
    lines = [
        f"{plan.size} on {plan.device}, {plan.precision}, {plan.per_device_batch_size} clip(s) a pass; limit "
        f"{limit.tflops:.3g} TFLOP/s ({limit.dtype}, {limit.size} x {limit.size}, {limit.product}); "
        f"load before: {found.load_before:.1f}"
    ]
    for model in found.models:
        lines += _lines_of_model(model)
    return lines


def _lines_of_model(report: "ModelReport") -> list[str]:
    bridges = ", ".join(f"{name} in {count}" for name, count in report.bridges.items())
    lines = [f"{report.model}: {report.num_layers} of {report.all_layers} layers ({bridges}), {report.gmacs:.1f} GMACs"]
    for variant, passes in report.variants.items():
        for kind, facts in passes.items():
            spread = f"{facts.seconds.lowest:.3g}-{facts.seconds.highest:.3g} s"
            more = f"  {facts.share_of_limit:.0%} of the limit" if facts.share_of_limit is not None else ""
            if facts.speedup is not None:
                more += f"  {facts.speedup.median:.2f}x the baseline"
            lines.append(
                f"  {variant:<9} {kind:<9} {facts.clips_per_second:9.3f} clips/s ({spread})  "
                f"{facts.peak_memory_bytes / 2**30:6.2f} GiB{more}"
            )
    return lines
