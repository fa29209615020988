"""A trained model back from a checkpoint folder: what evaluation and prediction start from."""

import json
from dataclasses import dataclass
from pathlib import Path

from ca2st.errors import UserInputError
from ca2st.model.build import build_model
from ca2st.model.holistic import HolisticModel
from ca2st.model.parameters import set_trainable
from ca2st.training.checkpoint import CHECKPOINTS_NAME, Checkpoint, list_checkpoints, read_checkpoint
from ca2st.training.state import MODEL_FILE, put_model_tensors, read_model_tensors
from ray_jobs.config.recipe import Recipe, stored_recipe
from ray_jobs.running.frozen_weights import load_frozen
from ray_jobs.running.recipe_model import target_specs
from sharding.manifest import AudioParameters, VideoParameters

RUN_DOCUMENT = "run"
"""Name of the JSON document in a checkpoint that holds the whole recipe and the class names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedModel:
    """A model with its weights, and the recipe it was trained by."""

    model: HolisticModel
    recipe: Recipe
    classes: dict[str, list[str]]
    """Class names of each target."""
    audio: AudioParameters
    """How the spectrograms of its training shards were made."""
    video: VideoParameters
    """How their videos were encoded."""
    checkpoint: Checkpoint


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder itself, or the newest complete one of a run folder.

    Raises:
        UserInputError: `path` is neither.
    """
    if not (path / CHECKPOINTS_NAME).is_dir():
        return path
    found = list_checkpoints(path / CHECKPOINTS_NAME)
    if not found:
        raise UserInputError(f"{path}: a run folder without a complete checkpoint; train longer or name another")
    return found[0]


def load_trained(path: Path) -> TrainedModel:
    """Verify every byte of a checkpoint, then build its model, float32 throughout.

    Raises:
        UserInputError: not a checkpoint, or its frozen weights are not beside it.
        DataDamageError: bytes are not those that were written.
    """
    checkpoint = read_checkpoint(find_checkpoint(path))
    document = json.loads(checkpoint.files[f"{RUN_DOCUMENT}.json"])
    recipe, classes = stored_recipe(document["recipe"], where=str(checkpoint.folder)), document["classes"]
    model = build_model(recipe.model, recipe.clip, target_specs(classes), seed=recipe.training.seed)
    set_trainable(model, recipe.trainable)
    load_frozen(model, checkpoint.marker.experts, checkpoint.folder.parent.parent)
    put_model_tensors(model, tensors=read_model_tensors(model, data=checkpoint.files[MODEL_FILE]))
    return TrainedModel(
        model=model.eval(),
        recipe=recipe,
        classes=classes,
        audio=AudioParameters(**document["audio"]),
        video=VideoParameters(**document["video"]),
        checkpoint=checkpoint,
    )
