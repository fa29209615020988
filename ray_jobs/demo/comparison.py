"""Several models on one synthetic world with one budget: what each reached, and what the best possible one could.

Their experts first learn what is theirs of that world, each alone and all at the same time, and are frozen then.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, cast

from ca2st.durable import NO_FAULTS
from ca2st.errors import EnvironmentFault, check_choice
from ca2st.model.config import EXPERTS, ExpertName, ModelKind
from ca2st.model.network import count_parameters
from ca2st.processes import SPAWN, die_with_parent, num_cores
from ca2st.training.journal import JOURNAL_NAME, read_events, run_sequence
from ca2st.training.metrics import evaluation_metrics, main_metric
from ca2st.weights.importer import ExpertStore, expert_state
from pipelines.views import EvaluationViews
from ray_jobs.config.recipe import Recipe
from ray_jobs.console import progress
from ray_jobs.evaluation.workers import evaluate_checkpoint
from ray_jobs.launch import launch
from ray_jobs.runs.inference import load_trained, score
from ray_jobs.runs.worker import OUTCOME_NAME
from ray_jobs.tracking.sender import log_metrics, read_metrics
from ray_jobs.tracking.state import read_state
from sharding.format.shard_set import read_shard_set
from sharding.synthetic.factors import ceilings


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """What one expert learns, and for how long."""

    expert: ExpertName
    targets: tuple[str, ...]
    """Label spaces of the world."""
    epochs: int
    num_frames: int | None = None
    """Frames of a view in this lesson, where fewer than the models read are enough: images need no neighbours, and who
    only hears need not wait for pictures. None: as many as the models read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainedExpert:
    """An expert that learned what is its own."""

    expert: ExpertName
    factor: str
    """Its label spaces, ``+`` between them."""
    top1: float
    """Accuracy on the test split, one view per sample; of several label spaces the mean."""
    file: str


def pretrain(
    lessons: Sequence[Lesson], recipe: Recipe, *, train: Path, test: Path, out: Path
) -> list[PretrainedExpert]:
    """Train the expert of each lesson as `recipe` says, and keep it in ``out/experts``; finished runs are only tested.

    `train` and `test` are shards of one world; the experts are tested on samples they have not seen.

    Each gets a process and one thread: small models waste a second one. As many run at once as there are cores, in the
    order given, so the longest should come first. What their runs print goes to ``out/expert-NAME.log``. They are not
    tracked: following three short runs would cost as much as one of them.

    Raises:
        EnvironmentFault: a process died.
        CA2STError: the first that a run raised.
    """
    pending = [lesson for lesson in lessons if not (out / _run_name(lesson) / OUTCOME_NAME).is_file()]
    # Spawned, never forked: a fork after torch has run hangs. None is started before the first task.
    pool = ProcessPoolExecutor(max(1, min(len(pending), num_cores())), mp_context=SPAWN, initializer=die_with_parent)
    experts = []
    with progress("Pretraining experts", len(lessons)) as update:
        try:
            learning = {one.expert: pool.submit(_learn_quietly, one, recipe, train, test, out) for one in pending}
            for lesson in lessons:
                future = learning.get(lesson.expert)
                experts.append(future.result() if future else _learn(lesson, recipe, train, test, out))
                update(len(experts), f"{lesson.expert} {experts[-1].top1:.1%}")
        except BrokenProcessPool as error:
            raise EnvironmentFault(
                "a process that pretrained an expert died (killed, or out of memory?) before the "
                f"{lessons[len(experts)].expert} expert was ready; {out}/expert-*.log may say why; run again, finished "
                "experts are kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return experts


def _run_name(lesson: Lesson) -> str:
    return f"expert-{lesson.expert}"


def _recipe_of(lesson: Lesson, recipe: Recipe, train: Path) -> Recipe:
    return replace(
        recipe,
        name=_run_name(lesson),
        model=replace(recipe.model, kind=cast("ModelKind", lesson.expert)),
        clip=replace(recipe.clip, num_frames=lesson.num_frames or recipe.clip.num_frames),
        data=replace(recipe.data, train=str(train), validation=None, targets=lesson.targets),
        training=replace(recipe.training, epochs=lesson.epochs),
        launch=replace(recipe.launch, threads_per_worker=1),
        tracking=replace(recipe.tracking, enabled=False),
    )


def _views_of(lesson: Lesson, recipe: Recipe) -> EvaluationViews:
    """As many views of a sample as together read the frames of one view of the models."""
    clips = recipe.clip.num_frames // (lesson.num_frames or recipe.clip.num_frames)
    return EvaluationViews(protocol="test", clips=clips, crops=1)


def _learn(lesson: Lesson, recipe: Recipe, train: Path, test: Path, out: Path) -> PretrainedExpert:
    """Train an expert, take it out of its run and test it."""
    outcome = launch(_recipe_of(lesson, recipe, train), out / _run_name(lesson), faults=NO_FAULTS)
    trained = load_trained(Path(outcome.checkpoint))
    store = ExpertStore(out / "experts")
    file = store.path(store.put(expert_state(trained.model, lesson.expert)))
    scored = score(trained, read_shard_set(test), _views_of(lesson, recipe))
    metrics = evaluation_metrics(scored.probabilities, scored.labels)
    several = len(lesson.targets) > 1
    scores = [metrics[f"{name}_top1" if several else main_metric(lesson.targets)] for name in lesson.targets]
    return PretrainedExpert(
        expert=lesson.expert, factor="+".join(lesson.targets), top1=sum(scores) / len(scores), file=str(file)
    )


def _learn_quietly(lesson: Lesson, recipe: Recipe, train: Path, test: Path, out: Path) -> PretrainedExpert:
    """In a process of its own: several progress bars on one terminal would write over each other."""
    log = out / f"{_run_name(lesson)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1) as stream, redirect_stderr(stream):
        return _learn(lesson, recipe, train, test, out)


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
        CLIPS_PER_SECOND: statistics.median(step["clips_per_second"] for step in run_sequence(run_dir / JOURNAL_NAME)),
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


def _training_seconds(run_dir: Path) -> float:
    """From the first to the last line of every attempt."""
    times: dict[int, list[float]] = {}
    for line in read_events(run_dir / JOURNAL_NAME):
        times.setdefault(line["attempt"], []).append(line["time"])
    return sum(max(of_attempt) - min(of_attempt) for of_attempt in times.values())
