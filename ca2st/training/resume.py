"""What a resume compares.

What makes two trainings the same run, and how a resumed one is compared with what it resumes.

Where a run starts: its attempt number, the checkpoint it resumes, and what had to be passed over.
"""

import json
import logging
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ca2st import __version__
from ca2st.checked_json import canonical_json
from ca2st.errors import UserInputError
from ca2st.training.checkpoint import (
    CHECKPOINTS_NAME,
    Checkpoint,
    CheckpointMarker,
    last_attempt_of_checkpoints,
    list_checkpoints,
    read_checkpoint,
    sweep_partial,
)
from ca2st.training.errors import CheckpointDamagedError, ResumeRefusedError
from ca2st.training.journal import (
    JOURNAL_NAME,
    cut_torn_end,
    differences,
    last_attempt,
    read_events,
    sha256_of_document,
)

RECIPE_FILE = "recipe.json"
LOADER_FILE = "loader.json"
_RESERVED = ("recipe", "loader", "schedule", "optimizer", "COMPLETE")
_NAME = re.compile(r"[a-z0-9_-]+")
_LIBRARIES = ("torch", "accelerate", "safetensors", "numpy")


def library_versions() -> dict[str, str]:
    """Versions that training's numbers depend on; callers add those of their loaders."""
    return {"python": platform.python_version(), "ca2st": __version__} | {name: version(name) for name in _LIBRARIES}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """What the caller knows of a run and a checkpoint must remember. All of it is plain JSON."""

    manifests: Mapping[str, str]
    """Fingerprint of each shard set's manifest, by role; must equal at resume."""
    recipe: Mapping[str, Any]
    """The resolved recipe; must equal at resume. Leave out what may change: workers, paths, cadences."""
    loader: Mapping[str, Any] = field(default_factory=dict)
    """What the order of the clips follows from (lanes, shuffle block, rules' version); must equal at resume."""
    experts: Mapping[str, str] = field(default_factory=dict)
    """sha256 of each file of frozen weights, by expert, or by what else is frozen; must equal at resume."""
    start: Mapping[str, str] = field(default_factory=dict)
    """What trained model the run began with (``sha256``); empty for none; must equal at resume."""
    versions: Mapping[str, str] = field(default_factory=library_versions)
    """Library versions; a difference at resume warns, or refuses when strict."""
    documents: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further JSON documents kept in every checkpoint as ``<name>.json``: class names, model configuration."""

    def __post_init__(self) -> None:
        wrong = [name for name in self.documents if name in _RESERVED or not _NAME.fullmatch(name)]
        if wrong:
            raise UserInputError(
                f"documents: expected names of a-z, 0-9, _ and - other than {', '.join(_RESERVED)}, found {wrong}"
            )

    def files(self) -> dict[str, bytes]:
        """The record's files in a checkpoint folder."""
        extra = {f"{name}.json": canonical_json(document) for name, document in self.documents.items()}
        return {RECIPE_FILE: canonical_json(self.recipe), **extra}

    @property
    def recipe_sha256(self) -> str:
        """Hash of ``recipe.json``."""
        return sha256_of_document(self.recipe)


def identity(record: RunRecord, *, seed: int, global_batch_size: int) -> dict[str, Any]:
    """What must not change in a run's life, as one document."""
    return {
        "seed": seed,
        "global_batch_size": global_batch_size,
        "manifests": dict(record.manifests),
        "experts": dict(record.experts),
        "start": dict(record.start),
        "loader": json.loads(canonical_json(record.loader)),
        "recipe": json.loads(canonical_json(record.recipe)),
    }


def identity_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The identity that a checkpoint was saved under."""
    marker = checkpoint.marker
    return {
        "seed": marker.seed,
        "global_batch_size": marker.global_batch_size,
        "manifests": dict(marker.manifests),
        "experts": dict(marker.experts),
        "start": dict(marker.start),
        "loader": json.loads(checkpoint.files[LOADER_FILE])["plan"],
        "recipe": json.loads(checkpoint.files[RECIPE_FILE]),
    }


def check_resumable(checkpoint: Checkpoint, wanted: Mapping[str, Any]) -> None:
    """Refuse to resume another run.

    Raises:
        ResumeRefusedError: lists each difference as ``field: was -> is``.
    """
    changed = differences(identity_of(checkpoint), wanted)
    if changed:
        listed = "\n  ".join(changed)
        raise ResumeRefusedError(
            f"{checkpoint.folder}: saved by another run:\n  {listed}\nundo the change, or train into another folder"
        )


def version_changes(marker: CheckpointMarker, versions: Mapping[str, str]) -> list[str]:
    """Libraries whose version differs from the checkpoint's, as ``name: was -> is``."""
    return differences(marker.versions, versions)


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
