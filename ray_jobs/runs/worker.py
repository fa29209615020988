"""A training: everything checked once before it starts, then what every worker runs, however it was started."""

import contextlib
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

from ca2st.checked_json import DocumentError, encoded, read_json
from ca2st.durable import FaultPoints, write_bytes
from ca2st.errors import CA2STError, UserInputError
from ca2st.model import network
from ca2st.model.config import EXPERTS, HeldPrecision, check_clip
from ca2st.model.experts import EncoderLayer
from ca2st.processes import num_cores
from ca2st.training import checkpoint
from ca2st.training.attention_kernel import settle_attention
from ca2st.training.config import TrainingConfig
from ca2st.training.errors import CheckpointDamagedError, ResumeRefusedError
from ca2st.training.journal import differences
from ca2st.training.loop import train
from ca2st.training.metrics import main_metric
from ca2st.training.optim import ParameterRules
from ca2st.training.ranks import Ranks
from ca2st.training.resume import RECIPE_FILE, RunRecord, library_versions
from ca2st.training.settings import TrainingProgress, TrainingSettings
from ca2st.training.sharded import shard_model
from ca2st.training.signals import StopRequest, stop_on_signals
from ca2st.training.step import make_accelerator
from ca2st.weights.hub import HubAccess, is_hub_name, resolve_hub_name
from pipelines.loader import TrainLoader
from pipelines.order.plan import SamplePlan, rank_positions
from pipelines.storage.shard_sets import check_sound
from ray_jobs import environment
from ray_jobs.config.recipe import Recipe, identity_settings, recipe_document, recipe_from_document
from ray_jobs.config.recipe_file import stored_recipe
from ray_jobs.console import progress
from ray_jobs.runs.data import (
    TrainingData,
    evaluation_loader,
    open_data,
    synthetic_classes,
    train_setup,
    with_synthetic_shards,
)
from ray_jobs.runs.failures import forget_failure
from ray_jobs.runs.model import (
    IMPORTED_FOLDER,
    RUN_DOCUMENT,
    begin_model,
    keep_frozen,
    read_run_document,
    start_sound,
    with_local_experts,
)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A training that was checked and can start."""

    recipe: Recipe
    """With shards and files in place of a synthetic world and public names."""
    data: TrainingData
    num_steps: int
    """Steps of the whole run."""


def prepare(recipe: Recipe, run_dir: Path, access: HubAccess) -> Prepared:
    """Check everything about a training that can be refused before a process is started, and fetch what it needs.

    A synthetic world is drawn last: what is wrong with settings and model shows without it.

    Raises:
        UserInputError: as `check_settings`, `open_checked`, `begin_model`, or as `refuse_other_recipe`.
        PlanError: fewer samples than the batch or the workers need.
        EnvironmentFault: the hub of public weights cannot be reached.
    """
    check_settings(recipe)
    data, classes = None, synthetic_classes(recipe)
    if classes is None:
        data, plan = open_checked(recipe)
        classes = data.classes
    recipe = with_local_experts(recipe, run_dir.parent / IMPORTED_FOLDER, access)
    begin_model(recipe, classes, run_dir, is_outline=True)
    refuse_other_recipe(recipe, run_dir)
    if data is None:
        recipe = with_synthetic_shards(recipe, run_dir.parent)
        data, plan = open_checked(recipe)
    return Prepared(recipe=recipe, data=data, num_steps=recipe.training.total_steps(plan.num_steps))


def finished(ready: Prepared, run_dir: Path) -> Outcome | None:
    """Return the outcome of a run whose last step was made, validated and reported; None where anything is left to do.

    Raises:
        UserInputError: it is a run on other data or with other weights.
        CheckpointDamagedError: there are checkpoints and none is sound.
    """
    try:
        outcome = read_json(run_dir / OUTCOME_NAME, Outcome)
    except (FileNotFoundError, DocumentError):
        return None
    marker, damaged = checkpoint.newest_sound(run_dir / checkpoint.CHECKPOINTS_NAME, checkpoint.verify_checkpoint)
    if marker is None or damaged or marker.step < ready.num_steps:
        return None
    begun = begin_model(ready.recipe, ready.data.classes, run_dir)
    was = {"manifests": marker.manifests, "experts": marker.experts, "start": marker.start}
    now = {
        "manifests": ready.data.fingerprints,
        "experts": keep_frozen(begun.model, run_dir),
        "start": begun.identity,
    }
    if changed := differences(was, now):
        listed = "\n  ".join(changed)
        raise ResumeRefusedError(f"{run_dir}: holds a run on other data or weights; choose another --out:\n  {listed}")
    folder = checkpoint.list_checkpoints(run_dir / checkpoint.CHECKPOINTS_NAME)[0]
    _LOGGER.info("already finished, nothing to train: step %d of %d from %s", marker.step, ready.num_steps, folder)
    return replace(outcome, checkpoint=str(folder))


def preflight(recipe: Recipe) -> TrainingData:
    """Check settings and data; raises as `check_settings` and `open_checked`."""
    check_settings(recipe)
    return open_checked(recipe)[0]


def open_checked(recipe: Recipe) -> tuple[TrainingData, SamplePlan]:
    """Open the data of a training, and plan which of its samples are read.

    Raises:
        UserInputError: as `open_data` and `TrainSetup.plan`, or the model hears and starts from one whose spectrograms
            were made otherwise.
        PlanError: fewer samples than the batch or the workers need.
    """
    data = open_data(recipe)
    if recipe.start is not None and "audio" in EXPERTS[recipe.model.kind]:
        where = Path(recipe.start.checkpoint)
        if (sound := start_sound(where)) is not None:
            check_sound(data.train, sound, whose=f"start.checkpoint {where}")
    plan = train_setup(recipe, data).plan()
    plan.require_enough(world_size=recipe.launch.workers)
    return data, plan


def check_settings(recipe: Recipe) -> None:
    """Refuse what the recipe alone shows to be wrong; no data is read and nothing is fetched.

    Raises:
        UserInputError: a line for each of these: clip and model do not fit, pairs are mixed by what the model does not
            read, it has no such expert, or an expert's file is not there or its public name not known.
    """
    problems: list[str] = []
    kind, mixing = recipe.model.kind, recipe.data.augment.mixing
    own = EXPERTS[kind]
    try:
        check_clip(recipe.model, recipe.clip)
    except UserInputError as error:
        problems.append(f"clip.{error}")
    if mixing.probability > 0 and mixing.spectrogram == "cutmix" and "audio" not in own:
        problems.append(
            f"data.augment.mixing.spectrogram: expected 'mixup' for {kind}, which does not hear, found "
            "'cutmix'; the labels would follow a box that the model never sees"
        )
    if mixing.probability > 0 and mixing.switch_probability > 0 and own == ("audio",):
        problems.append(
            "data.augment.mixing.switch_probability: expected 0 for audio, which does not see, found "
            f"{mixing.switch_probability}; the labels would follow a box that the model never sees"
        )
    for name, source in recipe.experts.sources().items():
        if name not in own:
            problems.append(
                f"experts.{name}: expected experts of {kind}, which are {', '.join(own)}, found {source}; "
                "remove the setting or choose another model.kind"
            )
        elif is_hub_name(source):
            try:
                resolve_hub_name(source)
            except UserInputError as error:
                problems.append(f"experts.{name}: {error}")
        elif not Path(source).is_file():
            problems.append(
                f"experts.{name}: expected a safetensors file, found none at {source}; check the path, or give a "
                "public name (hf-hub:..., open_clip:..., timm:...)"
            )
    if problems:
        raise UserInputError("\n".join(problems))


def refuse_other_recipe(recipe: Recipe, run_dir: Path) -> None:
    """Refuse a run folder whose recipe would give other numbers: a UserInputError that lists what differs."""
    stored = kept_recipe(run_dir)
    kept = identity_settings(recipe if stored is None else stored)
    if changed := differences(kept, identity_settings(recipe)):
        listed = "\n  ".join(changed)
        raise UserInputError(
            f"{run_dir}: holds a run of another recipe; choose another --out or undo the change:\n  {listed}"
        )


def kept_recipe(run_dir: Path) -> Recipe | None:
    """Return the recipe of a run folder: its newest sound checkpoint's, else the one kept at its start, or None.

    A damaged file is named in a warning.
    """
    document = None
    try:
        document = read_json(run_dir / RECIPE_FILE, dict[str, Any])
    except FileNotFoundError:
        pass
    except DocumentError as error:
        _LOGGER.warning("DAMAGED %s; it is written anew, the checkpoints know their recipe", error)
    for folder in checkpoint.list_checkpoints(run_dir / checkpoint.CHECKPOINTS_NAME):
        with contextlib.suppress(CheckpointDamagedError):  # who resumes names it
            if (data := checkpoint.read_checkpoint_file(folder, f"{RUN_DOCUMENT}.json")) is not None:
                return read_run_document(data, where=str(folder)).recipe
    return None if document is None else stored_recipe(document, where=str(run_dir))


def run(job: Job, *, faults: FaultPoints, stop: StopRequest | None = None) -> Outcome:
    """Train on this rank until the run is finished, resuming what the run folder holds.

    `stop`: where a request to save and end arrives; None: SIGTERM and SIGINT are one, only in a process's main thread.
    """
    recipe, run_dir = recipe_from_document(job.recipe), Path(job.run_dir)
    accelerator = make_accelerator(recipe.training, cpu=use_cpu_threads(recipe))
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    with ExitStack() as stack:
        data, validation, reading = open_data(recipe), None, _with_own_cores(recipe)
        here: dict[str, Any] = {"rank": rank, "world_size": world_size, "device": device}
        loader = stack.enter_context(TrainLoader(train_setup(reading, data, run_dir=run_dir, **here)))
        if data.validation is not None:
            source = evaluation_loader(reading, data.validation, data.targets, views=recipe.data.views, **here)
            validation = stack.enter_context(source)
        begun = begin_model(recipe, data.classes, run_dir)
        frozen = keep_frozen(begun.model, run_dir)
        held = _make_ready(begun.model, recipe, device=device.type)
        on_main = Ranks(accelerator).on_main
        kernels = settle_attention(begun.model, recipe.training, device=device, folder=run_dir, on_main=on_main)
        if recipe.training.sharded and world_size > 1:
            _check_equal_shares(recipe.training, world_size)
            shard_model(begun.model, units_of(begun.model), device=device)
        settings = TrainingSettings(
            folder=run_dir,
            config=recipe.training,
            optim=recipe.optim,
            rules=_parameter_rules(begun.model),
            targets={name: len(classes) for name, classes in data.classes.items()},
            labelling=data.labelling,
            record=_record(recipe, data, loader, frozen=frozen, start=begun.identity),
            topology={"experts_precision": held} | ({"attention": kernels} if kernels else {}),
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
    best = result.best
    outcome = Outcome(
        checkpoint=str(result.checkpoint),
        steps=result.steps,
        metrics=dict(result.metrics),
        main_metric=main_metric(data.targets, labelling=data.labelling),
        best=None if best is None else asdict(best) | {"checkpoint": best.checkpoint and str(best.checkpoint)},
        ended_early=result.ended_early,
    )
    if rank == 0:
        write_bytes(run_dir / OUTCOME_NAME, encoded(json.dumps(asdict(outcome), indent=1, ensure_ascii=False) + "\n"))
        forget_failure(run_dir)
    accelerator.end_training()
    return outcome


def read_outcome(run_dir: Path) -> Outcome:
    """Return the outcome that rank 0 wrote; a CA2STError where there is none although the workers ended well."""
    path = run_dir / OUTCOME_NAME
    if not path.exists():
        raise CA2STError(f"{path}: expected after a finished training, found nothing; see {run_dir}/journal.jsonl")
    return read_json(path, Outcome)


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
