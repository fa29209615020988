"""`train`: from a model and its sources to a trained, journalled, resumable run.

One attempt of a run: lock the folder, find where to go on, then update, journal, checkpoint, validate, until the end or
a request to stop.
"""

import contextlib
import functools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ca2st.batch import ClipBatch
from ca2st.checked_json import canonical_json, finite
from ca2st.errors import EnvironmentFault, UserInputError, listed
from ca2st.training import checkpoint, errors, journal, resume
from ca2st.training.best import Metrics, best_steps, reason_to_end, score_at
from ca2st.training.evaluate import EvaluationSource, evaluate
from ca2st.training.optim import WeightAverage, build_optimizer
from ca2st.training.ranks import (
    Heartbeat,
    Ranks,
    SourceCounts,
    StageClock,
    Whereabouts,
    memory_fault,
    naming_memory_faults,
    peak_memory,
    profiled,
)
from ca2st.training.settings import TrainingProgress, TrainingResult, TrainingSettings, ranking_metric, topology_of
from ca2st.training.sharded import is_sharded, put
from ca2st.training.signals import TIME_UP, StopRequest, stopped_error
from ca2st.training.step import (
    Intake,
    StepIntake,
    Stepper,
    StepResult,
    TrainSource,
    check_accelerator,
    hash_of_keys,
    keep_failing_clips,
)

_LOGGER = logging.getLogger(__name__)


def train(
    model: nn.Module,
    source: TrainSource,
    *,
    accelerator: Accelerator,
    settings: TrainingSettings,
    validation: EvaluationSource | None = None,
    stop: StopRequest | None = None,
) -> TrainingResult:
    """Train `model`, going on where the run folder's newest sound checkpoint stands.

    Called on every rank with the same arguments but for the sources, which give each rank its own share. Parameters
    train as their ``requires_grad`` says. The model is moved to the device and changed in place.

    Raises:
        ResumeRefusedError: the folder holds another run.
        RunStoppedError: `stop` was requested; the state is saved.
        StopNotSavedError: `stop` was requested, and the state could not be saved.
        OutOfMemoryFault: memory of device, machine or /dev/shm did not suffice.
        RanksSilentError: other ranks kept this one waiting for longer than the timeout.
        CA2STError: numbers that are not finite, a folder in use, saves that fail; one rank's failure ends all.
    """
    ranks = Ranks(accelerator, stages=StageClock(settings.clock))
    topology = topology_of(accelerator, settings)
    with contextlib.ExitStack() as stack:
        stack.enter_context(naming_memory_faults())
        _check_setup(ranks, accelerator, settings, steps_per_epoch=source.steps_per_epoch)
        start, log = _open(ranks, settings, topology, stack=stack)
        run = _Run(
            model,
            source,
            validation,
            accelerator=accelerator,
            ranks=ranks,
            settings=settings,
            topology=topology,
            start=start,
            log=log,
            stop=stop or StopRequest(),
        )
        heartbeat = Heartbeat(
            settings.folder,
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout_seconds=settings.config.collective_timeout_seconds,
            where=run.where,
        )
        with heartbeat:
            try:
                return run.to_the_end()
            except BaseException as error:
                named = memory_fault(error) or heartbeat.explain(error)
                run.keep_evidence(named or error)
                if named is not None:
                    raise named from error
                raise


def _check_setup(ranks: Ranks, accelerator: Accelerator, settings: TrainingSettings, *, steps_per_epoch: int) -> None:
    """Refuse what cannot work before anything is made, and ranks that were started with different settings."""
    check_accelerator(accelerator, settings.config)
    if steps_per_epoch < 1:
        raise UserInputError(f"steps_per_epoch: expected at least 1, found {steps_per_epoch}; add samples")
    settings.schedule(steps_per_epoch)
    ranking_metric(settings)
    own = {**settings.identity(), "versions": dict(settings.record.versions), "steps_per_epoch": steps_per_epoch}
    first, *others = ranks.gather(own)
    for rank, other in enumerate(others, start=1):
        if changed := journal.differences(first, other):
            raise errors.RanksDisagreeError(f"rank {rank} was started otherwise than rank 0: {'; '.join(changed)}")


def _open(
    ranks: Ranks, settings: TrainingSettings, topology: Mapping[str, Any], *, stack: contextlib.ExitStack
) -> tuple[resume.RunStart, journal.Journal | None]:
    """Lock the folder and open the journal, on the main rank, until `stack` closes; every rank learns the start."""
    log: journal.Journal | None = None

    def open_on_main() -> resume.RunStart:
        nonlocal log
        stack.enter_context(journal.locked(settings.folder, wait_seconds=settings.lock_wait_seconds))
        start = resume.open_run(
            settings.folder,
            wanted=settings.identity(),
            versions=settings.record.versions,
            topology=topology,
            strict=settings.strict_resume,
        )
        path = settings.folder / journal.JOURNAL_NAME
        log = journal.Journal(path, attempt=start.attempt, wall_clock=settings.wall_clock)
        stack.enter_context(journal.closed_at_the_end(log))
        return start

    start = ranks.on_main(open_on_main)
    return start, log


class _Run:
    """One attempt from its start to its end."""

    def __init__(
        self,
        model: nn.Module,
        source: TrainSource,
        validation: EvaluationSource | None,
        *,
        accelerator: Accelerator,
        ranks: Ranks,
        settings: TrainingSettings,
        topology: Mapping[str, Any],
        start: resume.RunStart,
        log: journal.Journal | None,
        stop: StopRequest,
    ) -> None:
        self._model, self._validation, self._accelerator = model, validation, accelerator
        self._settings, self._config, self._start = settings, settings.config, start
        self._topology, self._journal, self._ranks, self._stages = topology, log, ranks, ranks.stages
        self._counts = SourceCounts(source)
        self._steps_per_epoch = source.steps_per_epoch
        self._total_steps = self._config.total_steps(source.steps_per_epoch)
        self._schedule = settings.schedule(source.steps_per_epoch)
        self._optimizer = build_optimizer(model, settings.optim, rules=settings.rules)
        self._intake = Intake(source, ranks, settings=settings, stop=stop)
        self._is_sharded = is_sharded(model)
        decay = self._config.ema_decay
        self._average = None if decay is None else WeightAverage(model, decay)
        self._stepper = Stepper(
            *self._prepared(), accelerator=accelerator, ranks=ranks, settings=settings, schedule=self._schedule
        )
        self._keeper = checkpoint.CheckpointKeeper(
            settings.folder / checkpoint.CHECKPOINTS_NAME,
            keep=self._config.keep_checkpoints,
            keep_best=self._config.keep_best,
            faults=settings.faults,
        )
        self._checkpoint, self._saved_step = start.folder, start.step
        self._share: ClipBatch | None = None
        self._step = start.step
        self._fit: list[float] = []
        self._scores: dict[int, Metrics] = dict(start.validations)
        self._metric = ranking_metric(settings)
        self._stop_request, self._begun = stop, settings.clock()
        self._skipped = list(start.skipped)
        self._buffers = {name: one for name, one in resume.trained_tensors(model).items() if not one.requires_grad}

    def _prepared(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return model and optimizer as Accelerate trains them."""
        if self._is_sharded:  # no DistributedDataParallel around it; autocast is Accelerate's here too
            shared = self._accelerator.prepare_model(self._model, device_placement=False, evaluation_mode=True)
            return shared, self._optimizer
        # where Accelerate places them itself, it imports seconds' worth of torch to do so
        whole = self._model.to(self._accelerator.device)
        prepared: tuple[nn.Module, torch.optim.Optimizer] = self._accelerator.prepare(
            whole, self._optimizer, device_placement=[False, False]
        )
        return prepared

    def where(self) -> Whereabouts:
        """Return where this rank stands now; called from another thread."""
        stage, seconds = self._stages.standing()
        share = self._share if stage in ("to_device", "forward", "backward") else None
        return Whereabouts(step=self._step, stage=stage, seconds=seconds, keys=share.sample_ids if share else ())

    def to_the_end(self) -> TrainingResult:
        """Train to the last step; raises what stops it, after the checkpoint that a stop asks for."""
        self._begin()
        if self._step > 0 and self._is_validation_due():
            self._validate()  # a kill between a checkpoint and its validation
        self._stages.restart()
        config = self._config
        with profiled(self._settings.folder, steps=config.profile_steps, rank=self._ranks.rank) as self._mark_step:
            while not self._is_over():
                epoch, first_step = divmod(self._step, self._steps_per_epoch)
                with contextlib.closing(self._intake.epoch(epoch, first_step=first_step)) as steps:
                    for intake in steps:
                        self._advance(intake, epoch)
                        if self._is_over():
                            break
        ended = self._reason_to_end()
        if self._saved_step < self._step:  # the save before the last validation failed
            self._save(required=True)
        self._log("end", status="done", step=self._step, **({"reason": ended} if ended else {}))
        assert self._checkpoint is not None  # the last step's save is required
        return TrainingResult(
            steps=self._step,
            checkpoint=self._checkpoint,
            metrics=self._scores[max(self._scores)] if self._scores else {},
            best=score_at(self._settings.folder, self._scores, self._metric, best_steps(self._scores, self._metric)),
            ended_early=ended,
            attempt=self._start.attempt,
            resumed_step=self._start.step,
            damaged_checkpoints=self._start.damaged,
        )

    def _is_over(self) -> bool:
        return self._step >= self._total_steps or self._reason_to_end() is not None

    def _reason_to_end(self) -> str | None:
        """Return why the run ends before its last step, equal on every rank; None: it does not."""
        if self._step >= self._total_steps:
            return None
        if (fit := self._config.stop_at_fit) is not None and len(self._fit) == self._steps_per_epoch:
            share = sum(self._fit) / len(self._fit)
            if share >= fit:
                return f"{share:.1%} of the training clips right in the last epoch (stop_at_fit = {fit})"
        if self._step not in self._scores:
            return None
        return reason_to_end(self._config, self._scores, self._metric)

    def keep_evidence(self, error: BaseException) -> None:
        """Write what a failure leaves: journal lines, and the clips whose numbers were not finite."""
        facts: dict[str, Any] = {}
        if isinstance(error, errors.NonFiniteError):
            self._keep_clips(error)
            facts = {"keys": error.keys, "parameters": error.parameters}
        status = "stopped" if isinstance(error, errors.RunStoppedError) else "failed"
        if status == "failed":
            notes = getattr(error, "__notes__", [])
            self._log("fault", kind=type(error).__name__, step=self._step, error=str(error), notes=notes, **facts)
        self._log("end", status=status, step=self._step, error=str(error))

    def _log(self, event: str, **fields: Any) -> None:
        """Write a journal line, on the main rank."""
        if self._journal is not None:
            self._journal.write(event, **fields)

    def _begin(self) -> None:
        """Put the checkpoint's state in place and write how the attempt begins."""
        self._restore()
        start, record = self._start, self._settings.record
        if self._config.stop_at_fit is not None:
            self._fit = self._ranks.on_main(self._fit_so_far)
        self._log(
            "start",
            step=start.step,
            resumed_from=start.folder.name if start.folder else None,
            total_steps=self._total_steps,
            steps_per_epoch=self._steps_per_epoch,
            topology=self._topology,
            manifests=record.manifests,
            recipe_sha256=record.recipe_sha256,
            versions=record.versions,
            started_from=self._settings.started_from,
            changes=start.changes,
            swept=start.swept,
            cut_bytes=start.cut_bytes,
        )
        if start.folder is not None and self._ranks.is_main:
            what = "already finished, nothing to train:" if self._is_over() else "resuming"
            _LOGGER.info("%s step %d of %d from %s", what, start.step, self._total_steps, start.folder)
        for problem in start.damaged:
            self._log("fault", kind="damaged_checkpoint", step=start.step, error=problem)
        self._model.train()

    def _restore(self) -> None:
        """Read and check the checkpoint on every rank; only when all have succeeded does any swap it in."""
        if self._start.folder is None:
            return
        folder, state = self._start.folder, None

        def read() -> None:
            nonlocal state
            files = checkpoint.read_checkpoint(folder).files
            for name, now in (
                (resume.LOADER_FILE, self._position(self._start.step)),
                (resume.SCHEDULE_FILE, asdict(self._schedule)),
            ):
                if changed := journal.differences(json.loads(files[name]), now):
                    raise errors.ResumeRefusedError(f"{folder / name}: saved by another run: {'; '.join(changed)}")
            state = resume.read_state(self._model, self._optimizer, files=files)
            if self._average is not None and state.average is None:
                raise errors.ResumeRefusedError(
                    f"{folder}: expected {resume.AVERAGE_FILE} for training.ema_decay, found none"
                )

        self._ranks.together(read)
        assert state is not None
        resume.put_state(self._model, self._optimizer, state=state)
        self._stepper.loss_scale.put(state.loss_scale)
        if self._average is not None and state.average is not None:
            put(self._average.tensors, state.average)

    def _fit_so_far(self) -> list[float]:
        """Return the shares of right answers of the epoch's worth of steps before this attempt; [] where some lack."""
        lines = journal.run_sequence(self._settings.folder / journal.JOURNAL_NAME)
        shares = {line["step"]: journal.share_right(line) for line in lines}
        before = range(max(0, self._step - self._steps_per_epoch) + 1, self._step + 1)
        return [shares[step] for step in before] if shares.keys() >= {*before} else []

    def _position(self, step: int) -> dict[str, Any]:
        """Return where the loader stands after `step` updates, and what its order follows from."""
        epoch, step_in_epoch = divmod(step, self._steps_per_epoch)
        return {
            "epoch": epoch,
            "step_in_epoch": step_in_epoch,
            "steps_per_epoch": self._steps_per_epoch,
            "plan": dict(self._settings.record.loader),
        }

    def _advance(self, intake: StepIntake, epoch: int) -> None:
        if intake.share is None:
            self._stop(intake.stop_signal)
            return
        self._share = intake.share
        self._settings.faults.reach("step.received")
        result = self._updated(intake.share, intake.keys_of_rank)
        self._step += 1
        self._fit = [*self._fit, result.right or 0.0][-self._steps_per_epoch :]
        if self._average is not None:
            self._average.update(self._step)
        self._settings.faults.reach("step.updated")
        self._report(intake, result, epoch)
        self._settings.faults.reach("step.logged")
        limit = self._config.max_hours
        if limit is not None and self._settings.clock() - self._begun >= 3600 * limit:
            self._stop_request.request(TIME_UP)  # the next intake tells all ranks
        validate, last = self._is_validation_due(), self._step == self._total_steps
        if validate or last or self._step % self._config.checkpoint_every_steps == 0:
            self._save(required=last)
        if validate:
            self._validate()
        self._mark_step()
        self._stages.restart()

    def _updated(self, share: ClipBatch, keys_of_rank: Sequence[tuple[str, ...]]) -> StepResult:
        """Make the next update; or, while there is budget, leave it out where its numbers are not finite."""
        step, budget = self._step + 1, self._config.max_skipped_steps
        if budget == 0:
            return self._stepper.update(share, keys_of_rank, step=step)
        before = {name: buffer.clone() for name, buffer in self._buffers.items()}
        try:
            return self._stepper.update(share, keys_of_rank, step=step)
        except errors.NonFiniteError as error:
            if len(self._skipped) >= budget:
                raise errors.NonFiniteError(
                    f"{error}; training.max_skipped_steps = {budget} are used up (left out: steps "
                    f"{listed([str(one) for one in self._skipped])})",
                    keys=error.keys,
                    parameters=error.parameters,
                ) from error
            self._keep_clips(error)
            self._skipped.append(step)
            facts = {"keys": error.keys, "parameters": error.parameters, "budget": budget}
            self._log("fault", kind=journal.SKIPPED_STEP, step=step, error=str(error), **facts)
            _LOGGER.warning("LEFT OUT, %d of %d that may be: %s", len(self._skipped), budget, error)
            self._optimizer.zero_grad(set_to_none=True)
            for name, buffer in self._buffers.items():
                buffer.copy_(before[name])
            return StepResult(loss=math.nan, lr=self._schedule.at(step - 1), grad_norm=None)

    def _keep_clips(self, error: errors.NonFiniteError) -> None:
        """Write the clips of the coming step whose numbers are not finite, as far as the disk allows."""
        if self._share is not None:
            name = f"step-{self._step + 1}.attempt-{self._start.attempt}.rank-{self._ranks.rank}"
            with contextlib.suppress(EnvironmentFault, OSError):
                keep_failing_clips(self._settings.folder, self._share, error.keys, name=name)

    def _report(self, intake: StepIntake, result: StepResult, epoch: int) -> None:
        stages = self._stages.seconds()
        seconds = sum(stages.values())
        progress = TrainingProgress(
            step=self._step,
            total_steps=self._total_steps,
            epoch=epoch,
            loss=result.loss,
            lr=result.lr,
            clips_per_second=self._config.global_batch_size / seconds if seconds > 0 else 0.0,
            data_wait_fraction=min(1.0, intake.wait_seconds / seconds) if seconds > 0 else 0.0,
        )
        fields = asdict(progress)
        del fields["total_steps"]
        fields["loss"] = result.loss if math.isfinite(result.loss) else None
        self._log(
            "step",
            **fields,
            grad_norm=result.grad_norm,
            **({} if result.right is None else {journal.SHARE_RIGHT[self._settings.labelling]: result.right}),
            **({} if result.loss_scale is None else {"loss_scale": result.loss_scale}),
            **({"skipped_steps": len(self._skipped)} if self._config.max_skipped_steps else {}),
            sample_ids_hash=hash_of_keys([key for keys in intake.keys_of_rank for key in keys]),
            step_seconds=seconds,
            stages={f"{stage}_seconds": spent for stage, spent in stages.items()},
            loader=self._counts.since_last(),
        )
        if self._ranks.is_main and self._step == self._start.step + 1:
            _LOGGER.info("memory of the first step, at its peak: %s", peak_memory())
        if self._settings.progress is not None and self._ranks.is_main:
            self._settings.progress(progress)

    def _is_validation_due(self) -> bool:
        epochs, rest = divmod(self._step, self._steps_per_epoch)
        of_epochs, of_steps = self._config.validate_every_epochs, self._config.validate_every_steps
        due = self._step == self._total_steps or (of_epochs > 0 and rest == 0 and epochs % of_epochs == 0)
        due = due or (of_steps is not None and self._step % of_steps == 0)
        return due and self._validation is not None and self._step not in self._scores

    def _validate(self) -> None:
        assert self._validation is not None
        begin = self._settings.clock()
        averaged = contextlib.nullcontext() if self._average is None else self._average.in_place()
        with self._stages.stage("validation"), averaged:
            self._settings.faults.reach("validation.begun")
            metrics = evaluate(
                self._model,
                self._validation,
                accelerator=self._accelerator,
                targets=self._settings.targets,
                per_device_batch_size=self._config.per_device_batch_size,
                ranks=self._ranks,
            )
        clean = self._scores[self._step] = finite(metrics)
        if self._ranks.is_main:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            _LOGGER.info("validation after step %d of %d: %s", self._step, self._total_steps, shown)
        wrong = sorted(name for name, value in clean.items() if value is None)
        self._log(
            "eval",
            step=self._step,
            epoch=(self._step - 1) // self._steps_per_epoch,
            split="validation",
            num_samples=self._validation.num_samples,
            seconds=self._settings.clock() - begin,
            **({} if self._average is None else {"weights": "average"}),
            metrics=clean,
            **({"not_finite": wrong} if wrong else {}),
        )
        # only now, when the journal has the metrics of what is let go of
        best = best_steps(self._scores, self._metric)
        for problem in self._ranks.on_main(lambda: self._keeper.prune(best=best)):
            self._log("fault", kind="checkpoint", step=self._step, error=problem)

    def _save(self, *, required: bool) -> None:
        outcome = self._write_checkpoint()
        if outcome.folder is None and (required or outcome.num_failed >= checkpoint.MAX_FAILED_SAVES):
            raise EnvironmentFault(
                f"cannot save at step {self._step} ({outcome.num_failed} failures in a row): {outcome.problems[0]}; "
                f"the newest checkpoint is {self._checkpoint or 'none'}"
            )

    def _write_checkpoint(self) -> checkpoint.SaveOutcome:
        """Write a checkpoint on the main rank and journal what came of it; a full disk is an outcome.

        Raises:
            CA2STError: what has nothing to do with the disk, on every rank.
        """
        begin = self._settings.clock()
        collect = functools.partial(
            resume.collect_state,
            self._model,
            self._optimizer,
            average=None if self._average is None else self._average.tensors,
            loss_scale=self._stepper.loss_scale.state(),
        )
        with self._stages.stage("checkpoint"):
            state = collect() if self._is_sharded else None  # there every rank takes part
            outcome = self._ranks.on_main(lambda: self._write_on_main(state or collect()))
        for problem in outcome.problems:
            _LOGGER.warning("checkpoint at step %d: %s", self._step, problem)
            self._log("fault", kind="checkpoint", step=self._step, error=problem, num_failed=outcome.num_failed)
        if outcome.folder is not None:
            self._checkpoint, self._saved_step = outcome.folder, self._step
            seconds = self._settings.clock() - begin
            self._log("checkpoint", step=self._step, name=outcome.folder.name, seconds=seconds)
        return outcome

    def _write_on_main(self, state: Mapping[str, bytes]) -> checkpoint.SaveOutcome:
        record = self._settings.record
        files = {
            resume.RECIPE_FILE: canonical_json(record.recipe),
            **{f"{name}.json": canonical_json(document) for name, document in record.documents.items()},
            **state,
            resume.LOADER_FILE: canonical_json(self._position(self._step)),
            resume.SCHEDULE_FILE: canonical_json(asdict(self._schedule)),
        }
        marker = checkpoint.CheckpointMarker(
            step=self._step,
            attempt=self._start.attempt,
            seed=self._config.seed,
            global_batch_size=self._config.global_batch_size,
            manifests=record.manifests,
            recipe_sha256=record.recipe_sha256,
            topology=self._topology,
            versions=record.versions,
            experts=record.experts,
            start=record.start,
        )
        assert self._journal is not None
        best = best_steps(self._scores, self._metric)
        return self._keeper.save(files, marker, best=best, before=self._journal.sync)

    def _stop(self, signal_number: int) -> None:
        """Save what is not saved and end: a stop without its checkpoint is a failure of the machine's."""
        self._log("fault", kind="signal", step=self._step, signal=signal_number)
        why = "because max_hours are over" if signal_number == TIME_UP else f"by signal {signal_number}"
        stopped = f"stopped {why} after step {self._step}"
        if self._step > self._saved_step:
            outcome = self._write_checkpoint()
            if outcome.folder is None:
                again = self._step - self._saved_step
                what_counts = "there is no checkpoint, so a rerun begins anew"
                if self._checkpoint is not None:
                    what_counts = (
                        f"the newest checkpoint is {self._checkpoint}: a rerun goes on from step {self._saved_step} "
                        f"and makes {again} step{'s' if again > 1 else ''} again"
                    )
                raise errors.StopNotSavedError(
                    f"{stopped}, but its state is NOT saved: {outcome.problems[0]}; {what_counts}",
                    signal_number=signal_number,
                )
        kept = f"its state is in {self._checkpoint}" if self._step else "nothing new to save"
        raise stopped_error(signal_number, f"{stopped}; {kept}; rerun to resume")
