"""What of a recipe can be refused before a folder is made or a process is started."""

from collections.abc import Iterator
from pathlib import Path

from ca2st.errors import UserInputError
from ca2st.model.config import ModelKind, check_clip
from ca2st.model.structure import EXPERTS, ExpertName
from ca2st.weights.hub_names import is_hub_name, resolve_hub_name
from pipelines.preflight import check_sound
from ray_jobs.config.recipe import Recipe
from ray_jobs.running.start import start_sound
from ray_jobs.running.training_data import TrainingData, open_data, sample_plan


def preflight(recipe: Recipe) -> TrainingData:
    """Everything that can be refused before a folder is made or a process is started; raises as `open_data`.

    Raises:
        UserInputError: as `check_settings`, or as `sample_plan`, or the model hears and starts from one whose
            spectrograms were made otherwise.
        PlanError: fewer samples than the batch or the workers need.
    """
    check_settings(recipe)
    data = open_data(recipe)
    _check_start_sound(recipe, data)
    sample_plan(recipe, data).require_enough(world_size=recipe.launch.workers)
    return data


def _check_start_sound(recipe: Recipe, data: TrainingData) -> None:
    if recipe.start is None or "audio" not in EXPERTS[recipe.model.kind]:
        return
    where = Path(recipe.start.checkpoint)
    if (sound := start_sound(where)) is not None:
        check_sound(data.train, sound, whose=f"start.checkpoint {where}")


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
    """What is wrong with the file or public name of an expert, or None."""
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
