"""``make gpu``: everything that only a GPU can show, in under eight minutes.

Limits, parity, decoding rates, damaged clips, models and training steps fed from shards on this machine's GPU. Each
part has a process and a time budget of its own; one that fails is named, and the others go on. The report is written
after each part. The clips are drawn and encoded here.
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
    mfu,
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
    """What a GPU is to reach, and what was found."""

    what: str
    aim: float
    """Clips per second, or what `what` says."""
    found: float | None
    """None: not measured."""
    is_most: bool = False
    """Whether less is better."""
    mfu: float | None = None
    """Of a training step: see `benchmarks.gpu_parts.mfu`; None: not a step, or the part that counts was not run."""

    @property
    def is_met(self) -> bool:
        """Whether it was reached."""
        if self.found is None:
            return False
        return self.found < self.aim if self.is_most else self.found >= self.aim


DECODING_AIM = 600.0
"""Clips per second decoded, cropped, resized and flipped by the loader's graphs on one H200."""
TRAINING_AIMS = {"cast": 336.0, "cava": 548.0, "ca2st": 284.0}
"""Clips per second of a training step with frozen experts on one H200. They were set as 60 % of its datasheet's rate by
a count that held more: of what a step computes now they are 56, 55 and 56 %."""
LOADER_AIM = max(TRAINING_AIMS.values())
"""Clips per second out of the loader's graphs, augmented, on one H200: what the fastest training there asks for."""
WAIT_AIM_PERCENT = 2.0
"""Of a fed training step's time, spent waiting for data: less."""


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
    """Measure limits, parity, decoding, damage, models and fed training on this machine's GPU, in under 8 minutes."""
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
    speed = [row for row in _rows(results, "speed") if row["backend"] == "dali-gpu"]
    rates = {
        is_augmented: max(
            (row["clips_per_second"] for row in speed if row["case"]["rand_augment"] is is_augmented), default=None
        )
        for is_augmented in (False, True)
    }
    return [
        Aim(what="clips/s decoded, best codec, key frames and threads", aim=DECODING_AIM, found=rates[False]),
        Aim(what="clips/s decoded and augmented, best codec", aim=LOADER_AIM, found=rates[True]),
        *(_training_aim(results, kind, aim) for kind, aim in TRAINING_AIMS.items()),
        *(_wait_aim(results, kind) for kind in settings.fed_models),
    ]


def _training_aim(results: Mapping[PartName, PartResult], kind: str, aim: float) -> Aim:
    """Return the fastest step of a model that any part found."""
    rates = [
        variant["training"]["clips_per_second"]
        for row in _rows(results, "model")
        for model in row["models"]
        for name, variant in model["variants"].items()
        if model["model"] == kind and name != "baseline"
    ]
    peaks, ways = _training_rows(results)
    rates += [row["clips_per_second"] for row in ways if row["model"] == kind and "error" not in row]
    found = max(rates, default=None)
    share = mfu(found, kind, peaks[0]) if found is not None and peaks and kind in peaks[0]["train_tflop"] else None
    return Aim(what=f"clips/s of {kind}'s training step, best way", aim=aim, found=found, mfu=share)


def _training_rows(results: Mapping[PartName, PartResult]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the row of the device's rates, if it is there, and those of the steps."""
    rows = _rows(results, "training")
    return [row for row in rows if "train_tflop" in row], [row for row in rows if "train_tflop" not in row]


def _wait_aim(results: Mapping[PartName, PartResult], kind: str) -> Aim:
    fed = [row for row in _rows(results, "end_to_end") if row["model"] == kind and row["backend"] == "dali-gpu"]
    return Aim(
        what=f"% of {kind}'s fed training step spent waiting for data, best codec",
        aim=WAIT_AIM_PERCENT,
        found=min((100 * row["data_wait_fraction"] for row in fed), default=None),
        is_most=True,
    )


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
    return shown + [_aim(aim) for aim in document["aims"]]


def _aim(aim: Mapping[str, Any]) -> str:
    found = "not measured" if aim["found"] is None else f"{aim['found']:.{1 if aim['is_most'] else 0}f}"
    share = "" if aim["mfu"] is None else f" ({aim['mfu']:.0%} MFU)"
    state = "" if aim["is_met"] else "  NOT MET"
    return f"aim {'under ' if aim['is_most'] else ''}{aim['aim']:.0f}, found {found}{share}: {aim['what']}{state}"


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
    if "train_tflop" in row:
        stated = "none known" if row["datasheet_tflops"] is None else f"{row['datasheet_tflops']:.4g}"
        work = ", ".join(f"{kind} {tflop:.3g}" for kind, tflop in row["train_tflop"].items())
        return [
            f"MFU: of the datasheet's TFLOP/s ({stated}), or else of a product's ({row['product_tflops']:.4g}); "
            f"TFLOP per clip: {work}"
        ]
    checkpointed = "  checkpointed" if row["checkpointed"] else ""
    way = f"{row['model']:<6} {row['attention']:<9} {row['clips']:>4} clips{checkpointed}"
    if "error" in row:
        return [f"{way}  {row['error']}"]
    return [
        f"{way}  {row['clips_per_second']:9.2f} clips/s  {row['mfu']:6.1%} MFU  "
        f"{row['peak_memory_bytes'] / 2**30:.2f} GiB"
    ]


def _end_to_end(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['model']:<6} from {row['codec']:<6} {row['clips_per_second']:8.1f} clips/s, on one batch all the time "
        f"{row['alone_clips_per_second']:.1f}; waits {row['data_wait_fraction']:.1%} of its time  {row['backend']}"
    ]


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
    "end_to_end": _end_to_end,
}


def _rows(results: Mapping[PartName, PartResult], name: PartName) -> list[dict[str, Any]]:
    return results[name].rows if name in results else []


def _device_name(results: Mapping[PartName, PartResult], settings: GpuCheckSettings) -> str:
    known = [row[key] for row in _rows(results, "device")[:1] for key in ("gpu", "processor") if row.get(key)]
    return str(known[0]) if known else settings.device


if __name__ == "__main__":
    main(app)
