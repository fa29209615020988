"""What every training process runs, however it was started: recipe in, trained run folder out."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ca2st.checked_json import encoded, read_json
from ca2st.durable import FaultPoints, write_bytes
from ca2st.errors import CA2STError, UserInputError
from ca2st.model import network
from ca2st.model.config import HeldPrecision
from ca2st.model.experts import EncoderLayer
from ca2st.processes import num_cores
from ca2st.training.attention_kernel import settle_attention
from ca2st.training.best import Score
from ca2st.training.config import TrainingConfig
from ca2st.training.loop import train
from ca2st.training.metrics import main_metric
from ca2st.training.optim import ParameterRules
from ca2st.training.ranks import Ranks
from ca2st.training.resume import RunRecord, library_versions
from ca2st.training.settings import TrainingProgress, TrainingSettings
from ca2st.training.sharded import shard_model
from ca2st.training.signals import StopRequest, stop_on_signals
from ca2st.training.step import make_accelerator
from pipelines.loader import TrainLoader
from pipelines.order.plan import rank_positions
from ray_jobs import environment
from ray_jobs.config.recipe import Recipe, identity_settings, recipe_document, recipe_from_document
from ray_jobs.console import progress
from ray_jobs.runs.data import TrainingData, open_data, train_loader, validation_loader
from ray_jobs.runs.failures import forget_failure
from ray_jobs.runs.model import RUN_DOCUMENT, begin_model, keep_frozen
from ray_jobs.runs.node_metrics import NodeMetrics

OUTCOME_NAME = "outcome.json"

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Everything a worker process needs; plain JSON values, so that it travels anywhere."""

    recipe: dict[str, Any]
    """The resolved recipe."""
    run_dir: str
    """The run's folder, on storage that every worker sees."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a finished training leaves, as rank 0 reports it."""

    checkpoint: str
    """Folder of the last checkpoint."""
    steps: int
    """Updates made."""
    metrics: dict[str, float | None]
    """Last validation metrics."""
    main_metric: str
    """Which of them the run is judged by: ``top1``, ``action_top1`` of verb and noun, or ``map`` of several labels."""
    best: dict[str, str | int | float | None] | None = None
    """The best validation: ``metric``, ``value``, ``step``, and ``checkpoint`` where that is kept."""
    ended_early: str | None = None
    """Why it ended before its last step; None: it did not."""


def read_outcome(run_dir: Path) -> Outcome:
    """Return the outcome that rank 0 wrote.

    Raises:
        CA2STError: there is none although the workers ended well.
    """
    path = run_dir / OUTCOME_NAME
    if not path.exists():
        raise CA2STError(f"{path}: expected after a finished training, found nothing; see {run_dir}/journal.jsonl")
    return read_json(path, Outcome)


def run(job: Job, *, faults: FaultPoints, stop: StopRequest | None = None) -> Outcome:
    """Train on this rank until the run is finished, resuming what the run folder holds.

    `stop`: where a request to save and end arrives; None: SIGTERM and SIGINT are one, only in a process's main thread.
    """
    recipe, run_dir = recipe_from_document(job.recipe), Path(job.run_dir)
    accelerator = make_accelerator(recipe.training, cpu=use_cpu_threads(recipe))
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    with ExitStack() as stack:
        data = open_data(recipe)
        reading = _with_own_cores(recipe)
        source = train_loader(reading, data, rank=rank, world_size=world_size, run_dir=run_dir, device=device)
        loader = stack.enter_context(source)
        validation = stack.enter_context(
            validation_loader(reading, data, rank=rank, world_size=world_size, device=device)
        )
        begun = begin_model(recipe, data.classes, run_dir)
        frozen = keep_frozen(begun.model, run_dir)
        held = _make_ready(begun.model, recipe, device=accelerator.device.type)
        on_main = Ranks(accelerator).on_main
        kernels = settle_attention(begun.model, recipe.training, device=device, folder=run_dir, on_main=on_main)
        if recipe.training.sharded and world_size > 1:
            _check_equal_shares(recipe.training, world_size)
            shard_model(begun.model, units_of(begun.model), device=accelerator.device)
        settings = TrainingSettings(
            folder=run_dir,
            config=recipe.training,
            optim=recipe.optim,
            rules=_parameter_rules(begun.model),
            targets={name: len(classes) for name, classes in data.classes.items()},
            labelling=data.labelling,
            record=_record(recipe, data, loader, frozen=frozen, start=begun.identity),
            topology={"experts_precision": held, **({"attention": kernels} if kernels else {})},
            started_from=begun.note,
            faults=faults,
            progress=stack.enter_context(_shown(recipe, loader)) if rank == 0 else None,
        )
        if accelerator.is_local_main_process and (seconds := recipe.tracking.system_metrics_seconds):
            stack.enter_context(NodeMetrics(run_dir, every_seconds=seconds))
        if stop is None:
            stop = stack.enter_context(stop_on_signals(grace_seconds=recipe.training.grace_seconds))
        result = train(
            begun.model, loader, accelerator=accelerator, settings=settings, validation=validation, stop=stop
        )
    outcome = Outcome(
        checkpoint=str(result.checkpoint),
        steps=result.steps,
        metrics=dict(result.metrics),
        main_metric=main_metric(data.targets, labelling=data.labelling),
        best=None if result.best is None else _plain(result.best),
        ended_early=result.ended_early,
    )
    if rank == 0:
        write_bytes(run_dir / OUTCOME_NAME, encoded(json.dumps(asdict(outcome), indent=1, ensure_ascii=False) + "\n"))
        forget_failure(run_dir)
    accelerator.end_training()
    return outcome


def _plain(score: Score) -> dict[str, str | int | float | None]:
    kept = None if score.checkpoint is None else str(score.checkpoint)
    return {"metric": score.metric, "value": score.value, "step": score.step, "checkpoint": kept}


def use_cpu_threads(recipe: Recipe) -> bool:
    """Return whether this machine has no GPU; torch then gets this worker's share of the cores."""
    if torch.cuda.is_available():
        return False
    torch.set_num_threads(recipe.launch.torch_threads(num_cores()))
    return True


def _with_own_cores(recipe: Recipe) -> Recipe:
    """Return the recipe with decoding threads for this worker's share of the machine's cores, where it names none."""
    if recipe.data.loader.decode_threads is not None:
        return recipe
    threads = max(1, num_cores() // environment.local_world_size())
    return replace(recipe, data=replace(recipe.data, loader=replace(recipe.data.loader, decode_threads=threads)))


def _make_ready(model: network.HolisticModel, recipe: Recipe, *, device: str) -> HeldPrecision:
    """Apply what saves memory and time and changes numbers by rounding alone; return how the experts are held."""
    if device == "cuda" and recipe.training.precision == "fp32":
        _LOGGER.warning(
            "training.precision = fp32 on a GPU: the recipes of the published table say bf16, which is much faster "
            "(--set training.precision=bf16)"
        )
    held = network.held_precision(recipe.experts.precision, training=recipe.training.precision, device=device)
    network.hold_experts(model, held)
    model.activation_checkpointing = recipe.training.activation_checkpointing
    if recipe.training.compile:
        network.compile_layers(model)
    if recipe.training.deterministic and device == "cuda":
        environment.use_deterministic_kernels()
    return held


def _check_equal_shares(training: TrainingConfig, world_size: int) -> None:
    """Refuse a sharded training whose ranks would run different numbers of micro-batches, and wait for ever."""
    batch, most = training.global_batch_size, training.per_device_batch_size
    shares = [rank_positions(r, world_size, global_batch_size=batch, keep_pairs=True) for r in range(world_size)]
    if len({-(-len(share) // most) for share in shares}) > 1:
        raise UserInputError(
            f"training.sharded: expected as many micro-batches of {most} clips on each of {world_size} workers, found "
            f"shares of {', '.join(str(len(share)) for share in shares)} clips; make training.global_batch_size a "
            f"multiple of {2 * world_size}"
        )


def units_of(model: network.HolisticModel) -> list[nn.Module]:
    """Return what a sharded model gathers and lets go of by itself: modules that are called and hold nearly all of it.

    The halves of an `EncoderLayer` are called one by one, never the layer.
    """
    units: list[nn.Module] = list(model.layers)
    for expert in model.experts.values():
        for own in (expert.layer_at(index) for index in range(model.config.depth)):
            units += (own.attention, own.mlp) if isinstance(own, EncoderLayer) else (own,)
    return [unit for unit in units if any(True for _ in unit.parameters())]


def _parameter_rules(model: network.HolisticModel) -> ParameterRules:
    return ParameterRules(
        layer_index=partial(network.layer_index, depth=model.config.depth),
        num_layers=model.config.depth,
        no_weight_decay=network.no_weight_decay(model),
    )


def _record(
    recipe: Recipe,
    data: TrainingData,
    loader: TrainLoader,
    *,
    frozen: Mapping[str, str],
    start: Mapping[str, str],
) -> RunRecord:
    return RunRecord(
        manifests=data.fingerprints,
        recipe=identity_settings(recipe),
        loader=asdict(loader.record),
        experts=frozen,
        start=start,
        # Older runs chose frames of a varying rate by number, and took clips without sound for ones of an even sound:
        # they go on with a warning, for those clips differ.
        versions=library_versions()
        | environment.versions()
        | {"backend": loader.backend_name, "frames_of_varying_rates": "by time", "clips_without_sound": "masked"},
        documents={
            RUN_DOCUMENT: {
                "recipe": recipe_document(recipe),
                "classes": data.classes,
                "audio": asdict(data.train.manifest.audio),
                "video": asdict(data.train.manifest.video),
                **({} if data.labelling == "one" else {"labelling": data.labelling}),
            }
        },
    )


@contextmanager
def _shown(recipe: Recipe, loader: TrainLoader) -> Iterator[Callable[[TrainingProgress], None]]:
    """A progress bar over all steps of the run."""
    with progress(f"Training {recipe.name}", recipe.training.total_steps(loader.steps_per_epoch)) as update:
        yield lambda state: update(
            state.step,
            f"epoch {state.epoch}  loss {state.loss:.4f}  {state.clips_per_second:.0f} clips/s  "
            f"data wait {state.data_wait_fraction:.0%}",
        )
