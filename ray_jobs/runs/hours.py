"""How long a training takes: counted from multiply-adds and a device's peak, or measured on clips of random numbers.

Counted, a training is an estimate whose every assumption is in the plan: the work of a clip, the peak of the device,
and the share of it that trainings reach.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ca2st.benchmark.case import CaseSpec, LocalCase
from ca2st.benchmark.measure import PEAKS, find_peak, measure_limit
from ca2st.errors import EnvironmentFault, check_choice
from ca2st.model.config import TargetSpec
from ca2st.model.inspect import FLOP_PER_MULTIPLY_ADD, ModelInfo, train_tflop
from ca2st.training.config import Precision, TrainingConfig
from ray_jobs.config.recipe import Recipe

Device = Literal["cpu", "cuda"]
_SHARE_OF_PEAK = 0.3
"""Of a datasheet's peak: what trainings of ViT-B reach from end to end."""
_SHARE_OF_PRODUCT: dict[Device, float] = {"cuda": 0.38, "cpu": 0.6}
"""Of a measured matrix product: on a GPU the same rate (a product reaches 80 % of the peak); on a CPU what
``ca2st bench model`` measures (tests/benchmarks/results)."""
_PRODUCT_SIZE: dict[Device, int | None] = {"cuda": None, "cpu": 1024}
_MOST_CLIPS_ON_CPU = 1
_WORTH_SAYING = 1.5
_MOST_ROUNDS = 8
_MOST_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """How fast one device computes, and how that is known."""

    device: str
    """Its name."""
    peak_tflops: float
    """Of the datasheet, or of a matrix product that was measured here."""
    share: float
    """Of the peak, assumed to be reached in training."""
    source: Literal["datasheet", "matrix product"]
    times_in_fp32: float = 1.0
    """On a CPU: how many times as fast the same product is in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a training computes, all devices together."""

    clips: int
    """Read in training, over all epochs."""
    views: int
    """Read in all validations."""
    train_tflop: float
    """Per clip: forward and backward."""
    forward_tflop: float
    """Per view."""


def rate_of(device: str | None, precision: Precision | None) -> Rate:
    """Return the rate of the `device` of this name; None: of what this machine would train on.

    `precision` None: bf16 on a GPU, fp32 on a CPU. A name that is not in `PEAKS` is a UserInputError.
    """
    here: Device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = precision or ("fp32" if here == "cpu" and device is None else "bf16")
    if device is not None:
        known = {name.lower(): name for name in PEAKS}
        if device.lower() not in known:
            check_choice("--device", device, PEAKS)
        name = found = known[device.lower()]
    else:
        name = torch.cuda.get_device_name() if here == "cuda" else "this CPU"
        found = find_peak(name) or "" if here == "cuda" else ""
    if found:
        peak = PEAKS[found].fp32 if precision == "fp32" else PEAKS[found].bf16  # fp16 has the same
        return Rate(device=name, peak_tflops=peak, share=_SHARE_OF_PEAK, source="datasheet")
    size, share = _PRODUCT_SIZE[here], _SHARE_OF_PRODUCT[here]
    tflops = measure_limit(torch.device(here), precision, size=size).tflops
    times = 1.0
    if here == "cpu" and precision != "fp32":  # which most CPUs compute by detours
        times = measure_limit(torch.device(here), "fp32", size=size).tflops / tflops
    return Rate(device=name, peak_tflops=tflops, share=share, source="matrix product", times_in_fp32=times)


def work_of(recipe: Recipe, info: ModelInfo, *, steps: int, steps_per_epoch: int, num_validation: int) -> Work:
    """Return what the whole training computes; `num_validation`: samples of the validation split, 0 without one."""
    training = recipe.training
    num_validations = len(validated_steps(training, steps=steps, steps_per_epoch=steps_per_epoch))
    return Work(
        clips=steps * training.global_batch_size,
        views=num_validations * num_validation * recipe.data.views.num_views,
        train_tflop=train_tflop(info, again=training.activation_checkpointing),
        forward_tflop=FLOP_PER_MULTIPLY_ADD * info.computed_gmacs / 1e3,
    )


def validated_steps(training: TrainingConfig, *, steps: int, steps_per_epoch: int) -> set[int]:
    """Return the steps of a run after which it validates: at its cadences, and the last."""
    cadences = (training.validate_every_epochs * steps_per_epoch, training.validate_every_steps or 0)
    return {steps, *(step for every in cadences if every for step in range(every, steps, every))}


def counted_hours(work: Work, rate: Rate, *, workers: int) -> dict[str, Any]:
    """Return hours of training and of validation, and the clips per second that must be read for it."""
    num_devices = 1 if rate.device == "this CPU" else workers
    speed = rate.peak_tflops * rate.share * num_devices
    facts = {"how": "counted", "device": rate.device, "num_devices": num_devices}
    return _hours(
        work, facts, clips_per_second=speed / work.train_tflop, views_per_second=speed / work.forward_tflop
    ) | {
        "peak_tflops": rate.peak_tflops,
        "peak_of": rate.source,
        "share_of_peak": rate.share,
        "times_in_fp32": rate.times_in_fp32,
    }


def _hours(work: Work, facts: Mapping[str, Any], *, clips_per_second: float, views_per_second: float) -> dict[str, Any]:
    training, validation = work.clips / clips_per_second / 3600, work.views / views_per_second / 3600
    return {
        "hours": training + validation,
        **facts,
        "training_hours": training,
        "validation_hours": validation,
        "clips_per_second": clips_per_second,
        "tflop_per_clip": work.train_tflop,
    }


def measured_hours(recipe: Recipe, work: Work, targets: Sequence[TargetSpec], *, share_of_rank: int) -> dict[str, Any]:
    """Return the same, from training steps and forward passes on random clips of the recipe's shape on this machine.

    `share_of_rank`: clips of a step on one rank. On a CPU one clip at a time is measured.

    Raises:
        EnvironmentFault: the device has not the memory for a micro-batch.
    """
    here: Device = "cuda" if torch.cuda.is_available() else "cpu"
    training, num_clips = recipe.training, min(recipe.training.per_device_batch_size, share_of_rank)
    num_clips = num_clips if here == "cuda" else min(num_clips, _MOST_CLIPS_ON_CPU)
    spec = CaseSpec(
        config=recipe.model,
        clip=recipe.clip,
        per_device_batch_size=num_clips,
        device=here,
        precision=training.precision,
        variant="compiled" if training.compile else "ours",
        targets=tuple(targets),
        trainable=recipe.trainable,
        activation_checkpointing=training.activation_checkpointing,
    )
    try:
        case = LocalCase(spec)
        step_seconds, forward_seconds = _median_seconds(case, "training"), _median_seconds(case, "forward")
    except torch.OutOfMemoryError as error:
        raise EnvironmentFault(
            f"--measure: expected memory for {num_clips} clips, found it used up; lower training.per_device_batch_size "
            "or set training.activation_checkpointing = true"
        ) from error
    num_devices = recipe.launch.workers if here == "cuda" else 1
    device = torch.cuda.get_device_name() if here == "cuda" else "this CPU"
    facts = {"how": "measured", "device": device, "num_devices": num_devices}
    clips, views = num_clips * num_devices / step_seconds, num_clips * num_devices / forward_seconds
    found = _hours(work, facts, clips_per_second=clips, views_per_second=views)
    return found | {"measured_clips": num_clips, "peak_memory": case.peak_bytes()}


def _median_seconds(case: LocalCase, kind: Literal["training", "forward"]) -> float:
    case.seconds(kind)
    begin, seconds = time.monotonic(), [case.seconds(kind)]
    while len(seconds) < _MOST_ROUNDS and time.monotonic() - begin < _MOST_SECONDS:
        seconds.append(case.seconds(kind))
    return statistics.median(seconds)


def hours_line(plan: dict[str, Any]) -> str:
    """Return what `counted_hours` or `measured_hours` found, as a person reads it."""
    where = plan["device"] if plan["num_devices"] == 1 else f"{plan['num_devices']} x {plan['device']}"
    if plan["how"] == "measured":
        basis = f"measured with {plan['measured_clips']} random clips at a time, no data read"
    else:
        peak = f"{plan['peak_tflops']:.3g} TFLOP/s " + (
            "of its datasheet" if plan["peak_of"] == "datasheet" else "that a matrix product reached here"
        )
        basis = f"counted: {plan['tflop_per_clip']:.3g} TFLOP per clip, {plan['share_of_peak']:.0%} assumed of {peak}"
    alone = ""
    if plan["device"] == "this CPU":
        alone = "; this machine has no GPU: --device H200 plans for one"
        if (times := plan.get("times_in_fp32", 1.0)) > _WORTH_SAYING:
            alone += f", and training.precision = fp32 is {times:.0f} times as fast on this CPU"
    return (
        f"{spoken_hours(plan['hours'])} on {where} ({basis}); validation {spoken_hours(plan['validation_hours'])} of "
        f"it; reads {plan['clips_per_second']:.3g} clips/s{alone}"
    )


def spoken_hours(hours: float) -> str:
    """Return ``12.3 h``, with days where there are many, and minutes or seconds where there is less than one."""
    if hours < 1 / 60:
        return f"{hours * 3600:.2g} s"
    if hours < 1:
        return f"{hours * 60:.2g} min"
    return f"{hours:.3g} h" if hours < 72 else f"{hours:,.0f} h ({hours / 24:,.0f} days)"
