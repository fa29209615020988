"""Experts that learn what is theirs of a synthetic world, each alone and all at the same time, to be frozen then."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, cast

from ca2st.durable import NO_FAULTS
from ca2st.errors import EnvironmentFault
from ca2st.model.config import ExpertName, ModelKind
from ca2st.processes import SPAWN, die_with_parent, num_cores
from ca2st.training.metrics import main_metric
from ca2st.weights.importer import ExpertStore, expert_state
from pipelines.views import EvaluationViews
from ray_jobs.config.recipe import Recipe
from ray_jobs.console import progress
from ray_jobs.launch import launch
from ray_jobs.runs.inference import load_trained, score
from ray_jobs.runs.worker import OUTCOME_NAME
from sharding.format.shard_set import read_shard_set


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """What one expert learns, and for how long."""

    expert: ExpertName
    targets: tuple[str, ...]
    """Label spaces of the world."""
    epochs: int
    """Passes over the training shards."""
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
    """Accuracy on the test split, one view a sample; of several label spaces the mean."""
    file: str
    """Its weights."""


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
    runs = [_Run(lesson, _recipe_of(lesson, recipe, train), _views_of(lesson, recipe), test, out) for lesson in lessons]
    finished = [(out / run.recipe.name / OUTCOME_NAME).is_file() for run in runs]
    with progress("Pretraining experts", len(runs)) as update, _processes(len(runs) - sum(finished)) as pool:
        learning = [
            None if is_finished else pool.submit(_learn_quietly, run)
            for run, is_finished in zip(runs, finished, strict=True)
        ]
        experts = []
        for run, future in zip(runs, learning, strict=True):
            experts.append(_learn(run) if future is None else _result(future, run))
            update(len(experts), f"{experts[-1].expert} {experts[-1].top1:.1%}")
    return experts


class _Run(NamedTuple):
    """A lesson with all that its process needs."""

    lesson: Lesson
    recipe: Recipe
    views: EvaluationViews
    test: Path
    out: Path


def _recipe_of(lesson: Lesson, recipe: Recipe, train: Path) -> Recipe:
    return replace(
        recipe,
        name=f"expert-{lesson.expert}",
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


def _learn(run: _Run) -> PretrainedExpert:
    """Train an expert, take it out of its run and test it."""
    lesson = run.lesson
    outcome = launch(run.recipe, run.out / run.recipe.name, faults=NO_FAULTS)
    trained = load_trained(Path(outcome.checkpoint))
    store = ExpertStore(run.out / "experts")
    file = store.path(store.put(expert_state(trained.model, lesson.expert)))
    metrics = score(trained, read_shard_set(run.test), run.views).metrics
    several = len(lesson.targets) > 1
    scores = [metrics[f"{name}_top1" if several else main_metric(lesson.targets)] for name in lesson.targets]
    return PretrainedExpert(
        expert=lesson.expert, factor="+".join(lesson.targets), top1=sum(scores) / len(scores), file=str(file)
    )


def _learn_quietly(run: _Run) -> PretrainedExpert:
    """In a process of its own: several progress bars on one terminal would write over each other."""
    log = run.out / f"{run.recipe.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1) as stream, redirect_stderr(stream):
        return _learn(run)


@contextmanager
def _processes(num_runs: int) -> Iterator[ProcessPoolExecutor]:
    """None is started before the first task. Spawned, never forked: a fork after torch has run hangs."""
    pool = ProcessPoolExecutor(
        max(1, min(num_runs, num_cores())),
        mp_context=SPAWN,
        initializer=die_with_parent,
    )
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result(future: "Future[PretrainedExpert]", run: _Run) -> PretrainedExpert:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise EnvironmentFault(
            f"a process that pretrained an expert died (killed, or out of memory?) before the {run.lesson.expert} "
            f"expert was ready; {run.out}/expert-*.log may say why; run again, finished experts are kept"
        ) from error
