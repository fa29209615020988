"""The plan of ``ca2st train --dry-run``: everything a training would do and need, and nothing done.

Manifests and what a run folder holds are read; no folder is made, no clip drawn, no run opened and nothing kept of a
URL. Counting is in pure functions; `make_plan` reads; `plan_lines` is the plan as a person reads it.
"""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ca2st.errors import UserInputError
from ca2st.model.config import HeldPrecision
from ca2st.model.inspect import ModelInfo, info_of
from ca2st.model.network import HolisticModel, held_precision, hold_experts
from ca2st.training import checkpoint
from ca2st.training.config import TrainingConfig
from ca2st.training.errors import ResumeRefusedError
from ca2st.training.journal import JOURNAL_NAME, differences, last_attempt
from ca2st.training.optim import schedule_for
from ca2st.training.resume import RECIPE_FILE, trained_tensors
from ca2st.weights.hub import is_hub_name
from pipelines.order.plan import count_steps, rank_positions, require_enough_samples
from ray_jobs.config.recipe import Recipe
from ray_jobs.console import table
from ray_jobs.runs.data import TrainingData, synthetic_classes
from ray_jobs.runs.hours import counted_hours, hours_line, measured_hours, rate_of, validated_steps, work_of
from ray_jobs.runs.model import begin_model, frozen_parts, target_specs
from ray_jobs.runs.published import count_notes, published_count, published_spaces, validation_split
from ray_jobs.runs.worker import check_settings, open_checked, refuse_other_recipe
from sharding.datasets.media_tree import PUBLISHED_ROWS
from sharding.format.remote import RemoteFolder, as_location
from sharding.format.shard_set import ShardSet

_MOMENTS = 2
"""AdamW keeps two numbers for each trained parameter, in checkpoints too."""


def resume_plan(recipe: Recipe, run_dir: Path, *, fingerprints: Mapping[str, str] | None, steps: int) -> dict[str, Any]:
    """Return what a start in `run_dir` would go on with; every byte of its newest checkpoint is verified.

    `fingerprints`: those of the training's manifests, by role; None where its shards are not made yet. ``state`` is
    ``new``, ``begin again`` (a run that ended before its first checkpoint), ``resume`` or ``finished``.

    Raises:
        UserInputError: the folder holds a run of another recipe, or of other data.
        CheckpointDamagedError: checkpoints are there, and none is sound.
    """
    facts: dict[str, Any] = {"run_dir": str(run_dir), "state": "new", "attempt": 1, "checkpoint": None, "step": 0}
    facts |= {"damaged": [], "changes": []}
    root = run_dir / checkpoint.CHECKPOINTS_NAME
    if not (run_dir / RECIPE_FILE).exists() and not checkpoint.list_checkpoints(root):
        return facts
    refuse_other_recipe(recipe, run_dir)
    facts["attempt"] = 1 + max(last_attempt(run_dir / JOURNAL_NAME), checkpoint.last_attempt_of_checkpoints(root))
    marker, damaged = checkpoint.newest_sound(root, checkpoint.verify_checkpoint)
    if marker is None:
        return facts | {"state": "begin again"}
    if fingerprints is not None and (changed := differences(marker.manifests, fingerprints)):
        listed = "\n  ".join(changed)
        raise ResumeRefusedError(f"{run_dir}: holds a run on other data; choose another --out:\n  {listed}")
    training = recipe.training
    now = {
        "world_size": recipe.launch.workers,
        "per_device_batch_size": training.per_device_batch_size,
        "precision": training.precision,
        "compile": training.compile,
    }
    return facts | {
        "state": "finished" if marker.step >= steps else "resume",
        "checkpoint": checkpoint.checkpoint_name(marker.step, marker.attempt),
        "step": marker.step,
        "damaged": list(damaged),
        "changes": differences({name: marker.topology.get(name) for name in now}, now),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a training reads in an epoch, and where that was learned."""

    classes: dict[str, list[str]]
    """Class names of each target."""
    num_samples: int
    """Different samples."""
    steps_per_epoch: int
    data: TrainingData | None
    """The opened sets; None for shards of a synthetic world that are made when the training starts, and for published
    counts."""
    num_validation: int = 0
    """Samples of the validation split."""


def make_plan(
    recipe: Recipe,
    run_dir: Path,
    *,
    device: str,
    other_device: str | None = None,
    measure: bool = False,
    assume_counts: bool = False,
) -> dict[str, Any]:
    """Return the whole plan of ``ca2st train`` as plain values; `device` is torch's word for what would train here.

    `other_device`: plan the hours for this one of `PEAKS`. `measure`: a few steps here say how long it takes.
    `assume_counts`: of a published training without its shards; experts' files that are not here are then a note.

    Raises:
        UserInputError: what the training itself would refuse: settings, data, weights, a folder of another run.
        DataDamageError: damaged manifests, or a run folder without a sound checkpoint.
    """
    recipe, notes = without_missing_experts(recipe) if assume_counts else (recipe, [])
    reading = assumed_reading(recipe) if assume_counts else read_without_traces(recipe)
    begun = begin_model(recipe, reading.classes, run_dir, is_outline=True)
    training, world_size = recipe.training, recipe.launch.workers
    held = held_precision(recipe.experts.precision, training=training.precision, device=device)
    info = info_of(begun.model)
    steps = training.total_steps(reading.steps_per_epoch)
    fingerprints = None if reading.data is None else reading.data.fingerprints
    time = _time_plan(recipe, reading, info, steps=steps, other_device=other_device, measure=measure)
    return {
        "name": recipe.name,
        "model": recipe.model.kind,
        "trains": recipe.trainable,
        "start": dict(begun.note) if recipe.start is not None else None,
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
        "experts_precision": held,
        "global_batch_size": training.global_batch_size,
        "batches": batch_plan(training, world_size=world_size),
        "learning_rate": rate_plan(recipe, steps_per_epoch=reading.steps_per_epoch, steps=steps),
        "disk": disk_plan(recipe, begun.model, run_dir, steps=steps, steps_per_epoch=reading.steps_per_epoch),
        "memory": memory_plan(recipe, begun.model, held=held),
        "data": data_plan(recipe, reading.data),
        "resume": resume_plan(recipe, run_dir, fingerprints=fingerprints, steps=steps),
        "hours": time["hours"],
        "time": time,
        "notes": [*notes, *count_notes(reading.data)],
    }


def _time_plan(
    recipe: Recipe, reading: Reading, info: ModelInfo, *, steps: int, other_device: str | None, measure: bool
) -> dict[str, Any]:
    training, workers = recipe.training, recipe.launch.workers
    epoch, num_validation = reading.steps_per_epoch, reading.num_validation
    work = work_of(recipe, info, steps=steps, steps_per_epoch=epoch, num_validation=num_validation)
    if measure:
        most = batch_plan(training, world_size=workers)["per_rank"]
        return measured_hours(recipe, work, target_specs(reading.classes), share_of_rank=most)
    return counted_hours(work, rate_of(other_device, training.precision), workers=workers)


def without_missing_experts(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Return the recipe without the experts' files that are not here, and a note of each."""
    experts = recipe.experts
    missing = [name for name, file in experts.files().items() if not is_hub_name(str(file)) and not file.is_file()]
    notes = [f"experts.{name}: {experts.sources()[name]} is not here yet (ca2st weights import)" for name in missing]
    left = dict.fromkeys(missing)
    return replace(recipe, experts=replace(experts, **left)), notes  # type: ignore[arg-type]  # names of experts


def assumed_reading(recipe: Recipe) -> Reading:
    """Return what a published training reads, by the numbers of its dataset's lists.

    A recipe of no published dataset, or a split that is none of theirs, is a UserInputError.
    """
    check_settings(recipe)
    if recipe.published is None or recipe.published.dataset not in PUBLISHED_ROWS:
        raise UserInputError(
            "--assume-published-counts: expected a recipe with [published] dataset = one of "
            f"{', '.join(PUBLISHED_ROWS)}, found {recipe.name}; give its shards by --data"
        )
    dataset, number = recipe.published.dataset, recipe.data.split
    num_train = published_count(dataset, "train", number)
    num_validation = published_count(dataset, validation_split(recipe), number) if recipe.data.validation else 0
    return _counted_reading(recipe, published_spaces(dataset), num_train=num_train, num_validation=num_validation)


def read_without_traces(recipe: Recipe) -> Reading:
    """Read manifests (and indexes, where samples are chosen by them) without leaving a copy of those behind URLs.

    Raises:
        UserInputError, DataDamageError: as `check_settings`, `open_checked` and `synthetic_classes`.
    """
    check_settings(recipe)
    if (classes := synthetic_classes(recipe)) is not None:
        # All clips of the world, which is not drawn yet: which are selected or balanced shows in their labels.
        world = recipe.data.synthetic
        assert world is not None
        return _counted_reading(recipe, classes, num_train=world.num_train, num_validation=world.num_validation)
    with tempfile.TemporaryDirectory(prefix="ca2st-plan-") as folder:
        aside = replace(recipe.data, loader=replace(recipe.data.loader, cache_dir=folder))
        data, plan = open_checked(replace(recipe, data=aside))
    return Reading(
        classes=data.classes,
        num_samples=plan.num_samples,
        steps_per_epoch=plan.num_steps,
        data=data,
        num_validation=0 if data.validation is None else data.validation.manifest.num_samples,
    )


def _counted_reading(recipe: Recipe, classes: dict[str, list[str]], *, num_train: int, num_validation: int) -> Reading:
    """Return what is read of so many samples, whose sets are not here."""
    order, batch = recipe.data.order(), recipe.training.global_batch_size
    num_samples = min(num_train, order.selection.limit or num_train)
    num_clips = (order.epoch_samples or num_samples) * order.repeats
    require_enough_samples(
        num_samples=num_clips,
        global_batch_size=batch,
        world_size=recipe.launch.workers,
        remainder=order.remainder,
    )
    return Reading(
        classes=classes,
        num_samples=num_samples,
        steps_per_epoch=count_steps(num_clips, batch, remainder=order.remainder),
        data=None,
        num_validation=num_validation,
    )


def batch_plan(training: TrainingConfig, *, world_size: int) -> dict[str, int]:
    """Return how a step's clips are cut: into ranks (pairs stay together), and those into micro-batches."""
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
    """Return the schedule's peak and ends, and the factor of the slowest layer."""
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


def memory_plan(recipe: Recipe, model: HolisticModel, *, held: HeldPrecision) -> dict[str, int]:
    """Return bytes of one rank's device by what they hold, and of batches kept ready in the machine's memory.

    Activations, which depend on kernels and allocators, are left out: the log of a run's first step has its peak.
    `model` is an outline, whose experts are held as `held` afterwards.
    """
    hold_experts(model, held)
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return {
        "parameters": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        "gradients": trained * (2 if recipe.launch.workers > 1 else 1),  # ranks exchange them in buckets of their own
        "optimizer": _MOMENTS * trained,
        "average": 0 if recipe.training.ema_decay is None else 2 * trained,  # twice while a validation uses it
        "batches_ready": waiting_bytes(recipe),
    }


def waiting_bytes(recipe: Recipe) -> int:
    """Return bytes of memory that finished batches of one rank take: uint8 frames, float32 spectrograms."""
    clip, training, loader = recipe.clip, recipe.training, recipe.data.loader
    frames = 3 * clip.num_frames * clip.crop_size**2
    share = -(-training.global_batch_size // recipe.launch.workers)
    return (loader.prefetch_steps + loader.rendered_at_once) * share * (frames + 4 * clip.mel_rows * clip.num_mel_bins)


def disk_plan(
    recipe: Recipe, model: HolisticModel, run_dir: Path, *, steps: int, steps_per_epoch: int
) -> dict[str, int]:
    """Return bytes that the run folder grows to, journal and tracking left out, and what is free where it will be.

    While a checkpoint is written those it will replace are still there.
    """
    parameters = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    trained = sum(tensor.nbytes for tensor in trained_tensors(model).values())
    training = recipe.training
    size = trained * (1 if training.ema_decay is None else 2) + _MOMENTS * parameters
    saved = {steps, *range(training.checkpoint_every_steps, steps, training.checkpoint_every_steps)}
    kept = training.keep_checkpoints
    if recipe.data.validates:  # before each validation a checkpoint is written
        saved |= validated_steps(training, steps=steps, steps_per_epoch=steps_per_epoch)
        kept += training.keep_best
    written, kept = len(saved), min(kept, len(saved))
    frozen = sum(tensor.nbytes for part in frozen_parts(model).values() for tensor in part.values())
    return {
        "checkpoint": size,
        "num_written": written,
        "num_kept": kept,
        "frozen_weights": frozen,
        "total": min(kept + 1, written) * size + frozen,
        "free": shutil.disk_usage(_nearest_folder(run_dir)).free,
    }


def _nearest_folder(path: Path) -> Path:
    return next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.is_dir())


def data_plan(recipe: Recipe, data: TrainingData | None) -> dict[str, Any]:
    """Return where samples come from, how much that is, and the cache that shards behind a URL go through."""
    if data is None:
        nothing: dict[str, Any] = {"train": [], "validation": None, "made_first": None, "cache": None}
        if (world := recipe.data.synthetic) is None:
            return nothing | {"assumed": {"train": recipe.data.train, "validation": recipe.data.validation}}
        made = {"task": world.task, "train": world.num_train, "validation": world.num_validation}
        return nothing | {"made_first": made}
    remote, cache = [one for one in data.sets if isinstance(as_location(one.where), RemoteFolder)], None
    if remote:
        storage = recipe.data.loader.storage
        cache = {
            "folder": str(storage.folder),
            "limit_bytes": storage.cache_bytes,
            "set_bytes": sum(int(_set_facts(one)["bytes"]) for one in remote),
            "free_bytes": shutil.disk_usage(_nearest_folder(storage.folder)).free,
        }
    return {
        "train": [_set_facts(one) for one in data.train_sets],
        "validation": None if data.validation is None else _set_facts(data.validation),
        "made_first": None,
        "cache": cache,
    }


def _set_facts(shard_set: ShardSet) -> dict[str, str | int]:
    """Return place, samples, shards and bytes of a set."""
    manifest = shard_set.manifest
    return {
        "place": shard_set.where,
        "num_samples": manifest.num_samples,
        "num_shards": manifest.num_shards,
        "bytes": sum(shard.bytes + shard.index_bytes for shard in shard_set.shards),
        "codec": manifest.video.codec,
    }


def plan_lines(plan: Mapping[str, Any]) -> str:
    """Return the facts of `make_plan`, aligned."""
    rows: dict[str, object] = {name: plan[name] for name in ("name", "model")}
    rows["trains"] = plan["trains"] if isinstance(plan["trains"], str) else ", ".join(plan["trains"])
    if plan["start"] is not None:  # of a list of tensors only how many they are
        counts = {key: len(value) if isinstance(value, list) else value for key, value in plan["start"].items()}
        rows["start"] = ", ".join(f"{key} {value}" for key, value in counts.items() if value is not None)
    rows["parameters"] = f"{plan['trainable']:,} trained of {plan['total']:,}; {plan['gmacs']:.2f} GMACs per view"
    rows["length"] = (
        f"{plan['steps']} steps: {plan['epochs']} epochs of {plan['steps_per_epoch']} steps, "
        f"{plan['num_samples']} samples"
    )
    cut = plan["batches"]
    least, most = cut["per_rank_least"], cut["per_rank"]
    rows["batches"] = (
        f"{cut['global_batch_size']} clips per step; {plan['workers']} workers of "
        f"{most if least == most else f'{least} to {most}'}, in {cut['micro_batches']} micro-batches of at most "
        f"{cut['per_device_batch_size']}"
    )
    rate = plan["learning_rate"]
    rows["learning rate"] = (
        f"{rate['first']:.3g} -> {rate['peak']:.3g} in {rate['warmup_steps']} steps -> {rate['last']:.3g} at the last "
        f"(cosine to {rate['minimum']:.3g} at step {rate['schedule_steps']}); first layer x "
        f"{rate['first_layer_factor']:.3g}"
    )
    rows["precision"] = f"{plan['precision']}, frozen experts {plan['experts_precision']}, on {plan['device']}"
    memory = plan["memory"]
    parts = ("parameters", "gradients", "optimizer", *(("average",) if memory["average"] else ()))
    held = ", ".join(f"{name} {readable_bytes(memory[name])}" for name in parts)
    rows["memory"] = (
        f"{held} per worker on its {plan['device']}, and activations, which the log of the first step reports; "
        f"batches kept ready {readable_bytes(memory['batches_ready'])}"
    )
    rows["time"] = hours_line(plan["time"])
    rows |= {"note" if number == 1 else f"note {number}": note for number, note in enumerate(plan["notes"], start=1)}
    disk = plan["disk"]
    warning = "" if disk["total"] <= disk["free"] else "; NOT ENOUGH SPACE"
    rows["disk"] = (
        f"up to {readable_bytes(disk['total'])} of {readable_bytes(disk['free'])} free: checkpoints of "
        f"{readable_bytes(disk['checkpoint'])} ({disk['num_written']} written, {disk['num_kept']} kept), frozen "
        f"weights {readable_bytes(disk['frozen_weights'])}{warning}"
    )
    return table(rows | _data_rows(plan["data"]) | {"run folder": _resume_line(plan["resume"])})


def readable_bytes(count: float) -> str:
    """Return ``1.2 GB``: powers of 1000."""
    units = ["B", "KB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.3g} {units[0]}"


def _data_rows(data: Mapping[str, Any]) -> dict[str, object]:
    """Return a row per shard set, and one of the cache where there is one."""
    if (made := data["made_first"]) is not None:
        return {"data": f"made first: synthetic {made['task']}, {made['train']} + {made['validation']} clips"}
    if (assumed := data.get("assumed")) is not None:
        return {"data": f"the published counts; {assumed['train']} and {assumed['validation']} are not read"}
    rows: dict[str, object] = {}
    for number, one in enumerate(data["train"], start=1):
        rows["train" if number == 1 else f"train {number}"] = _set_line(one)
    rows["validation"] = "none" if data["validation"] is None else _set_line(data["validation"])
    if (cache := data["cache"]) is not None:
        limit = "half of the disk" if cache["limit_bytes"] is None else readable_bytes(cache["limit_bytes"])
        rows["cache"] = (
            f"{cache['folder']}: {readable_bytes(cache['set_bytes'])} of shards, limit {limit}, "
            f"{readable_bytes(cache['free_bytes'])} free"
        )
    return rows


def _set_line(one: Mapping[str, Any]) -> str:
    size = readable_bytes(one["bytes"])
    return f"{one['place']}: {one['num_samples']} samples in {one['num_shards']} shards, {size}, {one['codec']}"


def _resume_line(resume: Mapping[str, Any]) -> str:
    """Return what is found in the run folder, and what follows from it."""
    state = {
        "new": "a new run",
        "begin again": "a run without a checkpoint, which begins again",
        "resume": f"resumes {resume['checkpoint']} after step {resume['step']}, attempt {resume['attempt']}",
        "finished": f"finished: {resume['checkpoint']} is the last step's, nothing is left to train",
    }[resume["state"]]
    changes = f" (changed: {'; '.join(resume['changes'])})" if resume["changes"] else ""
    damaged = f"; passed over as damaged: {'; '.join(resume['damaged'])}" if resume["damaged"] else ""
    return f"{resume['run_dir']}: {state}{changes}{damaged}"
