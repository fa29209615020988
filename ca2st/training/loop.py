"""`train`: from a model and its sources to a trained, journalled, resumable run."""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from torch import nn

from ca2st.errors import EnvironmentFault, UserInputError
from ca2st.training.checkpoint import read_checkpoint
from ca2st.training.errors import RanksDisagreeError, ResumeRefusedError
from ca2st.training.heartbeat import Heartbeat
from ca2st.training.journal import JOURNAL_NAME, Journal, differences, locked
from ca2st.training.memory import memory_fault, naming_memory_faults
from ca2st.training.parts import RunParts, make_parts, schedule_of, topology_of
from ca2st.training.ranks import Ranks
from ca2st.training.resume import LOADER_FILE, RunStart, identity, open_run
from ca2st.training.run import SCHEDULE_FILE, Run, loader_position
from ca2st.training.settings import TrainingResult, TrainingSettings
from ca2st.training.signals import StopRequest
from ca2st.training.stages import EvaluationSource, TrainSource
from ca2st.training.state import TrainedState, put_state, read_state
from ca2st.training.step import check_accelerator

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
    ranks = Ranks(accelerator)
    with contextlib.ExitStack() as stack:
        stack.enter_context(naming_memory_faults())
        _check_setup(ranks, accelerator, settings, source=source)
        start, journal = _open(ranks, accelerator, settings, stack=stack)
        parts = make_parts(
            model,
            source,
            validation,
            accelerator=accelerator,
            settings=settings,
            stop=stop or StopRequest(),
            journal=journal,
        )
        run = Run(parts, start)
        _run_watched(run, parts, start, ranks=ranks)
        return _finish(run, parts, start)


def _run_watched(run: Run, parts: RunParts, start: RunStart, *, ranks: Ranks) -> None:
    """Train to the end; what stops it gets its own name, and leaves its evidence."""
    heartbeat = Heartbeat(
        parts.settings.folder,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout_seconds=parts.settings.config.collective_timeout_seconds,
        where=run.where,
    )
    with heartbeat:
        try:
            _begin(parts, start)
            run.to_the_end()
        except BaseException as error:
            named = memory_fault(error) or heartbeat.explain(error)
            run.keep_evidence(named or error)
            if named is not None:
                raise named from error
            raise


def _begin(parts: RunParts, start: RunStart) -> None:
    """Put the checkpoint's state in place and say in the journal how the attempt begins."""
    _restore(parts, start)
    settings = parts.settings
    parts.log(
        "start",
        step=start.step,
        resumed_from=start.folder.name if start.folder else None,
        total_steps=settings.config.total_steps(parts.steps_per_epoch),
        steps_per_epoch=parts.steps_per_epoch,
        topology=parts.topology,
        manifests=settings.record.manifests,
        recipe_sha256=settings.record.recipe_sha256,
        versions=settings.record.versions,
        started_from=settings.started_from,
        changes=start.changes,
        swept=start.swept,
        cut_bytes=start.cut_bytes,
    )
    if start.folder is not None and parts.ranks().is_main:
        total = settings.config.total_steps(parts.steps_per_epoch)
        what = "already finished, nothing to train:" if start.step >= total else "resuming"
        _LOGGER.info("%s step %d of %d from %s", what, start.step, total, start.folder)
    for problem in start.damaged:
        parts.log("fault", kind="damaged_checkpoint", step=start.step, error=problem)
    parts.model.train()


def _restore(parts: RunParts, start: RunStart) -> None:
    """Read and check the checkpoint on every rank; only when all have succeeded does any swap it in."""
    if start.folder is None:
        return
    folder, states = start.folder, list[TrainedState]()

    def read() -> None:
        checkpoint = read_checkpoint(folder)
        position = loader_position(parts.settings.record, step=start.step, steps_per_epoch=parts.steps_per_epoch)
        for name, now in ((LOADER_FILE, position), (SCHEDULE_FILE, asdict(parts.schedule))):
            changed = differences(json.loads(checkpoint.files[name]), now)
            if changed:
                raise ResumeRefusedError(f"{folder / name}: saved by another run: {'; '.join(changed)}")
        states.append(read_state(parts.model, parts.optimizer, files=checkpoint.files))

    parts.ranks().together(read)
    put_state(parts.model, parts.optimizer, state=states[0])


def _finish(run: Run, parts: RunParts, start: RunStart) -> TrainingResult:
    parts.log("end", status="done", step=run.step)
    assert run.checkpoint is not None  # the last step's save is required
    return TrainingResult(
        steps=run.step,
        checkpoint=run.checkpoint,
        metrics=run.metrics,
        attempt=start.attempt,
        resumed_step=start.step,
        damaged_checkpoints=start.damaged,
    )


def _open(
    ranks: Ranks, accelerator: Accelerator, settings: TrainingSettings, *, stack: contextlib.ExitStack
) -> tuple[RunStart, Journal | None]:
    """Lock the folder and open the journal, on the main rank, until `stack` closes; every rank learns the start."""
    journals: list[Journal] = []

    def open_on_main() -> RunStart:
        stack.enter_context(locked(settings.folder, wait_seconds=settings.lock_wait_seconds))
        start = open_run(
            settings.folder,
            wanted=_identity(settings),
            versions=settings.record.versions,
            topology=topology_of(accelerator, settings),
            strict=settings.strict_resume,
        )
        path = settings.folder / JOURNAL_NAME
        journals.append(Journal(path, attempt=start.attempt, wall_clock=settings.wall_clock))
        stack.enter_context(_closed_at_the_end(journals[0]))
        return start

    start = ranks.on_main(open_on_main)
    return start, journals[0] if journals else None


@contextlib.contextmanager
def _closed_at_the_end(journal: Journal) -> Iterator[None]:
    """Close the journal after the block; lines that are lost are a failure, but hide no other one."""
    try:
        yield
    except BaseException as error:
        try:
            journal.close()
        except EnvironmentFault as lost:
            error.add_note(str(lost))
        raise
    journal.close()


def _identity(settings: TrainingSettings) -> dict[str, Any]:
    config = settings.config
    return identity(settings.record, seed=config.seed, global_batch_size=config.global_batch_size)


def _check_setup(ranks: Ranks, accelerator: Accelerator, settings: TrainingSettings, *, source: TrainSource) -> None:
    """Refuse what cannot work before anything is made, and ranks that were told different things."""
    check_accelerator(accelerator, settings.config)
    if source.steps_per_epoch < 1:
        raise UserInputError(f"steps_per_epoch: expected at least 1, found {source.steps_per_epoch}; add samples")
    schedule_of(settings, source)
    own = {**_identity(settings), "versions": dict(settings.record.versions), "steps_per_epoch": source.steps_per_epoch}
    first, *others = ranks.gather(own)
    for rank, other in enumerate(others, start=1):
        changed = differences(first, other)
        if changed:
            raise RanksDisagreeError(f"rank {rank} was started otherwise than rank 0: {'; '.join(changed)}")
