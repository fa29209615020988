"""A test of a trained model on a shard set: every sample once, on any number of workers, into a predictions file.

A worker needs no other one: it scores one run of the set, in stored order, and writes a part of the predictions. Who
started the workers joins the parts, which proves that they hold the set exactly once, and only then measures
(`ray_jobs.evaluation.protocols`). Workers are processes of this machine, or tasks of a Ray cluster that shares the
folder of the predictions; a task whose node is lost is started again by Ray, and writes its part anew.

A set whose classes are not those of the model (a transfer) is matched by the names of the classes. What only one of the
two has is reported; a sample of a class that the model does not know has no label, and counts in no metric of it.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ca2st.checked_json import encoded, finite
from ca2st.durable import open_itself, take_lock, write_bytes
from ca2st.errors import CA2STError, EnvironmentFault, UserInputError, listed
from ca2st.processes import SPAWN, STOPPING, die_with_parent, num_cores, signals_held
from ca2st.training.evaluate import EvaluationSource, Scored, scored_batches
from ca2st.training.metrics import harmonic_mean, main_metric
from pipelines.storage.index import read_columns
from pipelines.views import EvaluationViews
from ray_jobs import launch
from ray_jobs.console import progress, require_writable_place, say, show_log
from ray_jobs.environment import visible_gpus
from ray_jobs.errors import WorkerFailedError
from ray_jobs.evaluation.perturbations import PERTURBATIONS, DeafVisualExperts, PerturbedSource
from ray_jobs.evaluation.predictions import ExpectedKeys, PredictionFacts, join_parts, label_counts, writing_part
from ray_jobs.evaluation.protocols import measure, write_tables
from ray_jobs.runs import inference
from ray_jobs.runs.failures import death_of
from sharding.cluster import end_tasks
from sharding.format.shard_set import Manifest, ShardSet, classes_that_differ, read_shard_set

_LOCK_NAME = "lock"
_MOST_TRIES = 3
"""Of a Ray task whose node or process is lost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """Who scores."""

    number: int = 1
    """Processes of this machine, or tasks of the cluster."""
    ray_address: str | None = None
    """None: without Ray; ``local``: a Ray of our own; else a cluster's address."""
    accept_open_ray: bool = False
    """Join a cluster that asks for no token."""

    def __post_init__(self) -> None:
        if self.number < 1:
            raise UserInputError(f"--workers: expected at least 1, found {self.number}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelMatch:
    """How the labels of a set become those of a model, by the names of the classes."""

    spaces: dict[str, str]
    """Label space of the set by target of the model; targets of which the set has no labels are left out."""
    maps: dict[str, list[int]]
    """By target: the model's class of each class of the set; -1: the model has none of that name."""
    unmatched: dict[str, dict[str, list[str]]]
    """By target, where there are any: names that only the ``model`` has, and that only the ``set`` has."""
    several: bool
    """Whether a sample may have several labels."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Targets of which there are labels, in the order of the label columns."""
        return tuple(self.spaces)

    def mapped(self, scored: Scored) -> Scored:
        """Return the same with labels of the model: of several labels, a column per class of the model."""
        if not self.spaces or not len(scored):
            return scored
        if self.several:
            (target,) = self.targets
            known = np.array(self.maps[target])
            hot = np.zeros(scored.probabilities[target].shape, np.int64)
            hot[:, known[known >= 0]] = scored.labels[:, known >= 0]
            return replace(scored, labels=hot)
        columns = [np.array(self.maps[name])[scored.labels[:, at]] for at, name in enumerate(self.targets)]
        return replace(scored, labels=np.stack(columns, axis=1))


def match_labels(classes: Mapping[str, Sequence[str]], manifest: Manifest, *, where: str) -> LabelMatch:
    """Match the label spaces of a set with a model's targets by name, and their classes by name.

    A model of one target takes the one target of the set, whatever its name. A set without labels matches all.

    Raises:
        UserInputError: no label space, or no class of one, has a name in common.
    """
    own = {space.name: space.classes for space in manifest.label_spaces if manifest.labelling != "none"}
    spaces = {name: name for name in classes if name in own}
    if own and not spaces:
        if len(classes) > 1 or len(manifest.targets) != 1:
            raise UserInputError(
                f"{where}: expected one of the model's label spaces {', '.join(classes)}, found {', '.join(own)}; "
                "convert with labels that the model knows"
            )
        spaces = {next(iter(classes)): manifest.targets[0]}
    maps, unmatched = {}, {}
    for target, space in spaces.items():
        places = {name: index for index, name in enumerate(classes[target])}
        maps[target] = [places.get(name, -1) for name in own[space]]
        if all(place < 0 for place in maps[target]):
            differing = classes_that_differ(classes[target], own[space], where=("in the model", "in the set"))
            raise UserInputError(
                f"{where}: label space {space!r} has no class of the {len(places)} that the model was trained on: "
                f"{differing}; convert with the same class list (--classes), or with labels that the model knows"
            )
        alone = {"model": sorted(set(places) - set(own[space])), "set": sorted(set(own[space]) - set(places))}
        if any(alone.values()):
            unmatched[target] = alone
    several = manifest.labelling == "several"
    return LabelMatch(spaces=spaces, maps=maps, unmatched=unmatched, several=several)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReport:
    """What a test found."""

    metrics: dict[str, float]
    main_metric: str
    """Which of the metrics stands for the model; there is none of a set without labels."""
    num_samples: int
    predictions: Path
    """Parquet file: see `ray_jobs.evaluation.predictions`."""
    tables: list[Path]
    """Tables by class and pictures of the confusion, beside it."""
    checkpoint: Path
    set_name: str
    """What the set is called in MLflow: ``test/<set>/...``."""
    step: int
    """Updates that the model had."""
    tracked: bool = True
    """Whether the run that trained the model is followed by MLflow."""
    unmatched: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """See `LabelMatch.unmatched`."""
    num_unmatched: dict[str, int] = field(default_factory=dict)
    """By target: samples of a class that the model does not know."""

    @property
    def top1(self) -> float | None:
        """The metric that stands for the model; None where the set has no labels."""
        return self.metrics.get(self.main_metric)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """What a worker needs."""

    checkpoint: Path
    data: str
    views: EvaluationViews
    parts: Path
    """Folder of the parts, on storage that every worker sees."""
    facts: PredictionFacts
    match: LabelMatch
    world_size: int
    seed: int = 0
    """Of the perturbation's draws."""

    def part(self, rank: int) -> Path:
        """Return the file of a rank."""
        return self.parts / f"part-{rank:05d}-of-{self.world_size:05d}.parquet"


def evaluate_checkpoint(
    path: Path,
    data: str | Path,
    views: EvaluationViews,
    *,
    predictions: Path | None = None,
    workers: Workers | None = None,
    perturbation: str = "",
    seed: int = 0,
) -> EvaluationReport:
    """Test the model of a checkpoint or run folder on the shards in `data`, a folder or a URL.

    `workers` None: this process. `perturbation`: a name of `ray_jobs.evaluation.perturbations.PERTURBATIONS`, drawn
    from `seed`; empty: none.

    Raises:
        UserInputError: the shards have no class that the model knows, or another test writes the same predictions.
        DataDamageError: checkpoint or shards are damaged; nothing is skipped, no metric is reported.
        IncompleteEvaluationError: what was scored is not the set.
        WorkerFailedError: a worker failed, with its exit code.
    """
    if predictions is not None:
        require_writable_place(predictions, "--predictions")
    trained, workers = inference.load_trained(path), workers or Workers()
    shard_set = read_shard_set(data, storage=trained.recipe.data.loader.storage)
    match = match_labels(trained.classes, shard_set.manifest, where=shard_set.where)
    out = predictions or inference.output_of_set(trained, shard_set, views, what="predictions")
    facts = _facts(trained, shard_set, match, views, perturbation)
    with _folder_of_parts(out) as parts:
        job = _Job(
            checkpoint=trained.checkpoint.folder.resolve(),
            data=str(data) if "://" in str(data) else str(Path(data).resolve()),
            views=views,
            parts=parts,
            facts=facts,
            match=match,
            world_size=min(workers.number, max(1, facts.num_samples)),
            seed=seed,
        )
        if workers.ray_address is not None:
            _score_on_ray(job, workers)
        elif job.world_size == 1:
            _score_part(job, 0, trained, shard_set, shown=True)
        else:
            _score_in_processes(job)
        expected = ExpectedKeys(
            lambda: (key for _, table in read_columns(shard_set, ["key"]) for key in table.column(0).to_pylist()),
            facts.num_samples,
        )
        files = [job.part(rank) for rank in range(job.world_size)]
        if missing := [str(file) for file in files if not file.exists()]:
            raise EnvironmentFault(
                f"expected the parts of all workers, found none at {listed(missing)}; "
                f"every node must see {parts.parent}"
            )
        join_parts(files, out, facts, expected, num_views=views.num_views)
    return _report(trained, shard_set, out)


@contextmanager
def _folder_of_parts(out: Path) -> Iterator[Path]:
    """An empty folder beside the predictions while the block runs, for this test alone."""
    parts = out.with_name(f"{out.name}.parts").resolve()
    parts.mkdir(parents=True, exist_ok=True)
    with open_itself(parts / _LOCK_NAME, "ab") as lock:
        if not take_lock(lock):
            raise UserInputError(
                f"{out}: expected to be the only test that writes it, found another one at work; wait for it, or name "
                "another file with --predictions"
            )
        for left in parts.iterdir():  # by a test that was killed
            if left.name != _LOCK_NAME:
                left.unlink()
        try:
            yield parts
        finally:
            shutil.rmtree(parts, ignore_errors=True)


def _facts(
    trained: inference.TrainedModel, shard_set: ShardSet, match: LabelMatch, views: EvaluationViews, perturbation: str
) -> PredictionFacts:
    manifest = shard_set.manifest
    return PredictionFacts(
        targets=dict(trained.classes),
        labelled=match.targets,
        several=match.several,
        dataset=manifest.dataset,
        split=manifest.split,
        manifest_fingerprint=manifest.fingerprint,
        num_samples=manifest.num_samples,
        views=f"{views.clips}x{views.crops}",
        recipe=trained.recipe.name,
        model=trained.recipe.model.kind,
        checkpoint=trained.checkpoint.folder.name,
        checkpoint_files={name: facts["sha256"] for name, facts in trained.checkpoint.marker.files.items()},
        unmatched=match.unmatched,
        perturbation=perturbation,
    )


def _report(trained: inference.TrainedModel, shard_set: ShardSet, out: Path) -> EvaluationReport:
    measures = measure(out)
    unmatched, count = measures.facts.unmatched, measures.facts.num_samples
    for target, names in unmatched.items():
        model, own = (f"{len(one)} ({listed(one)})" if one else "0" for one in (names["model"], names["set"]))
        say(f"{shard_set.where}: classes of {target} matched by name; only in the model {model}; only in the set {own}")
    lost = {name: number for name, number in label_counts(out, measures.facts).items() if number}
    for target, number in lost.items():
        say(f"{number} of {count} samples have a {target} that the model does not know; they count in no metric of it")
    tables = write_tables(measures, out)
    document = {**measures.metrics, "num_samples": count, "num_unmatched": lost, "unmatched": unmatched}
    text = json.dumps(finite(document), indent=1, ensure_ascii=False)
    write_bytes(out.with_suffix(".metrics.json"), encoded(text + "\n"))
    return EvaluationReport(
        metrics=measures.metrics,
        main_metric=main_metric(tuple(trained.classes), labelling=shard_set.manifest.labelling),
        num_samples=count,
        predictions=out,
        tables=tables,
        checkpoint=trained.checkpoint.folder,
        set_name=inference.set_name(shard_set),
        step=trained.checkpoint.marker.step,
        tracked=trained.recipe.tracking.enabled,
        unmatched=unmatched,
        num_unmatched=lost,
    )


def _score_part(job: _Job, rank: int, trained: inference.TrainedModel, shard_set: ShardSet, *, shown: bool) -> None:
    """Score one run of the set and write its part; `shown`: with a progress bar."""
    match, perturbation = job.match, job.facts.perturbation
    accelerator = inference.place_model(trained)
    if accelerator.device.type == "cpu" and job.world_size > 1:
        torch.set_num_threads(max(1, num_cores() // job.world_size))
    with ExitStack() as stack:
        loader = stack.enter_context(
            inference.trained_loader(
                trained,
                shard_set,
                tuple(match.spaces.values()),
                views=job.views,
                rank=rank,
                world_size=job.world_size,
                device=accelerator.device,
            )
        )
        own = loader.num_samples // job.world_size
        update = stack.enter_context(progress("Scoring", own)) if shown else (lambda _done, _what: None)
        add = stack.enter_context(writing_part(job.part(rank), job.facts))
        classes = {name: shard_set.manifest.label_space(space).classes for name, space in match.spaces.items()}
        model: nn.Module = accelerator.prepare_model(trained.model, evaluation_mode=True)
        source: EvaluationSource = inference.CountedSource(loader, job.views, update)
        if perturbation:
            source = PerturbedSource(source, perturbation, seed=job.seed, audio=shard_set.manifest.audio)
            model = model if PERTURBATIONS[perturbation].audio_keys else DeafVisualExperts(trained.model)
        batches = scored_batches(
            model,
            source,
            accelerator=accelerator,
            targets=trained.targets,
            per_device_batch_size=trained.recipe.training.per_device_batch_size,
            label_classes={name: len(names) for name, names in classes.items()},
            labelling=trained.labelling,
        )
        for scored in stack.enter_context(closing(batches)):
            add(match.mapped(scored))


def _score_as_worker(job: _Job, rank: int, *, shown: bool = False) -> tuple[str, int] | None:
    """Score in a fresh process; return what failed and its exit code, since not every error can be pickled."""
    try:
        trained = inference.load_trained(job.checkpoint)
        shard_set = read_shard_set(job.data, storage=trained.recipe.data.loader.storage)
        expected, found = job.facts.manifest_fingerprint, shard_set.manifest.fingerprint
        if found != expected:  # the classes of another set would be taken for those of this one
            raise EnvironmentFault(
                f"{shard_set.where}: expected the shard set of the fingerprint {expected[:16]}, found {found[:16]}; "
                "every node must see the same shards"
            )
        _score_part(job, rank, trained, shard_set, shown=shown)
    except CA2STError as error:
        return f"rank {rank}: {type(error).__name__}: {error}", error.exit_code
    return None


def _score_in_processes(job: _Job) -> None:
    """Score in processes of this machine; when one fails the others are ended, and its error is raised."""
    begun = SPAWN.RawArray("b", job.world_size)
    told, tell = SPAWN.Pipe(duplex=False)
    workers = [
        SPAWN.Process(target=_worker_process, args=(rank, job, begun, tell), name=f"rank {rank}")
        for rank in range(job.world_size)
    ]
    with launch.signals_to(workers, begun) as ended_unbegun:
        with signals_held():
            for worker in workers:
                worker.start()
        tell.close()
        failed = launch.ended_badly(workers)
    if failed is None:
        return
    exit_code = 128 + ended_unbegun[0] if ended_unbegun else launch.shell_exit_code(workers[failed])
    if (number := exit_code - 128) in STOPPING:
        raise WorkerFailedError(f"stopped by signal {number:d}; no metric is reported", exit_code)
    with suppress(EOFError):  # it ended without a word
        if told.poll():
            raise WorkerFailedError(*told.recv())
    raise death_of(failed, exit_code)


def _worker_process(rank: int, job: _Job, begun: Any, tell: Any) -> None:
    die_with_parent()
    launch.take_signals()
    begun[rank] = 1
    if visible := visible_gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[rank % len(visible)]
    if rank == 0:
        show_log()
    if (failure := _score_as_worker(job, rank, shown=rank == 0)) is not None:
        tell.send(failure)
        launch.end_at_once(failure[1])


@contextmanager
def scoring_ray(workers: Workers) -> Iterator[None]:
    """Keep the Ray that `workers` ask for while the block runs: all tests in it share its processes.

    Nothing is started where they ask for none, or where this process is in one already.

    Raises:
        UserInputError: the cluster asks for no token, or for another one.
        EnvironmentFault: no cluster answers there.
    """
    if workers.ray_address is None or ("ray" in sys.modules and sys.modules["ray"].is_initialized()):
        yield
        return
    from ray_jobs.cluster.ray_access import LOCAL, found_access, ray_session

    width = max(num_cores(), workers.number) if workers.ray_address == LOCAL else None
    access = found_access(accept_open=workers.accept_open_ray)
    with ray_session(workers.ray_address, access=access, num_cpus=width):
        yield


def _score_on_ray(job: _Job, workers: Workers) -> None:
    """Score in tasks of a Ray cluster: as many at a time as it has room for."""
    with scoring_ray(workers):
        import ray
        from ray.exceptions import RayError, RayTaskError

        from ray_jobs.cluster.ray_access import first_line, living_nodes

        has_gpus = any(node.resources.get("GPU", 0) >= 1 for node in living_nodes())
        needs = (
            {"num_gpus": 1} if has_gpus else {"num_cpus": 1, "runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}}
        )
        task = ray.remote(max_retries=_MOST_TRIES - 1, scheduling_strategy="SPREAD", **needs)(_score_as_worker)
        waiting = [task.remote(job, rank) for rank in range(job.world_size)]
        with progress("Scoring", job.world_size) as update:
            try:
                while waiting:
                    (ready,), waiting = ray.wait(waiting, num_returns=1)
                    if (failure := ray.get(ready)) is not None:
                        raise WorkerFailedError(*failure)
                    update(job.world_size - len(waiting), "workers")
            except RayTaskError:  # a fault of ours
                raise
            except RayError as error:
                lost = (
                    f"Ray lost a task in each of {_MOST_TRIES} tries: {first_line(error)}; look at that node's memory"
                )
                raise WorkerFailedError(lost, EnvironmentFault.exit_code) from error
            finally:
                end_tasks(waiting)


def facts_of(report: EvaluationReport, views: str) -> dict[str, object]:
    """Return what a person or a program is told of a test."""
    return {
        **report.metrics,
        "top1": report.metrics.get("top1", report.top1),
        "num_samples": report.num_samples,
        "num_unmatched": report.num_unmatched,
        "unmatched": report.unmatched,
        "set": report.set_name,
        "views": views,
        "predictions": str(report.predictions),
        "tables": [str(table) for table in report.tables],
        "checkpoint": str(report.checkpoint),
    }


def means_of(reports: Sequence[EvaluationReport]) -> dict[str, float | None]:
    """Return the mean (of the splits of one set) and the harmonic mean (across sets) of what stands for each model."""
    values = [report.top1 for report in reports]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"mean": None, "harmonic_mean": None}
    return {"mean": math.fsum(known) / len(known), "harmonic_mean": harmonic_mean(known)}


def log_to_run(report: EvaluationReport) -> bool:
    """Add a test's metrics and predictions to the run in MLflow that trained the model; False where it is not tracked.

    Raises:
        TrackingUnavailableError: the store cannot be reached.
    """
    from ray_jobs.tracking.sender import log_metrics
    from ray_jobs.tracking.state import STATE_NAME

    run_dir = report.checkpoint.parent.parent
    if not report.tracked or not (run_dir / STATE_NAME).exists():
        say(f"{run_dir} is no folder of a tracked run: nothing goes to MLflow")
        return False
    metrics = {f"test/{report.set_name}/{name}": value for name, value in report.metrics.items()}
    log_metrics(run_dir, metrics | {f"test/{report.set_name}/num_samples": report.num_samples}, step=report.step)
    return True
