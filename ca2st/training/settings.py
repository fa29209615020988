"""A run as its caller describes it, what it shows while it goes, and what it leaves."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ca2st.batch import Labelling
from ca2st.durable import NO_FAULTS, FaultPoints
from ca2st.errors import check_choice
from ca2st.training.best import Score
from ca2st.training.config import OptimConfig, TrainingConfig
from ca2st.training.metrics import main_metric, metric_names
from ca2st.training.optim import LearningRateSchedule, ParameterRules, schedule_for
from ca2st.training.resume import RunRecord, identity


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingProgress:
    """What a progress bar shows after a step."""

    step: int
    total_steps: int
    epoch: int
    loss: float
    lr: float
    clips_per_second: float
    data_wait_fraction: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSettings:
    """A run, as its caller describes it; the same on every rank."""

    folder: Path
    """The run's folder: journal, checkpoints, lock."""
    config: TrainingConfig
    optim: OptimConfig
    rules: ParameterRules
    targets: Mapping[str, int]
    """Number of classes by target, in the order of the batches' label columns."""
    labelling: Labelling = "one"
    """How many labels a sample has; it decides which metric tells the best checkpoint."""
    record: RunRecord
    """What checkpoints remember, and what must be equal at resume."""
    topology: Mapping[str, Any] = field(default_factory=dict)
    """Facts besides those of the processes that the last bits of a sum depend on: how frozen weights are held."""
    started_from: Mapping[str, Any] = field(default_factory=dict)
    """For the journal's start line: which trained model the weights came from, and what of it was taken."""
    strict_resume: bool = False
    """Refuse a damaged newest checkpoint and other library versions, instead of warning."""
    lock_wait_seconds: float = 5.0
    """How long to wait for a predecessor in the folder to finish dying."""
    faults: FaultPoints = NO_FAULTS
    """For tests: the points of `checkpoint`, ``step.received``, ``step.updated``, ``step.logged`` and
    ``validation.begun``."""
    progress: Callable[[TrainingProgress], None] | None = None
    """Called on the main rank after every step."""
    clock: Callable[[], float] = time.perf_counter
    """Seconds, for durations only."""
    wall_clock: Callable[[], float] = time.time
    """Seconds since 1970, for the journal only."""

    def identity(self) -> dict[str, Any]:
        """Return what must not change in the run's life."""
        return identity(self.record, seed=self.config.seed, global_batch_size=self.config.global_batch_size)

    def schedule(self, steps_per_epoch: int) -> LearningRateSchedule:
        """Return the learning rate of every step; raises as `schedule_for`."""
        return schedule_for(
            self.optim,
            global_batch_size=self.config.global_batch_size,
            epochs=self.config.epochs,
            steps_per_epoch=steps_per_epoch,
        )


def ranking_metric(settings: TrainingSettings) -> str:
    """Return the validation metric that tells which checkpoint is the best.

    Raises:
        UserInputError: validations have no such metric; lists those that they have.
    """
    targets = tuple(settings.targets)
    metric = settings.config.best_metric or main_metric(targets, labelling=settings.labelling)
    known = ["map", "top1"] if settings.labelling == "several" else metric_names(targets)
    check_choice("training.best_metric", metric, known)
    return metric


def topology_of(accelerator: Accelerator, settings: TrainingSettings) -> dict[str, Any]:
    """Return what the last bits of a sum depend on; threads too, since they cut sums on a CPU."""
    on_cpu = accelerator.device.type == "cpu"
    return {
        "world_size": accelerator.num_processes,
        "device": accelerator.device.type,
        "per_device_batch_size": settings.config.per_device_batch_size,
        "precision": settings.config.precision,
        "cpu_threads": torch.get_num_threads() if on_cpu else None,
        "compile": settings.config.compile,
        **{name: True for name in ("deterministic", "sharded") if getattr(settings.config, name)},
        **settings.topology,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """What a finished run leaves."""

    steps: int
    checkpoint: Path
    metrics: Mapping[str, float | None]
    """Last validation metrics; empty without a validation set."""
    best: Score | None
    """The best validation of all attempts; None without a validation set."""
    ended_early: str | None
    """Why the run ended before its last step (`early_stopping`, `stop_at`); None: it did not."""
    attempt: int
    """Attempt that finished the run."""
    resumed_step: int
    """Step this attempt started from; 0 for a fresh start."""
    damaged_checkpoints: tuple[str, ...]
    """Checkpoints passed over at the start because they are damaged: what and where."""
