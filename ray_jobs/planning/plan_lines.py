"""The plan of a training as a person reads it: one line a subject."""

from collections.abc import Mapping
from typing import Any

from ray_jobs.console import table

_UNITS = ("B", "KB", "MB", "GB", "TB")


def plan_lines(plan: Mapping[str, Any]) -> str:
    """The facts of `run_plan.make_plan`, aligned."""
    rows: dict[str, object] = {name: plan[name] for name in ("name", "model")}
    rows["trains"] = plan["trains"] if isinstance(plan["trains"], str) else ", ".join(plan["trains"])
    if plan["start"] is not None:
        rows["start"] = start_line(plan["start"])
    rows["parameters"] = f"{plan['trainable']:,} trained of {plan['total']:,}; {plan['gmacs']:.2f} GMACs a view"
    rows["length"] = (
        f"{plan['steps']} steps: {plan['epochs']} epochs of {plan['steps_per_epoch']} steps, "
        f"{plan['num_samples']} samples"
    )
    rows["batches"] = batches_line(plan)
    rows["learning rate"] = rate_line(plan["learning_rate"])
    rows["precision"] = f"{plan['precision']}, frozen experts {plan['experts_precision']}, on {plan['device']}"
    rows["memory"] = memory_line(plan["memory"], device=plan["device"])
    rows["disk"] = disk_line(plan["disk"])
    rows |= data_rows(plan["data"])
    rows["run folder"] = resume_line(plan["resume"])
    return table(rows)


def readable_bytes(count: float) -> str:
    """``1.2 GB``: powers of 1000."""
    for unit in _UNITS[:-1]:
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} {_UNITS[-1]}"


def start_line(start: Mapping[str, Any]) -> str:
    """What a fine-tuning begins with; of a list of tensors only how many they are."""
    counts = {key: len(value) if isinstance(value, list) else value for key, value in start.items()}
    return ", ".join(f"{key} {value}" for key, value in counts.items() if value is not None)


def batches_line(plan: Mapping[str, Any]) -> str:
    """How a step's clips are cut."""
    cut = plan["batches"]
    share = (
        f"{cut['per_rank']}"
        if cut["per_rank"] == cut["per_rank_least"]
        else (f"{cut['per_rank_least']} to {cut['per_rank']}")
    )
    return (
        f"{cut['global_batch_size']} clips a step; {plan['workers']} workers of {share}, in {cut['micro_batches']} "
        f"micro-batches of at most {cut['per_device_batch_size']}"
    )


def rate_line(rate: Mapping[str, Any]) -> str:
    """The schedule's corners."""
    return (
        f"{rate['first']:.3g} -> {rate['peak']:.3g} in {rate['warmup_steps']} steps -> {rate['last']:.3g} at the last "
        f"(cosine to {rate['minimum']:.3g} at step {rate['schedule_steps']}); first layer x "
        f"{rate['first_layer_factor']:.3g}"
    )


def memory_line(memory: Mapping[str, int], *, device: str) -> str:
    """The guess of a worker's peak and its parts."""
    parts = ("parameters", "gradients", "optimizer", "activations")
    told = ", ".join(f"{name} {readable_bytes(memory[name])}" for name in parts)
    ready = readable_bytes(memory["batches_ready"])
    return (
        f"about {readable_bytes(memory['total'])} a worker on its {device} ({told}; measured peaks were up to twice "
        f"such a guess), libraries not counted; batches kept ready {ready}"
    )


def disk_line(disk: Mapping[str, int]) -> str:
    """What the run folder grows to."""
    warning = "" if disk["total"] <= disk["free"] else "; NOT ENOUGH SPACE"
    return (
        f"up to {readable_bytes(disk['total'])} of {readable_bytes(disk['free'])} free: checkpoints of "
        f"{readable_bytes(disk['checkpoint'])} ({disk['num_written']} written, {disk['num_kept']} kept), frozen "
        f"weights {readable_bytes(disk['frozen_weights'])}{warning}"
    )


def data_rows(data: Mapping[str, Any]) -> dict[str, object]:
    """A row a shard set, and one of the cache where there is one."""
    if data["made_first"] is not None:
        made = data["made_first"]
        return {"data": f"made first: synthetic {made['task']}, {made['train']} + {made['validation']} clips"}
    rows: dict[str, object] = {}
    for number, one in enumerate(data["train"], start=1):
        rows["train" if number == 1 else f"train {number}"] = set_line(one)
    rows["validation"] = "none" if data["validation"] is None else set_line(data["validation"])
    if (cache := data["cache"]) is not None:
        limit = "half of the disk" if cache["limit_bytes"] is None else readable_bytes(cache["limit_bytes"])
        rows["cache"] = (
            f"{cache['folder']}: {readable_bytes(cache['set_bytes'])} of shards, limit {limit}, "
            f"{readable_bytes(cache['free_bytes'])} free"
        )
    return rows


def set_line(one: Mapping[str, Any]) -> str:
    """A shard set."""
    size = readable_bytes(one["bytes"])
    return f"{one['place']}: {one['num_samples']} samples in {one['num_shards']} shards, {size}, {one['codec']}"


def resume_line(resume: Mapping[str, Any]) -> str:
    """What is found in the run folder, and what follows from it."""
    told = {
        "new": "a new run",
        "begin again": "a run without a checkpoint, which begins again",
        "resume": f"resumes {resume['checkpoint']} after step {resume['step']}, attempt {resume['attempt']}",
        "finished": f"finished: {resume['checkpoint']} is the last step's, nothing is left to train",
    }[resume["state"]]
    changes = f" (changed: {'; '.join(resume['changes'])})" if resume["changes"] else ""
    damaged = f"; passed over as damaged: {'; '.join(resume['damaged'])}" if resume["damaged"] else ""
    return f"{resume['run_dir']}: {told}{changes}{damaged}"
