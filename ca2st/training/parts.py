"""What an attempt works with, and how it is put together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ca2st.training.intake import Intake
from ca2st.training.journal import Journal
from ca2st.training.optim import build_optimizer
from ca2st.training.protocols import EvaluationSource, TrainSource
from ca2st.training.ranks import Ranks
from ca2st.training.schedule import LearningRateSchedule, schedule_for
from ca2st.training.settings import TrainingSettings
from ca2st.training.signals import StopRequest
from ca2st.training.stages import SourceCounts, StageClock
from ca2st.training.step import Stepper


@dataclass(frozen=True, kw_only=True, slots=True)
class RunParts:
    """What an attempt works with; made by `make_parts`."""

    settings: TrainingSettings
    accelerator: Accelerator
    model: nn.Module
    """Not wrapped."""
    optimizer: torch.optim.Optimizer
    """Not wrapped."""
    stepper: Stepper
    intake: Intake
    stages: StageClock
    """Shared by intake and stepper."""
    counts: SourceCounts
    """Of this rank's training source."""
    schedule: LearningRateSchedule
    steps_per_epoch: int
    validation: EvaluationSource | None
    topology: Mapping[str, Any]
    journal: Journal | None
    """On the main rank."""

    def log(self, event: str, **fields: Any) -> None:
        """Write a journal line, on the main rank."""
        if self.journal is not None:
            self.journal.write(event, **fields)

    def ranks(self) -> Ranks:
        """This process among the others; what it waits for them is the stage ``gather``."""
        return Ranks(self.accelerator, stages=self.stages)


def make_parts(
    model: nn.Module,
    source: TrainSource,
    validation: EvaluationSource | None,
    *,
    accelerator: Accelerator,
    settings: TrainingSettings,
    stop: StopRequest,
    journal: Journal | None,
) -> RunParts:
    """Optimizer, schedule, clock, intake and stepper around a model and its sources; prepares the model for its ranks.

    Raises:
        ParameterRuleError: a rule about parameters that matches nothing.
    """
    optimizer = build_optimizer(model, settings.optim, rules=settings.rules)
    schedule = schedule_of(settings, source)
    stages = StageClock(settings.clock)
    intake = Intake(
        source,
        Ranks(accelerator),
        targets=settings.targets,
        global_batch_size=settings.config.global_batch_size,
        stop=stop,
        clock=settings.clock,
        stages=stages,
    )
    return RunParts(
        settings=settings,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        stepper=_make_stepper(
            model, optimizer, accelerator=accelerator, settings=settings, schedule=schedule, stages=stages
        ),
        intake=intake,
        stages=stages,
        counts=SourceCounts(source),
        schedule=schedule,
        steps_per_epoch=source.steps_per_epoch,
        validation=validation,
        topology=topology_of(accelerator, settings),
        journal=journal,
    )


def _make_stepper(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    accelerator: Accelerator,
    settings: TrainingSettings,
    schedule: LearningRateSchedule,
    stages: StageClock,
) -> Stepper:
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    return Stepper(
        prepared,
        prepared_optimizer,
        accelerator=accelerator,
        config=settings.config,
        optim=settings.optim,
        schedule=schedule,
        targets=tuple(settings.targets),
        stages=stages,
    )


def topology_of(accelerator: Accelerator, settings: TrainingSettings) -> dict[str, Any]:
    """What the last bits of a sum depend on; threads too, since they cut sums on a CPU."""
    on_cpu = accelerator.device.type == "cpu"
    return {
        "world_size": accelerator.num_processes,
        "device": accelerator.device.type,
        "per_device_batch_size": settings.config.per_device_batch_size,
        "precision": settings.config.precision,
        "cpu_threads": torch.get_num_threads() if on_cpu else None,
        "compile": settings.config.compile,
        **settings.topology,
    }


def schedule_of(settings: TrainingSettings, source: TrainSource) -> LearningRateSchedule:
    """The learning rate of every step of the run.

    Raises:
        UserInputError: a warm-up longer than the run.
    """
    return schedule_for(
        settings.optim,
        global_batch_size=settings.config.global_batch_size,
        epochs=settings.config.epochs,
        steps_per_epoch=source.steps_per_epoch,
    )
