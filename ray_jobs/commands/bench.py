"""``ca2st bench``: here ``model``; ``loader`` and ``convert`` in bench_loader.py."""

import datetime
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_jobs.commands import bench_fusion, bench_gpu, bench_loader
from ray_jobs.commands.model import Size

if TYPE_CHECKING:
    from ca2st.benchmark.report import ModelBenchmark, ModelReport

app = typer.Typer(no_args_is_help=True)
app.command(epilog=bench_loader.LOADER_EXAMPLE)(bench_loader.loader)
app.command(epilog=bench_loader.CONVERT_EXAMPLE)(bench_loader.convert)
app.command(epilog=bench_fusion.EXAMPLE)(bench_fusion.fusion)
app.command(epilog=bench_gpu.EXAMPLE)(bench_gpu.gpu)


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
    from ca2st.benchmark.config import ModelBenchConfig
    from ca2st.benchmark.model import benchmark_models
    from ray_jobs.console import print_json, progress, result
    from ray_jobs.output_file import require_writable_place

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
    for line in _lines(found):
        result(line)


def _facts(found: "ModelBenchmark") -> dict[str, Any]:
    from dataclasses import asdict

    from ca2st.benchmark.machine import machine
    from ray_jobs.environment import versions

    return {
        **asdict(found),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": " ".join(("ca2st", *sys.argv[1:])),
        "device": asdict(machine(found.plan.device)),
        "versions": versions(),
    }


def _lines(found: "ModelBenchmark") -> list[str]:
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
