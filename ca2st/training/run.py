"""A training from its start to its end, and when it saves.

What an attempt saves, and what its journal says of every save.

The steps of one attempt: update, journal, checkpoint, validate, until the end or a request to stop.
"""

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ca2st.batch import ClipBatch
from ca2st.checked_json import canonical_json
from ca2st.errors import EnvironmentFault
from ca2st.training.checkpoint import (
    CHECKPOINTS_NAME,
    MAX_FAILED_SAVES,
    CheckpointKeeper,
    CheckpointMarker,
    SaveOutcome,
)
from ca2st.training.errors import NonFiniteError, RunStoppedError, StopNotSavedError
from ca2st.training.evaluate import evaluate, keep_failing_clips
from ca2st.training.heartbeat import Whereabouts
from ca2st.training.parts import RunParts, StepIntake
from ca2st.training.resume import LOADER_FILE, RunRecord, RunStart
from ca2st.training.settings import TrainingProgress
from ca2st.training.signals import stopped_error
from ca2st.training.stages import SourceCounts, StepTimes
from ca2st.training.state import collect_state
from ca2st.training.step import StepResult

SCHEDULE_FILE = "schedule.json"
_LOGGER = logging.getLogger(__name__)


class StateSaver:
    """Saves the state of an attempt; on every rank, of which the main one writes."""

    def __init__(self, parts: RunParts, start: RunStart) -> None:
        settings = parts.settings
        self._parts = parts
        self._attempt = start.attempt
        self._ranks = parts.ranks()
        self._keeper = CheckpointKeeper(
            settings.folder / CHECKPOINTS_NAME, keep=settings.config.keep_checkpoints, faults=settings.faults
        )
        self.newest = start.folder
        """Newest checkpoint of the run."""
        self.step = start.step if start.folder else 0
        """Updates that it holds."""

    def save(self, step: int) -> SaveOutcome:
        """Write a checkpoint of `step` updates and journal what came of it; a full disk is an outcome.

        Raises:
            CA2STError: what is no matter of the disk, on every rank.
        """
        clock = self._parts.settings.clock
        begin = clock()
        with self._parts.stages.stage("checkpoint"):
            outcome = self._ranks.on_main(lambda: self._write(step))
        for problem in outcome.problems:
            _LOGGER.warning("checkpoint at step %d: %s", step, problem)
            self._parts.log("fault", kind="checkpoint", step=step, error=problem, num_failed=outcome.num_failed)
        if outcome.folder is not None:
            self.newest, self.step = outcome.folder, step
            self._parts.log("checkpoint", step=step, name=outcome.folder.name, seconds=clock() - begin)
        return outcome

    def _write(self, step: int) -> SaveOutcome:
        parts, record = self._parts, self._parts.settings.record
        position = loader_position(record, step=step, steps_per_epoch=parts.steps_per_epoch)
        files = {
            **record.files(),
            **collect_state(parts.model, parts.optimizer),
            LOADER_FILE: canonical_json(position),
            SCHEDULE_FILE: canonical_json(asdict(parts.schedule)),
        }
        assert parts.journal is not None
        return self._keeper.save(files, self._marker(step), before=parts.journal.sync)

    def _marker(self, step: int) -> CheckpointMarker:
        config, record = self._parts.settings.config, self._parts.settings.record
        return CheckpointMarker(
            step=step,
            attempt=self._attempt,
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            manifests=record.manifests,
            recipe_sha256=record.recipe_sha256,
            topology=self._parts.topology,
            versions=record.versions,
            experts=record.experts,
            start=record.start,
        )


def loader_position(record: RunRecord, *, step: int, steps_per_epoch: int) -> dict[str, Any]:
    """Where the loader stands after `step` updates, and what its order follows from: ``loader.json``."""
    epoch, step_in_epoch = divmod(step, steps_per_epoch)
    return {
        "epoch": epoch,
        "step_in_epoch": step_in_epoch,
        "steps_per_epoch": steps_per_epoch,
        "plan": dict(record.loader),
    }


class Run:
    """One attempt from its start to its end."""

    def __init__(self, parts: RunParts, start: RunStart) -> None:
        self._parts = parts
        self._settings = parts.settings
        self._config = parts.settings.config
        self._start = start
        self._ranks = parts.ranks()
        self._saver = StateSaver(parts, start)
        self._total_steps = self._config.total_steps(parts.steps_per_epoch)
        self._share: ClipBatch | None = None
        self.step = start.step
        """Updates made."""
        last = start.last_eval
        self._evaluated_step = int(last["step"]) if last else -1
        self.metrics: Mapping[str, float | None] = dict(last["metrics"]) if last else {}
        """Newest validation metrics."""

    @property
    def checkpoint(self) -> Path | None:
        """Newest checkpoint of the run."""
        return self._saver.newest

    def where(self) -> Whereabouts:
        """Where this rank stands now; asked from another thread."""
        stage, seconds = self._parts.stages.standing()
        share = self._share if stage in ("to_device", "forward", "backward") else None
        return Whereabouts(step=self.step, stage=stage, seconds=seconds, keys=share.sample_ids if share else ())

    def to_the_end(self) -> None:
        """Train to the last step; raises what stops it, after the checkpoint that a stop asks for."""
        if self.step > 0 and self._is_validation_due():
            self._validate()  # a kill between a checkpoint and its validation
        self._parts.stages.restart()
        while self.step < self._total_steps:
            epoch, first_step = divmod(self.step, self._parts.steps_per_epoch)
            with contextlib.closing(self._parts.intake.epoch(epoch, first_step=first_step)) as steps:
                for intake in steps:
                    self._advance(intake, epoch)
                    if self.step == self._total_steps:
                        break

    def keep_evidence(self, error: BaseException) -> None:
        """Write what a failure leaves: journal lines, and the clips whose numbers were not finite."""
        if isinstance(error, NonFiniteError) and self._share is not None:
            name = f"step-{self.step + 1}.attempt-{self._start.attempt}.rank-{self._ranks.rank}"
            with contextlib.suppress(EnvironmentFault, OSError):
                keep_failing_clips(self._settings.folder, self._share, error.keys, name=name)
        if isinstance(error, RunStoppedError):
            self._parts.log("end", status="stopped", step=self.step, error=str(error))
            return
        facts = {"keys": error.keys, "parameters": error.parameters} if isinstance(error, NonFiniteError) else {}
        notes = getattr(error, "__notes__", [])
        self._parts.log("fault", kind=type(error).__name__, step=self.step, error=str(error), notes=notes, **facts)
        self._parts.log("end", status="failed", step=self.step, error=str(error))

    def _advance(self, intake: StepIntake, epoch: int) -> None:
        if intake.share is None:
            self._stop(intake.stop_signal)
            return
        self._share = intake.share
        self._settings.faults.reach("step.received")
        result = self._parts.stepper.update(intake.share, intake.keys_of_rank, step=self.step + 1)
        self.step += 1
        self._settings.faults.reach("step.updated")
        self._report(intake, result, epoch)
        self._settings.faults.reach("step.logged")
        validate, last = self._is_validation_due(), self.step == self._total_steps
        if validate or last or self.step % self._config.checkpoint_every_steps == 0:
            self._save(required=last)
        if validate:
            self._validate()
        self._parts.stages.restart()

    def _report(self, intake: StepIntake, result: StepResult, epoch: int) -> None:
        times = self._parts.stages.times()
        seconds = times.step_seconds
        progress = TrainingProgress(
            step=self.step,
            total_steps=self._total_steps,
            epoch=epoch,
            loss=result.loss,
            lr=result.lr,
            clips_per_second=self._config.global_batch_size / seconds if seconds > 0 else 0.0,
            data_wait_fraction=min(1.0, intake.wait_seconds / seconds) if seconds > 0 else 0.0,
        )
        fields = asdict(progress)
        del fields["total_steps"]
        fields |= {"grad_norm": result.grad_norm, "sample_ids_hash": intake.sample_ids_hash}
        self._parts.log("step", **fields, **_seconds_and_counts(times, self._parts.counts))
        if self._settings.progress is not None and self._ranks.is_main:
            self._settings.progress(progress)

    def _is_validation_due(self) -> bool:
        every = self._config.validate_every_epochs
        epochs, rest = divmod(self.step, self._parts.steps_per_epoch)
        due = self.step == self._total_steps or (every > 0 and rest == 0 and epochs % every == 0)
        return due and self._parts.validation is not None and self._evaluated_step != self.step

    def _validate(self) -> None:
        assert self._parts.validation is not None
        begin = self._settings.clock()
        with self._parts.stages.stage("validation"):
            self._settings.faults.reach("validation.begun")
            result = evaluate(
                self._parts.model,
                self._parts.validation,
                accelerator=self._parts.accelerator,
                targets=self._settings.targets,
                per_device_batch_size=self._config.per_device_batch_size,
                ranks=self._ranks,
            )
        self.metrics, self._evaluated_step = result.metrics, self.step
        if self._ranks.is_main:
            told = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
            _LOGGER.info("validation after step %d of %d: %s", self.step, self._total_steps, told)
        if self._parts.journal is not None:
            self._parts.journal.write_metrics(
                "eval",
                result.metrics,
                step=self.step,
                epoch=(self.step - 1) // self._parts.steps_per_epoch,
                split="validation",
                num_samples=result.num_samples,
                seconds=self._settings.clock() - begin,
            )

    def _save(self, *, required: bool) -> None:
        outcome = self._saver.save(self.step)
        if outcome.folder is None and (required or outcome.num_failed >= MAX_FAILED_SAVES):
            raise EnvironmentFault(
                f"cannot save at step {self.step} ({outcome.num_failed} failures in a row): {outcome.problems[0]}; "
                f"the newest checkpoint is {self.checkpoint or 'none'}"
            )

    def _stop(self, signal_number: int) -> None:
        """Save what is not saved and end: a stop without its checkpoint is a failure of the machine's."""
        self._parts.log("fault", kind="signal", step=self.step, signal=signal_number)
        stopped = f"stopped by signal {signal_number} after step {self.step}"
        if self.step > self._saver.step:
            outcome = self._saver.save(self.step)
            if outcome.folder is None:
                raise StopNotSavedError(
                    f"{stopped}, but its state is NOT saved: {outcome.problems[0]}; {self._what_counts()}",
                    signal_number=signal_number,
                )
        kept = f"its state is in {self.checkpoint}" if self.step else "nothing new to save"
        raise stopped_error(signal_number, f"{stopped}; {kept}; rerun to resume")

    def _what_counts(self) -> str:
        if self.checkpoint is None:
            return "there is no checkpoint, so a rerun begins anew"
        lost = self.step - self._saver.step
        return (
            f"the newest checkpoint is {self.checkpoint}: a rerun goes on from step {self._saver.step} and makes "
            f"{lost} step{'s' if lost > 1 else ''} again"
        )


def _seconds_and_counts(times: StepTimes, counts: SourceCounts) -> dict[str, Any]:
    """Of a step line: the step's wall time, its stages, which add up to it, and what the loader did meanwhile."""
    return {"step_seconds": times.step_seconds, "stages": times.named(), "loader": counts.since_last()}
