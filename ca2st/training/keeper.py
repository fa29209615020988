"""Saving, retention and what happens when saving fails."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ca2st.durable import FaultPoints
from ca2st.errors import CA2STError, EnvironmentFault
from ca2st.training.checkpoint import (
    CheckpointMarker,
    checkpoint_name,
    list_checkpoints,
    remove_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)

MAX_FAILED_SAVES = 3
"""Saves in a row that may fail before the run stops: by then more than two cadences of work are at risk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveOutcome:
    """What came of a save."""

    folder: Path | None
    """The new checkpoint, or None when it could not be written."""
    problems: tuple[str, ...] = ()
    """Why it could not, or what could not be cleared away; training goes on."""
    num_failed: int = 0
    """Failed saves in a row, this one included."""


class CheckpointKeeper:
    """Writes checkpoints below one folder and keeps the newest few. Lives on the main rank."""

    def __init__(self, root: Path, *, keep: int, faults: FaultPoints) -> None:
        self._root = root
        self._keep = keep
        self._faults = faults
        self._num_failed = 0

    def save(
        self, files: Mapping[str, bytes], marker: CheckpointMarker, *, before: Callable[[], None] = lambda: None
    ) -> SaveOutcome:
        """Write a checkpoint, then clear old ones away once the new one is verified. A full disk is an outcome.

        `before` makes durable what must not be older than the checkpoint: the journal.
        """
        try:
            before()
            self._discard_unmarked(marker)
            folder = save_checkpoint(self._root, files, marker, faults=self._faults)
        except EnvironmentFault as error:
            self._num_failed += 1
            return SaveOutcome(folder=None, problems=(str(error),), num_failed=self._num_failed)
        self._num_failed = 0
        return SaveOutcome(folder=folder, problems=tuple(self._prune(folder)))

    def _discard_unmarked(self, marker: CheckpointMarker) -> None:
        """Clear what an earlier failed save of this very checkpoint could not remove."""
        folder = self._root / checkpoint_name(marker.step, marker.attempt)
        if folder.exists() and folder not in list_checkpoints(self._root):
            shutil.rmtree(folder, ignore_errors=True)

    def _prune(self, newest: Path) -> list[str]:
        old = [folder for folder in list_checkpoints(self._root) if folder != newest][self._keep - 1 :]
        if not old:
            return []
        try:
            verify_checkpoint(newest)
        except CA2STError as error:
            return [f"kept {len(old)} old checkpoints, the new one is not sound: {error}"]
        problems = []
        for folder in old:
            try:
                remove_checkpoint(folder, faults=self._faults)
            except OSError as error:
                problems.append(f"cannot remove old checkpoint {folder}: {error.strerror}")
        return problems
