"""What an attempt saves, and what its journal says of every save."""

import logging
from dataclasses import asdict
from typing import Any

from ca2st.training.checkpoint import CHECKPOINTS_NAME, CheckpointMarker
from ca2st.training.documents import canonical_json
from ca2st.training.keeper import CheckpointKeeper, SaveOutcome
from ca2st.training.parts import RunParts
from ca2st.training.record import LOADER_FILE, RunRecord
from ca2st.training.resume import RunStart
from ca2st.training.state import collect_state

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
