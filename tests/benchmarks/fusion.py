"""``make bench-fusion``: models that join the same frozen experts in different ways, several seeds each, as one table.

`holistic` asks for three independent factors at once: each sense knows its own part. `binding` asks which object keeps
time with the sound: no sense knows any part. There the expert that sees keeps the order of frames (VideoMAE in the
place of CAVA's images), and the models are ways to join it with the one that hears.
"""

import itertools
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.programs import make_command
from ca2st.errors import UserInputError, check_choice
from ca2st.model.config import AudioVisualConfig
from pipelines.views import EvaluationViews
from ray_jobs.bench_report import bench_facts, write_report
from ray_jobs.cli import main
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.console import require_writable_place
from ray_jobs.demo.comparison import (
    COMPARED,
    ComparedModel,
    ComparisonRow,
    Contest,
    Lesson,
    PretrainedExpert,
    pretrain,
    run_contest,
)
from ray_jobs.demo.demo import EXPERT_RECIPE, RECIPE, VIEWS
from ray_jobs.runs.data import make_split

_PLACES = ("run_dir", "checkpoint", "predictions", "run_id")
"""Fields of a row that name places of one machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionTask:
    """A world, its experts and the models that join them."""

    recipe: str
    """Name of the recipe that all models share but for `[model]`; its `data.synthetic` is the world."""
    expert_recipe: str
    """Name of the recipe of all experts."""
    lessons: tuple[Lesson, ...]
    """What each expert learns first. The longest lesson first."""
    models: Mapping[str, ComparedModel]
    """Every model that may be named; all of them by default."""
    once: Collection[str] = ()
    """Those of them that are run with the first seed only."""
    views: EvaluationViews
    """Views of a sample in tests."""


def _heard_and_seen(says: str, /, **changes: object) -> ComparedModel:
    return ComparedModel(changes=changes, senses="temporal+audio", says=says)


def _exchange(says: str, /, **changes: Any) -> ComparedModel:
    """CAVA with another setting of its exchange."""
    return _heard_and_seen(says, audio_spatial=AudioVisualConfig(**changes))


_BASELINES: dict[str, ComparedModel] = {
    "video": ComparedModel(changes={"kind": "spatial"}, senses="temporal", says="the expert that sees, alone"),
    "audio": ComparedModel(changes={"kind": "audio"}, senses="audio", says="the expert that hears, alone"),
    "late_add": _heard_and_seen("both, features added", fusion="late_add"),
    "late_concat": _heard_and_seen("both, features side by side", fusion="late_concat"),
    "lateral": _heard_and_seen("both, lateral connections in all layers", fusion="lateral"),
    "cava": _heard_and_seen("both, B-CA in all layers"),
}
ABLATIONS: dict[str, ComparedModel] = {
    "from_audio": _exchange("sound is heard, does not listen (A2S)", directions="from_audio"),
    "to_audio": _exchange("sound listens, is not heard (S2A)", directions="to_audio"),
    "last_layer": _exchange("B-CA in the last layer", last_layers=1),
    "last_2_layers": _exchange("B-CA in the last two layers", last_layers=2),
    "no_positions": _exchange("no position codes", positions="none"),
    "learned_positions": _exchange("learned tables in place of time codes", positions="learned"),
    "reference_time_codes": _heard_and_seen("audio time codes laid out as published", time_code_layout="reference"),
    "ratio_1_8": _heard_and_seen("bottleneck D/8", bottleneck_ratio=1 / 8),
    "ratio_1_4": _heard_and_seen("bottleneck D/4", bottleneck_ratio=1 / 4),
    "ratio_1": _heard_and_seen("no bottleneck, D", bottleneck_ratio=1.0),
    "no_adapters": _heard_and_seen("B-CA alone, no adapters", adapters=False),
}
"""CAVA with one thing changed: the published ablations that an exchange of picture and sound has."""

FUSION_TASKS: dict[str, FusionTask] = {
    "holistic": FusionTask(
        recipe=RECIPE,
        expert_recipe=EXPERT_RECIPE,
        lessons=(
            Lesson(expert="spatial", targets=("space",), epochs=10),
            Lesson(expert="temporal", targets=("time",), epochs=4),
            Lesson(expert="audio", targets=("audio",), epochs=3),
        ),
        models=COMPARED,
        views=VIEWS,
    ),
    "binding": FusionTask(
        recipe="binding_cava",
        expert_recipe="binding_expert",
        lessons=(
            Lesson(expert="spatial", targets=("disc_rhythm", "square_rhythm"), epochs=30),
            Lesson(expert="audio", targets=("rhythm",), epochs=10),
        ),
        models=_BASELINES | ABLATIONS,
        once=ABLATIONS,
        views=EvaluationViews(),
    ),
}
"""By the name that ``--task`` takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionBenchConfig:
    """What is compared."""

    task: str
    """A key of `FUSION_TASKS`."""
    num_seeds: int = 5
    """Runs of every model: seeds 0, 1, ...; those that the task runs once have seed 0 alone."""
    models: tuple[str, ...] = ()
    """Names of the task's models; none: all of them."""
    difficulty: str | None = None
    """Of the world; None: as the task's recipe says."""

    def __post_init__(self) -> None:
        check_choice("task", self.task, FUSION_TASKS)
        if self.num_seeds < 1:
            raise UserInputError(f"seeds: expected at least 1, found {self.num_seeds}")
        for name in self.models:
            check_choice("models", name, self.plan.models)

    @property
    def plan(self) -> FusionTask:
        """The task."""
        return FUSION_TASKS[self.task]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A figure over the seeds."""

    mean: float
    lowest: float
    highest: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionSummary:
    """One model over its seeds."""

    model: str
    says: str
    seeds: tuple[int, ...]
    top1: Spread
    """Accuracy, 0 to 1."""
    ceiling: float
    """The best that anybody could reach with what the model is given."""
    chance: float
    trainable: int
    """Trained parameters."""
    clips_per_second: Spread
    """In training; each seed's is the median over its steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionReport:
    """All that was found."""

    task: str
    difficulty: str
    experts: tuple[PretrainedExpert, ...]
    rows: tuple[ComparisonRow, ...]
    """Every model and seed."""
    summaries: tuple[FusionSummary, ...]
    """Best mean first."""
    separated: tuple[tuple[str, str], ...]
    """Pairs of models of which the first was better in its worst seed than the second in its best; only models with at
    least two seeds."""


def run_fusion_bench(config: FusionBenchConfig, out: Path) -> FusionReport:
    """Make world, shards and experts under `out`, then train and test every model with every seed.

    What is already there is kept, so a stopped bench goes on where it stopped, and one of other models or more seeds
    only adds to it.
    """
    plan = config.plan
    changes = () if config.difficulty is None else (f"data.synthetic.difficulty={config.difficulty}",)
    recipe = load_recipe(plan.recipe, changes)
    world = recipe.data.synthetic
    assert world is not None
    shards = {split: make_split(world, split, out / "synthetic") for split in ("train", "validation")}
    train, test = shards["train"], shards["validation"]
    experts = pretrain(plan.lessons, load_recipe(plan.expert_recipe), train=train, test=test, out=out)
    contest = Contest(
        recipe=recipe,
        train=train,
        test=test,
        experts={expert.expert: expert.file for expert in experts},
        out=out,
        views=plan.views,
        seeds=tuple(range(config.num_seeds)),
        models=plan.models,
    )
    names = config.models or tuple(plan.models)
    rows = tuple(run_contest(contest, [name for name in names if name not in plan.once]))
    rows += tuple(run_contest(replace(contest, seeds=(0,)), [name for name in names if name in plan.once]))
    summaries = summarise(rows, plan.models)
    return FusionReport(
        task=config.task,
        difficulty=world.difficulty,
        experts=tuple(experts),
        rows=rows,
        summaries=summaries,
        separated=tuple(separated(summaries)),
    )


def summarise(rows: Sequence[ComparisonRow], models: Mapping[str, ComparedModel]) -> tuple[FusionSummary, ...]:
    """Return one line per model over its seeds, best mean first."""
    by_model: dict[str, list[ComparisonRow]] = {}
    for row in rows:
        by_model.setdefault(row.model, []).append(row)
    summaries = [
        FusionSummary(
            model=name,
            says=models[name].says,
            seeds=tuple(row.seed for row in own),
            top1=_spread(row.top1 for row in own),
            ceiling=own[0].ceiling,
            chance=own[0].chance,
            trainable=own[0].trainable,
            clips_per_second=_spread(row.clips_per_second for row in own),
        )
        for name, own in by_model.items()
    ]
    return tuple(sorted(summaries, key=lambda summary: -summary.top1.mean))


def separated(summaries: Sequence[FusionSummary]) -> Iterator[tuple[str, str]]:
    """Pairs (better, worse) whose ranges over the seeds do not overlap; a single seed says nothing."""
    several = [summary for summary in summaries if len(summary.seeds) > 1]
    for better, worse in itertools.permutations(several, 2):
        if better.top1.lowest > worse.top1.highest:
            yield better.model, worse.model


def fusion_facts(report: FusionReport, *, command: str) -> dict[str, Any]:
    """Return the table as JSON values: date, versions and every row, but no place of this machine."""
    facts = asdict(report)
    facts["rows"] = [{name: value for name, value in row.items() if name not in _PLACES} for row in facts["rows"]]
    facts["experts"] = [{name: value for name, value in one.items() if name != "file"} for one in facts["experts"]]
    return bench_facts(facts, command=command)


def _spread(values: Iterable[float]) -> Spread:
    found = list(values)
    return Spread(mean=statistics.fmean(found), lowest=min(found), highest=max(found))


app = typer.Typer(add_completion=False)


@app.command(epilog='Example: make bench-fusion ARGS="--task binding --seeds 3 --models cava,late_add"')
def fusion(
    task: Annotated[str, typer.Option(help="holistic: three factors at once; binding: who keeps time with the sound.")],
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
    names = tuple(name.strip() for name in (models or "").split(",") if name.strip())
    config = FusionBenchConfig(task=task, num_seeds=seeds, models=names, difficulty=difficulty)
    if table is not None:
        require_writable_place(table, "--table")
    report = run_fusion_bench(config, out or Path("runs") / f"fusion-{task}")
    write_report(fusion_facts(report, command=_command(config)), _lines(report), out=table, as_json=as_json)


def _command(config: FusionBenchConfig) -> str:
    """Return the command that makes the same table elsewhere: without the folders and files of this machine."""
    options = ["--task", config.task, "--seeds", str(config.num_seeds)]
    if config.models:
        options += ["--models", ",".join(config.models)]
    if config.difficulty is not None:
        options += ["--difficulty", config.difficulty]
    return make_command("bench-fusion", options)


def _lines(report: FusionReport) -> list[str]:
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


def _line(summary: FusionSummary) -> str:
    top1 = summary.top1
    return (
        f"{summary.model:<20} {top1.mean:>7.1%} {top1.lowest:>7.1%} {top1.highest:>7.1%} {summary.ceiling:>8.1%} "
        f"{summary.trainable:>9,} {summary.clips_per_second.mean:>8.0f}  {summary.says}"
    )


def _apart(report: FusionReport) -> list[str]:
    worse = {summary.model: [b for a, b in report.separated if a == summary.model] for summary in report.summaries}
    return [f"  {model} > {', '.join(others)}" for model, others in worse.items() if others] or ["  no model"]


if __name__ == "__main__":
    main(app)
