"""``make gpu``: everything that only a GPU can show, in under eight minutes.

Limits, parity, decoding rates, damaged clips and models on this machine's GPU. Each part has a process and a time
budget of its own; one that fails is named, and the others go on. The report is
written after each part. The clips are drawn and encoded here.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.gpu_parts import (
    BUDGETS,
    GpuCheckSettings,
    PartName,
    PartResult,
    RunPart,
    dry_settings,
    gpu_settings,
    run_here,
    run_in_process,
)
from benchmarks.programs import make_command
from ca2st.checked_json import encoded
from ca2st.durable import write_bytes
from ca2st.errors import CA2STError, check_choice
from ray_jobs.bench_report import bench_facts, write_report
from ray_jobs.cli import main
from ray_jobs.console import progress, require_writable_place, say

MOST_SECONDS = 478.0
"""Of all parts together: what a part leaves over is not given to another, what is missing the last ones lack."""
_LEAST_SECONDS = 5.0
Update = Callable[[int, str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Aim:
    """A rate that a GPU is to reach, and what was found."""

    what: str
    aim: float
    """Clips per second."""
    found: float | None
    """None: not measured."""

    @property
    def is_met(self) -> bool:
        """Whether it was reached."""
        return self.found is not None and self.found >= self.aim


LOADER_AIM = 450.0
"""Clips per second out of the loader's graphs, augmented, on one H200: what the fastest training there asks for."""
TRAINING_AIMS = {"cast": 336.0, "cava": 548.0, "ca2st": 284.0}
"""Clips per second of a training step with frozen experts on one H200: 60 % of its datasheet's rate."""


app = typer.Typer(add_completion=False)


@app.command(epilog='Example: make gpu ARGS="--only limits,model"')
def gpu(
    only: Annotated[str | None, typer.Option(help=f"Parts, comma between: {', '.join(BUDGETS)}; default: all.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder for the report, under a name with date and device; default: none.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try the program on the CPU with tiny sizes; measures no GPU.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """Measure limits, parity, decoding, damaged clips and models on this machine's GPU, in under eight minutes."""
    settings, parts = dry_settings() if dry_run else gpu_settings(), _parts(only)
    if results is not None:
        require_writable_place(results / "report.json", "--results")
    command = make_command("gpu", sys.argv[1:])

    def kept(found: Mapping[PartName, PartResult]) -> tuple[dict[str, Any], Path | None]:
        document = as_document(found, settings, command=command)
        out = None if results is None else results / file_name(document)
        if out is not None:
            write_bytes(out, encoded(json.dumps(document, indent=1) + "\n"))
        return document, out

    with progress("Trying the GPU", len(parts)) as update:
        run_part = run_here if dry_run else run_in_process
        found = run_parts(settings, run_part, budgets=parts, update=update, done=kept)
    document, out = kept(found)
    write_report(document, lines(document), out=None, as_json=as_json)
    if out is not None:
        say(f"wrote {out}")
    if failed := [name for name, part in found.items() if part.error is not None]:
        raise CA2STError(f"make gpu: parts that ended early: {', '.join(failed)}; the report says why")


def _parts(only: str | None) -> dict[PartName, float]:
    """Budgets of the parts named, all of them by default.

    Raises:
        UserInputError: an unknown name, with the nearest.
    """
    if only is None:
        return BUDGETS
    names = [name.strip() for name in only.split(",")]
    for name in names:
        check_choice("--only", name, BUDGETS)
    return {name: budget for name, budget in BUDGETS.items() if name in names}


def run_parts(
    settings: GpuCheckSettings,
    run_part: RunPart,
    *,
    budgets: Mapping[PartName, float] = BUDGETS,
    update: Update = lambda _done, _note: None,
    done: Callable[[Mapping[PartName, PartResult]], object] = lambda _found: None,
) -> dict[PartName, PartResult]:
    """Run every part, one after the other, whatever became of those before it; `done` gets what there is after each."""
    begin, results = time.monotonic(), dict[PartName, PartResult]()
    for number, (name, budget) in enumerate(budgets.items()):
        update(number, name)
        left = MOST_SECONDS - (time.monotonic() - begin)
        if left < _LEAST_SECONDS:
            results[name] = PartResult(rows=[], error="no time was left for it", seconds=0.0, budget_seconds=0.0)
            continue
        results[name] = run_part(name, settings, min(budget, left))
        done(results)
    update(len(budgets), "")
    return results


def as_document(results: Mapping[PartName, PartResult], settings: GpuCheckSettings, *, command: str) -> dict[str, Any]:
    """Return what is written down; `device` says ``cpu`` of a dry run, whose numbers are those of no GPU."""
    found = {
        "device": settings.device,
        "is_dry_run": settings.is_dry,
        "device_name": _device_name(results, settings),
        "settings": asdict(settings),
        "aims": [asdict(aim) | {"is_met": aim.is_met} for aim in aims(results, settings)],
        "parts": {name: asdict(result) for name, result in results.items()},
    }
    return bench_facts(found, command=command)


def file_name(document: Mapping[str, Any]) -> str:
    """Date and device: ``2026-11-30-nvidia-h200-bench-gpu.json``."""
    device = "cpu-dry-run" if document["is_dry_run"] else document["device_name"]
    slug = re.sub(r"[^a-z0-9]+", "-", str(device).lower()).strip("-")
    return f"{document['date'][:10]}-{slug}-bench-gpu.json"


def aims(results: Mapping[PartName, PartResult], settings: GpuCheckSettings) -> list[Aim]:
    """Return what was aimed at; nothing for a dry run."""
    if settings.is_dry:
        return []
    speed = [row for row in _rows(results, "speed") if row["case"]["rand_augment"] and row["backend"] == "dali-gpu"]
    steps = [
        (model["model"], variant["training"]["clips_per_second"])
        for row in _rows(results, "model")
        for model in row["models"]
        for name, variant in model["variants"].items()
        if name != "baseline"
    ]
    steps += [(row["model"], row["clips_per_second"]) for row in _rows(results, "training") if "error" not in row]
    rates = [row["clips_per_second"] for row in speed]
    loader = Aim(what="clips/s decoded and augmented, best codec", aim=LOADER_AIM, found=max(rates, default=None))
    return [loader] + [
        Aim(
            what=f"clips/s of {kind}'s training step, best way",
            aim=aim,
            found=max((rate for model, rate in steps if model == kind), default=None),
        )
        for kind, aim in TRAINING_AIMS.items()
    ]


def lines(document: Mapping[str, Any]) -> list[str]:
    """Return the short table."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    shown = [
        *(["DRY RUN on the CPU: it tries the program; no number below is a GPU's"] if document["is_dry_run"] else []),
        f"{document['device_name']}: {versions}",
    ]
    for name, part in document["parts"].items():
        state = "" if part["error"] is None else f"  ENDED EARLY: {part['error']}"
        shown.append(f"{name}: {part['seconds']:.0f} of {part['budget_seconds']:.0f} s{state}")
        shown += [f"  {line}" for row in part["rows"] for line in _LINES[name](row)]
    for aim in document["aims"]:
        found = "not measured" if aim["found"] is None else f"{aim['found']:.0f}"
        shown.append(f"aim {aim['aim']:.0f}, found {found}: {aim['what']}{'' if aim['is_met'] else '  NOT MET'}")
    return shown


def _limits(row: Mapping[str, Any]) -> list[str]:
    if "tflops" in row:
        return [f"{row['tflops']:.4g} TFLOP/s ({row['dtype']}, {row['size']} x {row['size']}, {row['product']})"]
    names = ("host_to_device", "device_to_host", "device_to_device")
    return [", ".join(f"{name.replace('_', ' ')} {row[name]:.1f} GB/s" for name in names)]


def _parity(row: Mapping[str, Any]) -> list[str]:
    psnr = "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
    judged = {None: "", True: "  within", False: "  OUTSIDE the tolerance"}[row["is_within"]]
    return [
        f"{row['codec']:<6} {row['stage']:<10} max {row['max_levels']:>3}  mean {row['mean_levels']:.4f}  "
        f"{psnr:>9}{judged}"
    ]


def _speed(row: Mapping[str, Any]) -> list[str]:
    case = row["case"]
    gop = "-" if case["num_gop_frames"] is None else case["num_gop_frames"]
    return [
        f"{case['codec']:<6} gop {gop:>3}  threads {case['threads']:>2}  {row['clips_per_second']:8.1f} clips/s  "
        f"decode {row['decode_ms']:.2f} ms, augment {row['augment_ms']:.2f} ms per clip  {row['backend']}"
        f"{'  RandAugment' if case['rand_augment'] else ''}{'  uneven width' if case.get('is_uneven') else ''}"
    ]


def _damage(row: Mapping[str, Any]) -> list[str]:
    psnr = "" if row["psnr_db"] is None else f" at {row['psnr_db']:.1f} dB"
    return [f"{row['codec']:<6} {row['damage']:<16} {row['outcome']}{psnr}{'' if row['is_sound'] else '  NOT SOUND'}"]


def _model(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{model['model']:<6} {variant:<9} {kind:<9} {facts['clips_per_second']:9.2f} clips/s  "
        f"{facts['peak_memory_bytes'] / 2**30:.2f} GiB"
        for model in row["models"]
        for variant, passes in model["variants"].items()
        for kind, facts in passes.items()
    ]


def _training(row: Mapping[str, Any]) -> list[str]:
    checkpointed = "  checkpointed" if row["checkpointed"] else ""
    way = f"{row['model']:<6} {row['attention']:<9} {row['clips']:>4} clips{checkpointed}"
    if "error" in row:
        return [f"{way}  {row['error']}"]
    return [f"{way}  {row['clips_per_second']:9.2f} clips/s  {row['peak_memory_bytes'] / 2**30:.2f} GiB"]


def _device(row: Mapping[str, Any]) -> list[str]:
    return [", ".join(f"{name} {value}" for name, value in row.items() if value not in ("", None))]


_LINES: dict[str, Callable[[Mapping[str, Any]], Sequence[str]]] = {
    "device": _device,
    "limits": _limits,
    "parity": _parity,
    "speed": _speed,
    "damage": _damage,
    "model": _model,
    "training": _training,
}


def _rows(results: Mapping[PartName, PartResult], name: PartName) -> list[dict[str, Any]]:
    return results[name].rows if name in results else []


def _device_name(results: Mapping[PartName, PartResult], settings: GpuCheckSettings) -> str:
    known = [row[key] for row in _rows(results, "device")[:1] for key in ("gpu", "processor") if row.get(key)]
    return str(known[0]) if known else settings.device


if __name__ == "__main__":
    main(app)
