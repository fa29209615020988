"""Several models on one synthetic world with one budget: what each reached, and what the best possible one could."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from ca2st.durable import NO_FAULTS
from ca2st.errors import check_choice
from ca2st.model.config import EXPERTS, ExpertName
from ca2st.model.parameters import count_parameters
from ca2st.training.journal import JOURNAL_NAME, read_events, run_sequence
from pipelines.views import EvaluationViews
from ray_jobs.config.recipe import Recipe
from ray_jobs.launch import launch
from ray_jobs.runs.inference import evaluate_checkpoint, load_trained
from ray_jobs.tracking.following import log_metrics, read_metrics
from ray_jobs.tracking.state import read_state
from sharding.synthetic.factors import ceilings

TOP1, CEILING, TRAINABLE, CLIPS_PER_SECOND = (
    "test/top1",
    "test/ceiling",
    "model/trainable_parameters",
    "train/median_clips_per_second",
)
"""Names in MLflow of what is compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedModel:
    """A way to join the experts, as a change of one recipe."""

    changes: Mapping[str, Any]
    """Settings of `[model]`."""
    senses: str
    """What it is given, as `sharding.synthetic.factors` names it."""
    says: str
    """What it is."""


_ALL_SENSES = "spatial+temporal+audio"
COMPARED: dict[str, ComparedModel] = {
    "spatial": ComparedModel(changes={"kind": "spatial"}, senses="spatial", says="spatial expert alone"),
    "temporal": ComparedModel(changes={"kind": "temporal"}, senses="temporal", says="temporal expert alone"),
    "audio": ComparedModel(changes={"kind": "audio"}, senses="audio", says="audio expert alone"),
    "cast": ComparedModel(changes={"kind": "cast"}, senses="spatial+temporal", says="space and time, B-CA"),
    "cava": ComparedModel(changes={"kind": "cava"}, senses="temporal+audio", says="space and sound, B-CA"),
    "late_add": ComparedModel(
        changes={"kind": "ca2st", "fusion": "late_add"}, senses=_ALL_SENSES, says="all three, features added"
    ),
    "late_concat": ComparedModel(
        changes={"kind": "ca2st", "fusion": "late_concat"}, senses=_ALL_SENSES, says="all three, features side by side"
    ),
    "ca2st": ComparedModel(changes={"kind": "ca2st"}, senses=_ALL_SENSES, says="all three, B-CA"),
}
"""By name. CAVA reads images, yet its time codes put them in order: what bounds it is `temporal+audio`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonRow:
    """One trained and tested model."""

    model: str
    """Name in `COMPARED`."""
    target: str
    """The label space it names."""
    seed: int
    run_id: str | None
    """Its run in MLflow."""
    top1: float
    """Accuracy over all test samples, 0 to 1."""
    ceiling: float
    """The best that anybody could reach with what it is given."""
    chance: float
    """Accuracy of guessing."""
    trainable: int
    """Trained parameters."""
    clips_per_second: float
    """Median over the training's steps."""
    seconds: float
    """Wall time of the training, all attempts together, and of the last test."""
    run_dir: str
    checkpoint: str
    predictions: str
    """Parquet file of the test's predictions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contest:
    """What all compared models share."""

    recipe: Recipe
    """Their recipe, but for `[model]`; `data.synthetic` is the world."""
    train: Path
    """Shards."""
    test: Path
    """Shards that no model has seen."""
    experts: Mapping[ExpertName, str]
    """Files of the pretrained experts, frozen in all of them."""
    out: Path
    """Folder of the runs."""
    views: EvaluationViews
    seeds: tuple[int, ...] = (0,)
    models: Mapping[str, ComparedModel] = field(default_factory=lambda: COMPARED)
    """Models that may be named."""


def run_contest(contest: Contest, names: Sequence[str]) -> Iterator[ComparisonRow]:
    """Train and test each of the named models once per seed; finished runs are only tested again.

    Raises:
        UserInputError: an unknown model, with the nearest name.
    """
    for name in names:
        check_choice("model", name, contest.models)
    for seed in contest.seeds:
        for name in names:
            yield _row(contest, name, seed)


def recipe_of(contest: Contest, name: str, seed: int) -> Recipe:
    """Return the recipe of one model of the contest: the shared one with its own way of joining and its own experts."""
    recipe = contest.recipe
    model = replace(recipe.model, **contest.models[name].changes)
    files = {expert: contest.experts[expert] for expert in EXPERTS[model.kind] if expert in contest.experts}
    return replace(
        recipe,
        name=f"{name}-seed-{seed}",
        model=model,
        experts=replace(recipe.experts, **files),  # type: ignore[arg-type]  # the names of its fields
        data=replace(recipe.data, train=str(contest.train), validation=None),
        training=replace(recipe.training, seed=seed),
    )


def _row(contest: Contest, name: str, seed: int) -> ComparisonRow:
    recipe = recipe_of(contest, name, seed)
    run_dir = contest.out / recipe.name
    outcome = launch(recipe, run_dir, faults=NO_FAULTS)
    begin = perf_counter()
    report = evaluate_checkpoint(Path(outcome.checkpoint), contest.test, contest.views)
    trained = load_trained(Path(outcome.checkpoint))
    (target, classes), *_ = trained.classes.items()
    world = recipe.data.synthetic
    assert world is not None
    facts = {
        TOP1: report.metrics[report.main_metric],
        CEILING: ceilings(world.task, world.world("train"))[contest.models[name].senses],
        TRAINABLE: float(count_parameters(trained.model).trainable),
        CLIPS_PER_SECOND: _median_clips_per_second(run_dir),
    }
    if recipe.tracking.enabled:
        log_metrics(run_dir, facts, step=outcome.steps)
        facts = read_metrics(run_dir, tuple(facts))
    return ComparisonRow(
        model=name,
        target=target,
        seed=seed,
        run_id=read_state(run_dir).run_id if recipe.tracking.enabled else None,
        top1=facts[TOP1],
        ceiling=facts[CEILING],
        chance=1 / len(classes),
        trainable=int(facts[TRAINABLE]),
        clips_per_second=facts[CLIPS_PER_SECOND],
        seconds=_training_seconds(run_dir) + perf_counter() - begin,
        run_dir=str(run_dir),
        checkpoint=outcome.checkpoint,
        predictions=str(report.predictions),
    )


def _median_clips_per_second(run_dir: Path) -> float:
    return float(statistics.median(step["clips_per_second"] for step in run_sequence(run_dir / JOURNAL_NAME)))


def _training_seconds(run_dir: Path) -> float:
    """From the first to the last line of every attempt."""
    times: dict[int, list[float]] = {}
    for line in read_events(run_dir / JOURNAL_NAME):
        times.setdefault(line["attempt"], []).append(line["time"])
    return sum(max(of_attempt) - min(of_attempt) for of_attempt in times.values())
