"""Everything that is checked before a training starts, once: settings, data, model, and what the run folder holds."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ca2st.checked_json import DocumentError, read_json
from ca2st.errors import UserInputError
from ca2st.model.config import EXPERTS, ExpertName, ModelKind, check_clip
from ca2st.training import checkpoint
from ca2st.training.errors import CheckpointDamagedError, ResumeRefusedError
from ca2st.training.journal import differences
from ca2st.training.resume import RECIPE_FILE
from ca2st.weights.hub import HubAccess, is_hub_name, resolve_hub_name
from pipelines.order.plan import SamplePlan
from pipelines.storage.shard_sets import check_sound
from ray_jobs.config.recipe import Recipe, identity_settings
from ray_jobs.config.recipe_file import stored_recipe
from ray_jobs.runs import model
from ray_jobs.runs.data import TrainingData, open_data, sample_plan, synthetic_classes, with_synthetic_shards
from ray_jobs.runs.worker import OUTCOME_NAME, Outcome

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A training that was checked and can start."""

    recipe: Recipe
    """With shards and files in place of a synthetic world and public names."""
    data: TrainingData
    num_steps: int
    """Steps of the whole run."""


def prepare(recipe: Recipe, run_dir: Path, access: HubAccess) -> Prepared:
    """Check everything about a training that can be refused before a process is started, and fetch what it needs.

    A synthetic world is drawn last: what is wrong with settings and model shows without it.

    Raises:
        UserInputError: as `check_settings`, `open_checked`, `check_model`, or as `refuse_other_recipe`.
        PlanError: fewer samples than the batch or the workers need.
        EnvironmentFault: the hub of public weights cannot be reached.
    """
    check_settings(recipe)
    data, classes = None, synthetic_classes(recipe)
    if classes is None:
        data, plan = open_checked(recipe)
        classes = data.classes
    recipe = model.with_local_experts(recipe, run_dir.parent / model.IMPORTED_FOLDER, access)
    model.check_model(recipe, classes, run_dir)
    refuse_other_recipe(recipe, run_dir)
    if data is None:
        recipe = with_synthetic_shards(recipe, run_dir.parent)
        data, plan = open_checked(recipe)
    return Prepared(recipe=recipe, data=data, num_steps=recipe.training.total_steps(plan.num_steps))


def finished(ready: Prepared, run_dir: Path) -> Outcome | None:
    """Return the outcome of a run whose last step was made, validated and reported; None where anything is left to do.

    Raises:
        UserInputError: it is a run on other data or with other weights.
        CheckpointDamagedError: there are checkpoints and none is sound.
    """
    try:
        outcome = read_json(run_dir / OUTCOME_NAME, Outcome)
    except (FileNotFoundError, DocumentError):
        return None
    marker, damaged = checkpoint.newest_sound(run_dir / checkpoint.CHECKPOINTS_NAME, checkpoint.verify_checkpoint)
    if marker is None or damaged or marker.step < ready.num_steps:
        return None
    begun = model.begin_model(ready.recipe, ready.data.classes, run_dir)
    was = {"manifests": marker.manifests, "experts": marker.experts, "start": marker.start}
    now = {
        "manifests": ready.data.fingerprints,
        "experts": model.keep_frozen(begun.model, run_dir),
        "start": begun.identity,
    }
    if changed := differences(was, now):
        listed = "\n  ".join(changed)
        raise ResumeRefusedError(f"{run_dir}: holds a run on other data or weights; choose another --out:\n  {listed}")
    folder = checkpoint.list_checkpoints(run_dir / checkpoint.CHECKPOINTS_NAME)[0]
    _LOGGER.info("already finished, nothing to train: step %d of %d from %s", marker.step, ready.num_steps, folder)
    return replace(outcome, checkpoint=str(folder))


def preflight(recipe: Recipe) -> TrainingData:
    """Check settings and data; raises as `check_settings` and `open_checked`."""
    check_settings(recipe)
    return open_checked(recipe)[0]


def open_checked(recipe: Recipe) -> tuple[TrainingData, SamplePlan]:
    """Open the data of a training, and plan which of its samples are read.

    Raises:
        UserInputError: as `open_data` and `sample_plan`, or the model hears and starts from one whose spectrograms were
            made otherwise.
        PlanError: fewer samples than the batch or the workers need.
    """
    data = open_data(recipe)
    if recipe.start is not None and "audio" in EXPERTS[recipe.model.kind]:
        where = Path(recipe.start.checkpoint)
        if (sound := model.start_sound(where)) is not None:
            check_sound(data.train, sound, whose=f"start.checkpoint {where}")
    plan = sample_plan(recipe, data)
    plan.require_enough(world_size=recipe.launch.workers)
    return data, plan


def check_settings(recipe: Recipe) -> None:
    """Refuse what the recipe alone shows to be wrong; no data is read and nothing is fetched.

    Raises:
        UserInputError: a line for each of these: clip and model do not fit, pairs are mixed by what the model does not
            read, it has no such expert, or an expert's file is not there or its public name not known.
    """
    problems = list(_setting_problems(recipe))
    if problems:
        raise UserInputError("\n".join(problems))


def _setting_problems(recipe: Recipe) -> Iterator[str]:
    own = EXPERTS[recipe.model.kind]
    mixing = recipe.data.augment.mixing
    try:
        check_clip(recipe.model, recipe.clip)
    except UserInputError as error:
        yield f"clip.{error}"
    if mixing.probability > 0 and mixing.spectrogram == "cutmix" and "audio" not in own:
        yield (
            f"data.augment.mixing.spectrogram: expected 'mixup' for {recipe.model.kind}, which does not hear, found "
            "'cutmix'; the labels would follow a box that the model never sees"
        )
    if mixing.probability > 0 and mixing.switch_probability > 0 and own == ("audio",):
        yield (
            "data.augment.mixing.switch_probability: expected 0 for audio, which does not see, found "
            f"{mixing.switch_probability}; the labels would follow a box that the model never sees"
        )
    for name, source in recipe.experts.sources().items():
        if (problem := _source_problem(name, source, kind=recipe.model.kind)) is not None:
            yield problem


def _source_problem(name: ExpertName, source: str, *, kind: ModelKind) -> str | None:
    """Return what is wrong with the file or public name of an expert, or None."""
    own = EXPERTS[kind]
    if name not in own:
        return (
            f"experts.{name}: expected experts of {kind}, which are {', '.join(own)}, found {source}; "
            "remove the setting or choose another model.kind"
        )
    if is_hub_name(source):
        try:
            resolve_hub_name(source)
        except UserInputError as error:
            return f"experts.{name}: {error}"
    elif not Path(source).is_file():
        return (
            f"experts.{name}: expected a safetensors file, found none at {source}; check the path, or give a "
            "public name (hf-hub:..., open_clip:..., timm:...)"
        )
    return None


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
    """Return the recipe of the run in a folder: its newest sound checkpoint's, else the one that was kept at its start.

    None where there is neither. A damaged file is named in a warning.
    """
    document = None
    try:
        document = read_json(run_dir / RECIPE_FILE, dict[str, Any])
    except FileNotFoundError:
        pass
    except DocumentError as error:
        _LOGGER.warning("DAMAGED %s; it is written anew, the checkpoints know their recipe", error)
    for folder in checkpoint.list_checkpoints(run_dir / checkpoint.CHECKPOINTS_NAME):
        with contextlib.suppress(CheckpointDamagedError):  # who resumes names it
            if (data := checkpoint.read_checkpoint_file(folder, f"{model.RUN_DOCUMENT}.json")) is not None:
                return model.read_run_document(data, where=str(folder)).recipe
    return None if document is None else stored_recipe(document, where=str(run_dir))
