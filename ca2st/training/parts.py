"""The parts a training is made of, and the intake of batches.

A step's clips as they arrive on all ranks: waited for, checked, and agreed on before anything is computed.

Ranks meet here once a step. A loader that fails on one rank, a signal that reached one process: all learn of it in
the same place, before a collective of the backward pass could leave the others waiting.

What an attempt works with, and how it is put together.
"""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from accelerate import Accelerator
from torch import nn

from ca2st.batch import ClipBatch
from ca2st.training.errors import SourceContractError
from ca2st.training.journal import Journal
from ca2st.training.losses import check_label_range
from ca2st.training.optim import LearningRateSchedule, build_optimizer, schedule_for
from ca2st.training.ranks import Ranks
from ca2st.training.settings import TrainingSettings
from ca2st.training.signals import StopRequest
from ca2st.training.stages import EvaluationSource, SourceCounts, StageClock, TrainSource
from ca2st.training.step import Stepper


@dataclass(frozen=True, kw_only=True, slots=True)
class StepIntake:
    """What arrived for one step."""

    share: ClipBatch | None
    """This rank's clips; None when a rank was asked to stop."""
    keys_of_rank: tuple[tuple[str, ...], ...]
    """Sample keys that arrived, by rank: in global order when joined."""
    wait_seconds: float
    """Longest wait for a loader among the ranks."""
    stop_signal: int
    """Signal that asked some rank to stop, or 0."""

    @property
    def sample_ids_hash(self) -> str:
        """xxh3-64 (hex) of the keys in global order, joined by newlines."""
        return hash_of_keys([key for keys in self.keys_of_rank for key in keys])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Facts:
    keys: tuple[str, ...] = ()
    wait_seconds: float = 0.0
    stop_signal: int = 0


def hash_of_keys(keys: Sequence[str]) -> str:
    """xxh3-64 (hex) of `keys` joined by newlines."""
    return xxhash.xxh3_64_hexdigest("\n".join(keys).encode())


class Intake:
    """Takes the steps of consecutive epochs out of a source, in step with the other ranks."""

    def __init__(
        self,
        source: TrainSource,
        ranks: Ranks,
        *,
        targets: Mapping[str, int],
        global_batch_size: int,
        stop: StopRequest,
        clock: Callable[[], float] = time.perf_counter,
        stages: StageClock | None = None,
    ) -> None:
        self._source = source
        self._ranks = ranks
        self._targets = targets
        self._global_batch_size = global_batch_size
        self._stop = stop
        self._clock = clock
        self._stages = stages or StageClock()

    def epoch(self, epoch: int, *, first_step: int) -> Generator[StepIntake]:
        """Steps `first_step` .. of `epoch`; ends after a stop was asked for.

        Raises:
            SourceContractError: a share of the wrong size, padding, too few steps.
            LabelRangeError: a label beyond the model's heads.
            PeerFailedError: another rank's loader failed.
        """
        batches = self._source.batches(epoch, first_step)
        with contextlib.ExitStack() as stack:
            stack.callback(getattr(batches, "close", lambda: None))
            for step in range(first_step, self._source.steps_per_epoch):
                intake = self._take(batches, where=f"epoch {epoch}, step {step} of the epoch")
                yield intake
                if intake.stop_signal:
                    return

    def _take(self, batches: Iterator[ClipBatch], *, where: str) -> StepIntake:
        received: list[ClipBatch] = []

        def receive() -> _Facts:
            if self._stop.signal_number:
                return _Facts(stop_signal=self._stop.signal_number)
            begin = self._clock()
            with self._stages.stage("data_wait"):
                share = next(batches, None)
            waited = self._clock() - begin
            if share is None:
                raise SourceContractError(f"{where}: expected a batch, the loader has ended")
            self._check(share, where)
            received.append(share)
            return _Facts(keys=share.sample_ids, wait_seconds=waited)

        with self._stages.stage("gather"):
            facts = self._ranks.together(receive)
        stop_signal = max(fact.stop_signal for fact in facts)
        count = sum(len(fact.keys) for fact in facts)
        if not stop_signal and count != self._global_batch_size:
            raise SourceContractError(
                f"{where}: expected {self._global_batch_size} clips over all ranks, found {count}"
            )
        return StepIntake(
            share=None if stop_signal else received[0],
            keys_of_rank=tuple(fact.keys for fact in facts),
            wait_seconds=max(fact.wait_seconds for fact in facts),
            stop_signal=stop_signal,
        )

    def _check(self, share: ClipBatch, where: str) -> None:
        if share.num_clips == 0 or bool(share.is_padding.any()):
            raise SourceContractError(f"{where}: expected clips without padding, found {share.num_clips} with padding")
        if share.labels.shape[1] != len(self._targets):
            raise SourceContractError(
                f"{where}: expected one label column for each of {', '.join(self._targets)}, "
                f"found {share.labels.shape[1]}"
            )
        check_label_range(share.labels, share.sample_ids, num_classes=self._targets)


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
