"""Where a run starts: its attempt number, the checkpoint it resumes, and what had to be passed over."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ca2st.training.checkpoint import (
    CHECKPOINTS_NAME,
    Checkpoint,
    CheckpointMarker,
    last_attempt_of_checkpoints,
    list_checkpoints,
    read_checkpoint,
    sweep_partial,
)
from ca2st.training.documents import differences
from ca2st.training.errors import CheckpointDamagedError, ResumeRefusedError
from ca2st.training.journal import JOURNAL_NAME, cut_torn_end, last_attempt, read_events
from ca2st.training.record import check_resumable, version_changes

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStart:
    """How this attempt begins; decided on the main rank, told to all."""

    attempt: int
    """1 for a new run."""
    folder: Path | None
    """Checkpoint to resume, verified; None starts at step 0."""
    step: int
    """Updates already made."""
    damaged: tuple[str, ...]
    """Newer checkpoints passed over because their bytes are damaged: what and where."""
    changes: tuple[str, ...]
    """Versions and topology that differ from the checkpoint's."""
    cut_bytes: int
    """Bytes of a torn last journal line that were cut."""
    swept: tuple[str, ...]
    """Names of half-written checkpoint folders that were removed."""
    last_eval: Mapping[str, Any] | None
    """Newest ``eval`` line of the journal."""


def open_run(
    folder: Path,
    *,
    wanted: Mapping[str, Any],
    versions: Mapping[str, str],
    topology: Mapping[str, Any],
    strict: bool = False,
) -> RunStart:
    """Tidy a run folder and find where to go on; the caller holds its lock.

    `wanted` is the identity of the run to be (`record.identity`); `versions` and `topology` are those of now;
    `strict` refuses damage and other versions instead of warning.

    Raises:
        ResumeRefusedError: the folder holds another run, or (strict) one of other versions.
        CheckpointDamagedError: no checkpoint is sound, or (strict) the newest is not.
    """
    root, journal = folder / CHECKPOINTS_NAME, folder / JOURNAL_NAME
    root.mkdir(parents=True, exist_ok=True)
    cut_bytes = cut_torn_end(journal)
    attempt = 1 + max(last_attempt(journal), last_attempt_of_checkpoints(root))
    swept = tuple(path.name for path in sweep_partial(root))
    checkpoint, damaged = _newest_sound(root, strict=strict)
    changes: tuple[str, ...] = ()
    if checkpoint is not None:
        check_resumable(checkpoint, wanted)
        changes = _tolerated_changes(checkpoint.marker, versions, topology, strict=strict)
    return RunStart(
        attempt=attempt,
        folder=checkpoint.folder if checkpoint else None,
        step=checkpoint.marker.step if checkpoint else 0,
        damaged=damaged,
        changes=changes,
        cut_bytes=cut_bytes,
        swept=swept,
        last_eval=max(read_events(journal, event="eval"), key=lambda line: int(line["step"]), default=None),
    )


def _newest_sound(root: Path, *, strict: bool) -> tuple[Checkpoint | None, tuple[str, ...]]:
    damaged: list[str] = []
    for folder in list_checkpoints(root):
        try:
            return read_checkpoint(folder), tuple(damaged)
        except CheckpointDamagedError as error:
            if strict:
                raise
            _LOGGER.warning("DAMAGED CHECKPOINT passed over, an older one is used: %s", error)
            damaged.append(str(error))
    if damaged:
        raise CheckpointDamagedError(
            f"{root}: no sound checkpoint is left ({'; '.join(damaged)}); restore one, or train into another folder"
        )
    return None, ()


def _tolerated_changes(
    marker: CheckpointMarker, versions: Mapping[str, str], topology: Mapping[str, Any], *, strict: bool
) -> tuple[str, ...]:
    changed = version_changes(marker, versions)
    if changed and strict:
        raise ResumeRefusedError(
            f"saved under other versions: {'; '.join(changed)}; install those, or resume without --strict-resume"
        )
    changed += differences(marker.topology, topology)
    if changed:
        _LOGGER.warning("resuming with changes, numbers will be close but may not be equal: %s", "; ".join(changed))
    return tuple(changed)
