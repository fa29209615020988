"""``ca2st bench fusion``."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ray_jobs.synthetic.fusion_bench import FusionBenchConfig, FusionReport, FusionSummary


EXAMPLE = "Example: ca2st bench fusion --task binding --seeds 3 --models cava,late_add --table binding.json"


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
    from ray_jobs.console import print_json, result
    from ray_jobs.output_file import require_writable_place
    from ray_jobs.synthetic.fusion_bench import FusionBenchConfig, fusion_facts, run_fusion_bench

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
