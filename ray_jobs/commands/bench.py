"""``ca2st bench``.

``ca2st bench fusion``.

``ca2st bench gpu``: everything that only a GPU can show, in under ten minutes.

``ca2st bench``: here ``model``; ``loader`` and ``convert`` in bench_loader.py.
"""

import datetime
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_jobs.commands import bench_loader
from ray_jobs.commands.model import Size

if TYPE_CHECKING:
    from ca2st.benchmark.model import ModelBenchmark, ModelReport
    from ray_jobs.demo.fusion_bench import FusionBenchConfig, FusionReport, FusionSummary


FUSION_EXAMPLE = "Example: ca2st bench fusion --task binding --seeds 3 --models cava,late_add --table binding.json"


class Task(StrEnum):
    """What is asked of the models."""

    HOLISTIC = "holistic"
    BINDING = "binding"


def fusion(
    task: Annotated[
        Task, typer.Option(help="holistic: three factors at once; binding: who keeps time with the sound.")
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every model; ablations have one.")] = 5,
    models: Annotated[str | None, typer.Option(help="Names, comma between; default: all of the task.")] = None,
    difficulty: Annotated[
        str | None, typer.Option(help="easy, medium or hard; default: as the task's recipe says.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of everything made; rerun to go on.")] = None,
    table: Annotated[Path | None, typer.Option(help="File for the table with every row, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """Ways to join the same frozen experts, each trained with the same budget and several seeds, in one table."""
    from ray_jobs.console import print_json, require_writable_place, result
    from ray_jobs.demo.fusion_bench import FusionBenchConfig, fusion_facts, run_fusion_bench

    names = tuple(name.strip() for name in (models or "").split(",") if name.strip())
    config = FusionBenchConfig(task=task.value, num_seeds=seeds, models=names, difficulty=difficulty)
    if table is not None:
        require_writable_place(table, "--table")
    report = run_fusion_bench(config, out or Path("runs") / f"fusion-{task.value}")
    facts = fusion_facts(report, command=_command(config))
    if table is not None:
        table.write_text(json.dumps(facts, indent=1) + "\n")
    if as_json:
        print_json(facts)
        return
    for line in _lines(report):
        result(line)


def _command(config: "FusionBenchConfig") -> str:
    """The command that makes the same table elsewhere: without the folders and files of this machine."""
    told = ["ca2st", "bench", "fusion", "--task", config.task, "--seeds", str(config.num_seeds)]
    if config.models:
        told += ["--models", ",".join(config.models)]
    if config.difficulty is not None:
        told += ["--difficulty", config.difficulty]
    return " ".join(told)


def _lines(report: "FusionReport") -> list[str]:
    first = report.summaries[0]
    seeds = max(len(summary.seeds) for summary in report.summaries)
    lines = [
        f"{report.task}, {report.difficulty}: top-1 over {seeds} seed(s), chance {first.chance:.1%}",
        f"{'model':<20} {'mean':>7} {'lowest':>7} {'highest':>7} {'ceiling':>8} {'trained':>9} {'clips/s':>8}  what",
        *map(_line, report.summaries),
        "The ceiling is the best that anybody could reach with what a model is given.",
        "Experts alone: " + ", ".join(f"{one.expert} {one.top1:.1%} on {one.factor}" for one in report.experts),
    ]
    if seeds > 1:
        lines += ["Better in the worst seed than the other in its best:", *_apart(report)]
    return lines


def _line(summary: "FusionSummary") -> str:
    top1 = summary.top1
    return (
        f"{summary.model:<20} {top1.mean:>7.1%} {top1.lowest:>7.1%} {top1.highest:>7.1%} {summary.ceiling:>8.1%} "
        f"{summary.trainable:>9,} {summary.clips_per_second.mean:>8.0f}  {summary.says}"
    )


def _apart(report: "FusionReport") -> list[str]:
    worse = {summary.model: [b for a, b in report.separated if a == summary.model] for summary in report.summaries}
    return [f"  {model} > {', '.join(others)}" for model, others in worse.items() if others] or ["  no model"]


GPU_EXAMPLE = "Example: ca2st bench gpu --results tests/benchmarks/results"


def gpu(
    results: Annotated[
        Path | None, typer.Option(help="Folder for the report, under a name with date and device; default: none.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try the program on the CPU with tiny sizes; measures no GPU.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """Limits, parity, decoding rates, damaged clips and models on this machine's GPU.

    Each part has a process and a time budget of its own; one that fails is named, and the others go on. The clips are
    drawn and encoded here.
    """
    from ca2st.errors import CA2STError
    from ray_jobs.console import print_json, progress, require_writable_place, result, say
    from ray_jobs.gpu_check.parts import BUDGETS, dry_settings, gpu_settings, run_here, run_in_process
    from ray_jobs.gpu_check.report import as_document, file_name, lines, run_parts

    settings = dry_settings() if dry_run else gpu_settings()
    if results is not None:
        require_writable_place(results / "report.json", "--results")
    with progress("Trying the GPU", len(BUDGETS)) as update:
        found = run_parts(settings, run_here if dry_run else run_in_process, update=update)
    document = as_document(found, settings, command=" ".join(("ca2st", *sys.argv[1:])))
    if results is not None:
        place = results / file_name(document)
        place.write_text(json.dumps(document, indent=1) + "\n")
        say(f"wrote {place}")
    if as_json:
        print_json(document)
    else:
        for line in lines(document):
            result(line)
    if failed := [name for name, part in found.items() if part.error is not None]:
        raise CA2STError(f"bench gpu: parts that ended early: {', '.join(failed)}; the report says why")


app = typer.Typer(no_args_is_help=True)
app.command(epilog=bench_loader.LOADER_EXAMPLE)(bench_loader.loader)
app.command(epilog=bench_loader.CONVERT_EXAMPLE)(bench_loader.convert)
app.command(epilog=FUSION_EXAMPLE)(fusion)
app.command(epilog=GPU_EXAMPLE)(gpu)


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
    out: Annotated[Path | None, typer.Option(help="File for the report, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """Clips a second, memory and share of the device's limit, beside the plain formulation in the same run.

    For each model: the forward pass, and the training step with frozen experts (loss, backward, AdamW). The variants
    take turns, pass by pass; medians and ranges are reported. The headline is the first model's training step.
    """
    from ca2st.benchmark.case import ModelBenchConfig
    from ca2st.benchmark.model import benchmark_models
    from ray_jobs.console import print_json, progress, require_writable_place, result

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
    facts = _facts(found)
    if out is not None:
        out.write_text(json.dumps(facts, indent=2) + "\n")
    if as_json:
        print_json(facts)
        return
    for line in _lines_of_bench(found):
        result(line)


def _facts(found: "ModelBenchmark") -> dict[str, Any]:
    from dataclasses import asdict

    from ca2st.benchmark.measure import machine
    from ray_jobs.environment import versions

    return {
        **asdict(found),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": " ".join(("ca2st", *sys.argv[1:])),
        "device": asdict(machine(found.plan.device)),
        "versions": versions(),
    }


def _lines_of_bench(found: "ModelBenchmark") -> list[str]:
    plan, limit = found.plan, found.limit
    lines = [
        f"{plan.size} on {plan.device}, {plan.precision}, {plan.per_device_batch_size} clip(s) a pass; limit "
        f"{limit.tflops:.3g} TFLOP/s ({limit.dtype}, {limit.size} x {limit.size}, {limit.product}); "
        f"load before: {found.load_before:.1f}"
    ]
    for model in found.models:
        lines += _model_lines(model)
    return lines


def _model_lines(report: "ModelReport") -> list[str]:
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
