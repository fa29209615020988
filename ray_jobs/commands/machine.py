"""Commands that try this machine: doctor, demo and ``ca2st bench``."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ca2st.errors import EnvironmentFault, UserInputError
from ca2st.model.config import SizeName
from ray_jobs.commands.options import Json, Out, TrackingStore
from ray_jobs.console import answer, print_json, progress, require_writable_place, result, say

bench = typer.Typer(no_args_is_help=True)
_AMOUNT = re.compile(r"-?\d+(?:\.\d+)?(?= (?:of|GiB|s)\b)")
"""A number that may differ from node to node; versions and counts are none of these."""
Clips = Annotated[int, typer.Option(min=2, help="Source files to draw: 10 s, 30 fps, 320x240, H.264 with sound.")]
Codec = Annotated[str, typer.Option(help="Codec of the shards.")]
Media = Annotated[Path | None, typer.Option(help="Folder with video files of your own instead of drawn ones.")]
Work = Annotated[
    Path | None, typer.Option(help="Folder to keep drawn files and shards in, for the next time; default: temporary.")
]


def doctor(
    out: Annotated[Path | None, typer.Option(help="Folder that runs are written under; default: runs.")] = None,
    tracking_uri: TrackingStore = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Examine every node of this Ray cluster: auto, or host:port of its head.", metavar="ADDRESS"),
    ] = None,
    storage: Annotated[
        list[Path] | None, typer.Option(help="With --ray-address: a folder that all nodes should share; repeatable.")
    ] = None,
    accept_open_ray: Annotated[
        bool, typer.Option("--i-accept-open-ray", help="Join a cluster that asks nobody for a token.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Try what a training needs on this machine: packages, GPU, codecs, disk, MLflow, Ray; and say how to fix it.

    With --ray-address on every node of a cluster, and between them: versions, shared storage, connections, clocks;
    what is the same on all nodes is printed once. Ends with 4 where something needed does not work; what is only
    slower without it is marked optional.

    Example: ca2st doctor, or: ca2st doctor --ray-address auto --storage /shared/runs
    """
    from ray_jobs.config.recipe import LaunchConfig
    from ray_jobs.doctor import all_checks, examine

    _refuse_other_examination(
        ray_address=ray_address,
        of_machine={"--out": out, "--tracking-uri": tracking_uri},
        of_cluster={"--storage": storage, "--i-accept-open-ray": accept_open_ray},
    )
    findings = []
    if ray_address is not None:
        findings = _examine_cluster(ray_address, storage or [], accept_open_ray)
        for finding in () if as_json else merged(findings):
            result(_line(finding))
    else:
        for finding in examine(all_checks(out or Path(LaunchConfig().runs_folder), tracking_uri=tracking_uri)):
            findings.append(finding)
            if not as_json:  # as it comes: some take seconds
                result(_line(finding))
    if as_json:
        print_json({"checks": findings})
    broken = [
        finding.name if finding.node is None else f"{finding.name} on {finding.node}"
        for finding in findings
        if not finding.ok and finding.needed
    ]
    if broken:
        raise EnvironmentFault(f"needed and not working: {', '.join(broken)}; the fix stands with each")


def merged(findings: "Sequence[Finding]") -> "list[Finding]":
    """Join findings that nodes share: `node` then names all of them; amounts that are ok are given as a range."""
    names = list(dict.fromkeys(finding.name for finding in findings))
    num_nodes = len({finding.node for finding in findings if finding.node is not None})
    alike: dict[tuple[str, bool, bool, str], list[Finding]] = {}
    for finding in sorted(findings, key=lambda one: names.index(one.name)):
        what = _AMOUNT.sub("#", finding.what) if finding.ok else finding.what
        alike.setdefault((finding.name, finding.ok, finding.needed or finding.ok, what), []).append(finding)
    told = []
    for group in alike.values():
        nodes = [finding.node for finding in group if finding.node is not None]
        where = f"all {num_nodes} nodes" if len(nodes) == num_nodes > 1 else ", ".join(nodes)
        told.append(replace(group[0], what=_in_ranges([one.what for one in group]), node=where or None))
    return told


def _in_ranges(texts: Sequence[str]) -> str:
    """Return what the texts say alike; an amount that differs as ``least to most``."""
    columns = zip(*map(_AMOUNT.findall, texts), strict=True)

    def amount(match: re.Match[str]) -> str:
        values = sorted(set(next(columns)), key=float)
        return match.group() if len(values) == 1 else f"{values[0]} to {values[-1]}"

    return _AMOUNT.sub(amount, texts[0])


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes; rerun to go on.")] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Make a small audio-visual world, shard it, train small models on frozen experts, compare them, write a page.

    Example: ca2st demo --out demo
    """
    from ray_jobs.demo.demo import run_demo

    report = run_demo(out)
    answer(report, _demo_lines(report), as_json=as_json)


@bench.command(epilog="Example: ca2st bench loader --json")
def loader(
    clips: Clips = 24,
    seconds: Annotated[float, typer.Option(help="Time for each variant in training, and in validation.")] = 20.0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that this time is cut into.")] = 3,
    batch: Annotated[int, typer.Option(min=2, help="Clips of a batch.")] = 8,
    codec: Codec = "mjpeg",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Decoding threads, and workers of the baseline; default: the cores.")
    ] = None,
    backend: Annotated[Literal["auto", "dali", "reference"], typer.Option(help="As in a recipe.")] = "auto",
    rand_augment: Annotated[bool, typer.Option(help="Train with rand-m7-n4-mstd0.5-inc1, ours and baseline.")] = True,
    baseline: Annotated[bool, typer.Option(help="Measure the baseline too.")] = True,
    consumer: Annotated[
        Literal["normalise", "cast", "cava", "ca2st"],
        typer.Option(help="Behind the loader for headspace: normalise, or a model's training step."),
    ] = "normalise",
    size: Annotated[SizeName, typer.Option(help="Of the consumer's model.")] = "vit_b",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Of its experts; default: all on a GPU, 2 on a CPU.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Shards of your own; then --media names their originals.")] = None,
    media: Media = None,
    work: Work = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure clips per second of the training and the validation loader, beside what people use today in the same run.

    The baseline is a torch DataLoader with one worker per core over the original H.264 files: PyAV from the nearest key
    frame, timm's RandAugment on Pillow frames, torchvision. The second one, where it is installed, is torchcodec with
    torchvision's v2 transforms. The variants take turns; medians are reported, then memory and the first batch.
    """
    from pipelines.benchmark.loader import NUM_STEPS, LoaderBenchConfig, benchmark_loader
    from ray_jobs.bench_data import bench_sources
    from ray_jobs.bench_report import bench_facts, write_report
    from sharding.format.shard_set import read_shard_set

    config = LoaderBenchConfig(
        seconds=seconds,
        rounds=rounds,
        batch_size=batch,
        threads=threads,
        backend=backend,
        rand_augment=rand_augment,
        baseline=baseline,
    )
    require_writable_place(out, "--out")
    with bench_sources(clips, codec=codec, data=data, media=media, work=work) as sources:
        consume, name = _consumer(consumer, size, layers, config.clip)
        with progress("Measuring", NUM_STEPS) as update:
            found = benchmark_loader(
                config,
                read_shard_set(sources.shards),
                sources.files,
                consumer=consume,
                consumer_name=name,
                update=update,
            )
    write_report(bench_facts(asdict(found), command=_command()), _loader_lines(found), out=out, as_json=as_json)


@bench.command(epilog="Example: ca2st bench model --json")
def model(
    models: Annotated[str, typer.Option(help="Kinds of model, comma between.")] = "cast,cava,ca2st",
    size: Annotated[SizeName, typer.Option(help="Width and depth of the experts.")] = "vit_b",
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
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU where there is one.")] = "auto",
    precision: Annotated[
        Literal["fp32", "bf16"] | None, typer.Option(help="Default: bf16 on a GPU, fp32 on a CPU.")
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Measure torch.compile too; default: on a GPU (slow to start)."),
    ] = None,
    baseline: Annotated[bool, typer.Option(help="Measure the plain formulation too.")] = True,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure clips per second, memory and share of the device's limit, beside the plain formulation in the same run.

    For each model: the forward pass, and the training step with frozen experts (loss, backward, AdamW). The variants
    take turns, pass by pass; medians and ranges are reported. The headline is the first model's training step.
    """
    from ca2st.benchmark.case import ModelBenchConfig
    from ca2st.benchmark.model import benchmark_models
    from ray_jobs.bench_report import bench_facts, write_report

    names = tuple(name.strip() for name in models.split(",") if name.strip())
    config = ModelBenchConfig(
        models=names,
        size=size,
        num_layers=layers,
        per_device_batch_size=batch,
        rounds=steps,
        seconds=seconds,
        device=device,
        precision=precision,
        compiled=compiled,
        baseline=baseline,
    )
    require_writable_place(out, "--out")
    with progress("models", len(names)) as update:
        found = benchmark_models(config, update=update)
    facts = bench_facts(asdict(found), command=_command(), device=found.plan.device)
    write_report(facts, _model_lines(found), out=out, as_json=as_json)


def _examine_cluster(address: str, storage: Sequence[Path], accept_open: bool) -> "list[Finding]":
    from ray_jobs.cluster.ray_access import found_access, ray_session

    with ray_session(address, access=found_access(accept_open=accept_open)):
        from ray_jobs.cluster.node_check import examine_cluster

        say("asking every node; a cold one takes a minute")
        return examine_cluster([str(folder.absolute()) for folder in storage])


def _line(finding: "Finding") -> str:
    mark = "ok" if finding.ok else "NOT OK" if finding.needed else "optional"
    node = f"  [{finding.node}]" if finding.node is not None else ""
    fix = f"\n{'':<25}fix: {finding.fix}" if not finding.ok else ""
    return f"{mark:<9}{finding.name:<16}{finding.what}{node}{fix}"


def _refuse_other_examination(
    *, ray_address: str | None, of_machine: Mapping[str, object], of_cluster: Mapping[str, object]
) -> None:
    """Refuse the options of ``doctor`` that belong to its other half: one machine, or a cluster.

    Raises:
        UserInputError: one of `of_machine` was given beside ``--ray-address``, or one of `of_cluster` without.
    """
    if ray_address is None:
        if given := [flag for flag, value in of_cluster.items() if value]:
            raise UserInputError(
                f"{given[0]}: expected --ray-address beside it; without, only this machine is examined, and no Ray is "
                "joined: leave it out, or add --ray-address"
            )
    elif given := [flag for flag, value in of_machine.items() if value is not None]:
        raise UserInputError(
            f"{given[0]}: expected no --ray-address beside it; of a cluster the nodes are examined, and with --storage "
            "what they share: leave one of the two out"
        )


def _demo_lines(report: "DemoReport") -> list[str]:
    from ray_jobs.demo.answers import next_steps

    lines = [f"\n{'model':<10} {'trainable':>10} {'top-1':>7} {'ceiling':>8} {'clips/s':>8}  MLflow run"]
    lines += [
        f"{run.model:<10} {run.trainable:>10,} {run.top1:>7.1%} {run.ceiling:>8.1%} "
        f"{run.clips_per_second:>8.0f}  {run.run_id or 'not tracked'}"
        for run in report.runs
    ]
    return [
        *lines,
        "The ceiling is the best that anybody could reach with what a model is given; chance is "
        f"{report.runs[-1].chance:.1%}.",
        "Experts alone: " + ", ".join(f"{one.expert} {one.top1:.1%} on {one.factor}" for one in report.experts),
        f"\n{report.prediction.video}",
        *(f"  {one.probability:6.1%}  {one.label}" for one in report.prediction.predictions),
        f"\nDone in {report.seconds:.0f} s. Look at {report.page} in a browser. What to try next:",
        *(f"  {command}\n      {says}" for command, says in next_steps(report).items()),
    ]


def _command() -> str:
    return " ".join(("ca2st", *sys.argv[1:]))


def _consumer(kind: str, size: str, layers: int | None, clip: "ClipSpec") -> "tuple[Consumer, str]":
    if kind == "normalise":
        from pipelines.benchmark.loader import NORMALISE, normalise

        return normalise, NORMALISE
    from ray_jobs.bench_data import training_consumer

    return training_consumer(kind, size, num_layers=layers, clip=clip)


def _loader_lines(found: "LoaderBenchmark") -> list[str]:
    head = found.headspace
    return [
        f"{found.num_clips} clips, shards {found.codec} ({found.shard_bytes_per_clip / 1e6:.2f} MB per clip, originals "
        f"{found.source_bytes_per_clip / 1e6:.2f} MB), backend {found.backend}, {found.threads} threads; "
        f"load before: {found.load_before:.1f}",
        *([found.torchcodec_missing] if found.torchcodec_missing else []),
        *_split_lines("train", found.train),
        *_split_lines("validation", found.validation),
        f"headspace: {head.limited_by} is the limit: loader alone {head.loader_clips_per_second:.1f} clips/s, consumer "
        f"alone {head.consumer_clips_per_second:.1f}, together {head.together_clips_per_second:.1f}, waiting "
        f"{head.data_wait_fraction:.0%} of the time ({head.consumer})",
        *(
            f"{name:<10} first batch after {one.first_batch_seconds:.1f} s; memory {one.process_bytes / 1e6:.0f} MB"
            + (f" and {one.num_workers} workers of {one.worker_bytes / 1e6:.0f} MB" if one.num_workers else "")
            for name, one in found.footprints.items()
        ),
    ]


def _split_lines(name: str, report: "SplitReport") -> list[str]:
    ours = f"{name:<10} {report.clips_per_second:7.1f} clips/s  {_stages(report.stages)}"
    if report.ratio is None or report.baseline_stages is None:
        return [ours]
    lines = [
        f"{ours}  {report.ratio.median:.1f}x the baseline",
        f"  baseline {report.baseline_clips_per_second:7.1f} clips/s  {_stages(report.baseline_stages)}",
    ]
    if (other := report.torchcodec) is not None:
        lines[0] += f", {other.ratio.median:.1f}x torchcodec"
        lines.append(f"  torchcodec {other.clips_per_second:5.1f} clips/s  {_stages(other.stages)}")
    return lines


def _stages(stages: Any) -> str:
    shown = ", ".join(f"{name.removesuffix('_ms')} {value:.1f}" for name, value in stages.items() if value >= 0.05)
    return f"({shown} ms per clip)"


def _model_lines(found: "ModelBenchmark") -> list[str]:
    plan, limit = found.plan, found.limit
    lines = [
        f"{plan.size} on {plan.device}, {plan.precision}, {plan.per_device_batch_size} clip(s) per pass; limit "
        f"{limit.tflops:.3g} TFLOP/s ({limit.dtype}, {limit.size} x {limit.size}, {limit.product}); "
        f"load before: {found.load_before:.1f}"
    ]
    for report in found.models:
        bridges = ", ".join(f"{name} in {count}" for name, count in report.bridges.items())
        lines.append(
            f"{report.model}: {report.num_layers} of {report.all_layers} layers ({bridges}), {report.gmacs:.1f} GMACs"
        )
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


if TYPE_CHECKING:
    from ca2st.benchmark.model import ModelBenchmark
    from ca2st.spec import ClipSpec
    from pipelines.benchmark.loader import Consumer, LoaderBenchmark, SplitReport
    from ray_jobs.demo.answers import DemoReport
    from ray_jobs.doctor import Finding
