"""What ``ca2st train --dry-run`` tells: everything a training would do and need, and nothing done.

Manifests and what a run folder holds are read; no folder is made, no clip drawn, no run opened and nothing kept of a
URL. Counting is in pure functions; `make_plan` reads.
"""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ca2st.training.config import TrainingConfig
from ca2st.training.schedule import schedule_for
from ca2st.training.state import trained_tensors
from pipelines.steps import count_steps, rank_positions, require_enough_samples
from ray_jobs.config.recipe import Recipe
from ray_jobs.planning.resume_plan import resume_plan
from ray_jobs.running.frozen_weights import frozen_bytes
from ray_jobs.running.preflight import check_settings, preflight
from ray_jobs.running.recipe_model import outline_model, target_specs
from ray_jobs.running.training_data import TrainingData, sample_plan
from sharding.location import RemoteFolder, as_location
from sharding.shard_set import ShardSet

_MOMENTS = 2
"""AdamW keeps two numbers a trained parameter, in checkpoints too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a training reads in an epoch, and where that was learned."""

    classes: dict[str, list[str]]
    """Class names of each target."""
    num_samples: int
    """Different samples."""
    steps_per_epoch: int
    data: TrainingData | None
    """The opened sets; None for shards of a synthetic world that are made when the training starts."""


def make_plan(recipe: Recipe, run_dir: Path, *, device: str) -> dict[str, Any]:
    """The whole plan of ``ca2st train`` as plain values; `device` is torch's word for what would train here.

    Raises:
        UserInputError: what the training itself would refuse: settings, data, weights, a folder of another run.
        DataDamageError: damaged manifests, or a run folder without a sound checkpoint.
    """
    from ca2st.model.info import model_info
    from ca2st.model.precision import held_precision
    from ray_jobs.planning.step_memory import guess_step_memory
    from ray_jobs.running.start import check_model

    reading = read_without_traces(recipe)
    start = check_model(recipe, reading.classes, run_dir)
    training, world_size = recipe.training, recipe.launch.workers
    info = model_info(recipe.model, recipe.clip, target_specs(reading.classes), trainable=recipe.trainable)
    memory = guess_step_memory(recipe, reading.classes, device=device, world_size=world_size)
    steps = training.total_steps(reading.steps_per_epoch)
    fingerprints = None if reading.data is None else reading.data.fingerprints
    return {
        "name": recipe.name,
        "model": recipe.model.kind,
        "trains": recipe.trainable,
        "start": dict(start) if recipe.start is not None else None,
        "trainable": info.trainable,
        "total": info.total,
        "gmacs": info.gmacs,
        "num_samples": reading.num_samples,
        "epochs": training.epochs,
        "steps_per_epoch": reading.steps_per_epoch,
        "steps": steps,
        "workers": world_size,
        "device": device,
        "precision": training.precision,
        "experts_precision": held_precision(recipe.experts.precision, training=training.precision, device=device),
        "global_batch_size": training.global_batch_size,
        "batches": batch_plan(training, world_size=world_size),
        "learning_rate": rate_plan(recipe, steps_per_epoch=reading.steps_per_epoch, steps=steps),
        "memory": asdict(memory) | {"total": memory.total, "batches_ready": waiting_bytes(recipe)},
        "disk": disk_plan(recipe, reading.classes, run_dir, steps=steps, steps_per_epoch=reading.steps_per_epoch),
        "data": data_plan(recipe, reading.data),
        "resume": resume_plan(recipe, run_dir, fingerprints=fingerprints, steps=steps),
    }


def read_without_traces(recipe: Recipe) -> Reading:
    """Read manifests (and indexes, where samples are chosen by them) without leaving a copy of those behind URLs.

    Raises:
        UserInputError, DataDamageError: as `preflight`, or as `synthetic_classes`.
    """
    from ray_jobs.synthetic.data import synthetic_classes

    if (classes := synthetic_classes(recipe)) is not None:
        check_settings(recipe)
        return _reading_of_world(recipe, classes)
    with tempfile.TemporaryDirectory(prefix="ca2st-plan-") as folder:
        aside = replace(recipe.data, loader=replace(recipe.data.loader, cache_dir=folder))
        data = preflight(replace(recipe, data=aside))
        plan = sample_plan(recipe, data)
    return Reading(classes=data.classes, num_samples=plan.num_samples, steps_per_epoch=plan.num_steps, data=data)


def _reading_of_world(recipe: Recipe, classes: dict[str, list[str]]) -> Reading:
    """Of a world that is not drawn yet: all its clips, since which are selected or balanced shows in their labels."""
    world, order, batch = recipe.data.synthetic, recipe.data.order(), recipe.training.global_batch_size
    assert world is not None
    num_samples = min(world.num_train, order.selection.limit or world.num_train)
    num_clips = (order.epoch_samples or num_samples) * order.repeats
    require_enough_samples(
        num_samples=num_clips,
        global_batch_size=batch,
        world_size=recipe.launch.workers,
        remainder=order.remainder,
    )
    steps = count_steps(num_clips, batch, remainder=order.remainder)
    return Reading(classes=classes, num_samples=num_samples, steps_per_epoch=steps, data=None)


def batch_plan(training: TrainingConfig, *, world_size: int) -> dict[str, int]:
    """How a step's clips are cut: into ranks (pairs stay together), and those into micro-batches.

    Raises:
        PlanError: a rank would get nothing.
    """
    size = training.global_batch_size
    ranks = range(world_size)
    shares = [len(rank_positions(rank, world_size, global_batch_size=size, keep_pairs=True)) for rank in ranks]
    return {
        "global_batch_size": size,
        "per_rank": max(shares),
        "per_rank_least": min(shares),
        "per_device_batch_size": training.per_device_batch_size,
        "micro_batches": -(-max(shares) // training.per_device_batch_size),
    }


def rate_plan(recipe: Recipe, *, steps_per_epoch: int, steps: int) -> dict[str, float | int]:
    """The schedule's peak and ends, and the factor of the slowest layer."""
    optim, training = recipe.optim, recipe.training
    schedule = schedule_for(
        optim,
        global_batch_size=training.global_batch_size,
        epochs=training.epochs,
        steps_per_epoch=steps_per_epoch,
    )
    return {
        "peak": schedule.peak,
        "first": schedule.at(0),
        "last": schedule.at(steps - 1),
        "minimum": schedule.minimum,
        "warmup_steps": schedule.warmup_steps,
        "schedule_steps": schedule.total_steps,
        "first_layer_factor": optim.layer_decay**recipe.model.depth,
    }


def waiting_bytes(recipe: Recipe) -> int:
    """Bytes of this machine's memory that finished batches of one rank take: uint8 frames, float32 spectrograms."""
    clip, training = recipe.clip, recipe.training
    frames = 3 * clip.num_frames * clip.crop_size**2
    share = -(-training.global_batch_size // recipe.launch.workers)
    return (recipe.data.loader.prefetch_steps + 1) * share * (frames + 4 * clip.mel_rows * clip.num_mel_bins)


def num_checkpoints(recipe: Recipe, *, steps: int, steps_per_epoch: int) -> int:
    """How many a run of `steps` writes: at its cadence, before each validation, and at its end."""
    training, data = recipe.training, recipe.data
    saved = {steps, *range(training.checkpoint_every_steps, steps, training.checkpoint_every_steps)}
    validates = data.validation is not None or data.synthetic is not None
    if validates and (every := training.validate_every_epochs * steps_per_epoch) > 0:
        saved |= set(range(every, steps, every))
    return len(saved)


def disk_plan(
    recipe: Recipe, classes: Mapping[str, list[str]], run_dir: Path, *, steps: int, steps_per_epoch: int
) -> dict[str, int]:
    """Bytes that the run folder grows to, journal and tracking left out, and what is free where it will be.

    While a checkpoint is written those it will replace are still there.
    """
    model = outline_model(recipe, {name: list(names) for name, names in classes.items()})
    parameters = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    checkpoint = sum(tensor.nbytes for tensor in trained_tensors(model).values()) + _MOMENTS * parameters
    written = num_checkpoints(recipe, steps=steps, steps_per_epoch=steps_per_epoch)
    kept, frozen = min(recipe.training.keep_checkpoints, written), frozen_bytes(model)
    return {
        "checkpoint": checkpoint,
        "num_written": written,
        "num_kept": kept,
        "frozen_weights": frozen,
        "total": min(kept + 1, written) * checkpoint + frozen,
        "free": shutil.disk_usage(_nearest_folder(run_dir)).free,
    }


def _nearest_folder(path: Path) -> Path:
    return next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.is_dir())


def data_plan(recipe: Recipe, data: TrainingData | None) -> dict[str, Any]:
    """Where samples come from, how much that is, and the cache that shards behind a URL go through."""
    world = recipe.data.synthetic
    if data is None:
        assert world is not None
        made = {"task": world.task, "train": world.num_train, "validation": world.num_validation}
        return {"train": [], "validation": None, "made_first": made, "cache": None}
    sets = [*data.train_sets, *([data.validation] if data.validation is not None else [])]
    return {
        "train": [set_facts(one) for one in data.train_sets],
        "validation": None if data.validation is None else set_facts(data.validation),
        "made_first": None,
        "cache": _cache_plan(recipe, sets),
    }


def set_facts(shard_set: ShardSet) -> dict[str, str | int]:
    """Place, samples, shards and bytes of a set."""
    manifest = shard_set.manifest
    return {
        "place": shard_set.where,
        "num_samples": manifest.num_samples,
        "num_shards": manifest.num_shards,
        "bytes": sum(shard.bytes + shard.index_bytes for shard in shard_set.shards),
        "codec": manifest.video.codec,
    }


def _cache_plan(recipe: Recipe, sets: list[ShardSet]) -> dict[str, str | int | None] | None:
    remote = [one for one in sets if isinstance(as_location(one.where), RemoteFolder)]
    if not remote:
        return None
    storage = recipe.data.loader.storage
    return {
        "folder": str(storage.folder),
        "limit_bytes": storage.cache_bytes,
        "set_bytes": sum(int(set_facts(one)["bytes"]) for one in remote),
        "free_bytes": shutil.disk_usage(_nearest_folder(storage.folder)).free,
    }
