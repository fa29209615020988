"""What a training in a run folder would go on with, told without touching the folder."""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ca2st.checked_json import DocumentError, read_json
from ca2st.errors import UserInputError
from ca2st.training.checkpoint import (
    CHECKPOINTS_NAME,
    CheckpointMarker,
    checkpoint_name,
    last_attempt_of_checkpoints,
    list_checkpoints,
    read_checkpoint_file,
    verify_checkpoint,
)
from ca2st.training.documents import differences
from ca2st.training.errors import CheckpointDamagedError, ResumeRefusedError
from ca2st.training.journal import JOURNAL_NAME, last_attempt
from ca2st.training.record import RECIPE_FILE
from ray_jobs.config.recipe import Recipe, identity_settings, stored_recipe
from ray_jobs.inference.trained import RUN_DOCUMENT, read_run_document

_LOGGER = logging.getLogger(__name__)


def resume_plan(recipe: Recipe, run_dir: Path, *, fingerprints: Mapping[str, str] | None, steps: int) -> dict[str, Any]:
    """What a start in `run_dir` would go on with; every byte of its newest checkpoint is verified.

    `fingerprints`: those of the training's manifests, by role; None where its shards are not made yet. ``state`` is
    ``new``, ``begin again`` (a run that ended before its first checkpoint), ``resume`` or ``finished``.

    Raises:
        UserInputError: the folder holds a run of another recipe, or of other data.
        CheckpointDamagedError: checkpoints are there, and none is sound.
    """
    facts: dict[str, Any] = {"run_dir": str(run_dir), "state": "new", "attempt": 1, "checkpoint": None, "step": 0}
    root = run_dir / CHECKPOINTS_NAME
    if not (run_dir / RECIPE_FILE).exists() and not list_checkpoints(root):
        return facts | {"damaged": [], "changes": []}
    refuse_other_recipe(recipe, run_dir)
    facts["attempt"] = 1 + max(last_attempt(run_dir / JOURNAL_NAME), last_attempt_of_checkpoints(root))
    marker, damaged = _newest_sound(root)
    if marker is None:
        return facts | {"state": "begin again", "damaged": [], "changes": []}
    if fingerprints is not None and (changed := differences(marker.manifests, fingerprints)):
        listed = "\n  ".join(changed)
        raise ResumeRefusedError(f"{run_dir}: holds a run on other data; choose another --out:\n  {listed}")
    now = _topology(recipe)
    return facts | {
        "state": "finished" if marker.step >= steps else "resume",
        "checkpoint": checkpoint_name(marker.step, marker.attempt),
        "step": marker.step,
        "damaged": damaged,
        "changes": differences({name: marker.topology.get(name) for name in now}, now),
    }


def _newest_sound(root: Path) -> tuple[CheckpointMarker | None, list[str]]:
    """The newest checkpoint whose bytes are those that were written, and what is wrong with newer ones."""
    damaged: list[str] = []
    for folder in list_checkpoints(root):
        try:
            return verify_checkpoint(folder), damaged
        except CheckpointDamagedError as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointDamagedError(
            f"{root}: no sound checkpoint is left ({'; '.join(damaged)}); restore one, or train into another folder"
        )
    return None, []


def refuse_other_recipe(recipe: Recipe, run_dir: Path) -> None:
    """Refuse a run folder that holds a run whose recipe would give other numbers.

    Raises:
        UserInputError: lists what differs.
    """
    stored = kept_recipe(run_dir)
    kept = identity_settings(recipe if stored is None else stored)
    if changed := differences(kept, identity_settings(recipe)):
        listed = "\n  ".join(changed)
        raise UserInputError(
            f"{run_dir}: holds a run of another recipe; choose another --out or undo the change:\n  {listed}"
        )


def kept_recipe(run_dir: Path) -> Recipe | None:
    """The recipe of the run in a folder: its newest sound checkpoint's, else the one that was kept at its start.

    None where there is neither. A damaged file is named in a warning.
    """
    document = None
    try:
        document = read_json(run_dir / RECIPE_FILE, dict[str, Any])
    except FileNotFoundError:
        pass
    except DocumentError as error:
        _LOGGER.warning("DAMAGED %s; it is written anew, the checkpoints know their recipe", error)
    for folder in list_checkpoints(run_dir / CHECKPOINTS_NAME):
        with contextlib.suppress(CheckpointDamagedError):  # who resumes names it
            if (data := read_checkpoint_file(folder, f"{RUN_DOCUMENT}.json")) is not None:
                return read_run_document(data, where=str(folder)).recipe
    return None if document is None else stored_recipe(document, where=str(run_dir))


def _topology(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of a checkpoint's topology."""
    training = recipe.training
    return {
        "world_size": recipe.launch.workers,
        "per_device_batch_size": training.per_device_batch_size,
        "precision": training.precision,
        "compile": training.compile,
    }
