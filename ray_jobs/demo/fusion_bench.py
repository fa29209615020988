"""The bench of fusion: models that join the same frozen experts in different ways, several seeds each, as one table."""

import datetime
import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ca2st.errors import UserInputError, did_you_mean
from ca2st.processes import num_cores
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.demo.comparison import ComparedModel, ComparisonRow, Contest, run_contest
from ray_jobs.demo.pretraining import PretrainedExpert, pretrain
from ray_jobs.demo.tasks import FUSION_TASKS, FusionTask
from ray_jobs.environment import versions
from ray_jobs.runs.synthetic import make_split

_PLACES = ("run_dir", "checkpoint", "predictions", "run_id")
"""Fields of a row that name places of one machine."""


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
        if self.task not in FUSION_TASKS:
            known = list(FUSION_TASKS)
            raise UserInputError(
                f"task: expected one of {', '.join(known)}, found {self.task!r}{did_you_mean(self.task, known)}"
            )
        if self.num_seeds < 1:
            raise UserInputError(f"seeds: expected at least 1, found {self.num_seeds}")
        for name in self.models:
            if name not in self.plan.models:
                known = list(self.plan.models)
                raise UserInputError(
                    f"models: expected some of {', '.join(known)}, found {name!r}{did_you_mean(name, known)}"
                )

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
    """One line a model over its seeds, best mean first."""
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
    """The table as JSON values: date, versions and every row, but no place of this machine."""
    facts = asdict(report)
    facts["rows"] = [{name: value for name, value in row.items() if name not in _PLACES} for row in facts["rows"]]
    facts["experts"] = [{name: value for name, value in one.items() if name != "file"} for one in facts["experts"]]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command,
        "machine": {"cores": num_cores()},
        "versions": versions(),
        **facts,
    }


def _spread(values: Iterable[float]) -> Spread:
    found = list(values)
    return Spread(mean=statistics.fmean(found), lowest=min(found), highest=max(found))
