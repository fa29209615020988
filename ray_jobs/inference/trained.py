"""A trained model back from a checkpoint folder: what evaluation and prediction start from."""

import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from ca2st.checked_json import parse_json
from ca2st.errors import UserInputError
from ca2st.model.build import build_model
from ca2st.model.holistic import HolisticModel
from ca2st.model.parameters import set_trainable
from ca2st.training.checkpoint import (
    CHECKPOINTS_NAME,
    Checkpoint,
    list_checkpoints,
    read_checkpoint,
    read_checkpoint_file,
)
from ca2st.training.state import MODEL_FILE, put_model_tensors, read_model_tensors
from pipelines.draws import EvaluationViews
from pipelines.loader import EvaluationLoader
from pipelines.preflight import check_sound, picture_notes, require_sound
from ray_jobs.config.recipe import Recipe, stored_recipe
from ray_jobs.running.frozen_weights import load_frozen
from ray_jobs.running.loaders import evaluation_loader
from ray_jobs.running.recipe_model import target_specs
from sharding.manifest import AudioParameters, VideoParameters
from sharding.shard_set import ShardSet

_LOGGER = logging.getLogger(__name__)
RUN_DOCUMENT = "run"
"""Name of the JSON document in a checkpoint that holds the whole recipe and the class names."""
SOUND_KEY = "ca2st_audio"
"""Metadata key of an exported model: how the spectrograms that it was trained on were made."""
_MOST_NAME, _FINGERPRINT_CHARACTERS = 60, 8


class _StoredDocument(TypedDict):
    recipe: dict[str, Any]
    classes: dict[str, list[str]]
    audio: AudioParameters
    video: VideoParameters


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDocument:
    """Contents of the document `RUN_DOCUMENT`."""

    recipe: Recipe
    classes: dict[str, list[str]]
    """Class names of each target."""
    audio: AudioParameters
    """How the spectrograms of the training shards were made, of a mixture's first set."""
    video: VideoParameters
    """How their videos were encoded."""


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


def read_run_document(data: bytes, *, where: str) -> RunDocument:
    """What a checkpoint says of its run; `where` names the checkpoint.

    Raises:
        DocumentError: it is no such document.
    """
    document = parse_json(data, _StoredDocument, where=f"{where}/{RUN_DOCUMENT}.json")
    return RunDocument(
        recipe=stored_recipe(document["recipe"], where=where),
        classes=document["classes"],
        audio=document["audio"],
        video=document["video"],
    )


def run_document_of(folder: Path) -> RunDocument:
    """The document of a checkpoint; nothing else of it is read.

    Raises:
        UserInputError: `folder` is no checkpoint, or keeps no such document.
        DataDamageError: it is not what was written.
    """
    data = read_checkpoint_file(folder, f"{RUN_DOCUMENT}.json")
    if data is None:
        raise UserInputError(f"{folder}: expected a checkpoint of `ca2st train`, found one without {RUN_DOCUMENT}.json")
    return read_run_document(data, where=str(folder))


def sound_metadata(audio: AudioParameters) -> dict[str, str]:
    """For the header of a model's file: how the spectrograms it was trained on were made."""
    return {SOUND_KEY: json.dumps(asdict(audio), sort_keys=True)}


def parse_sound(text: str, *, where: str) -> AudioParameters:
    """What `sound_metadata` wrote.

    Raises:
        DocumentError: it is something else.
    """
    return parse_json(text, AudioParameters, where=f"{where}: metadata key {SOUND_KEY!r}")


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


def trained_loader(
    trained: TrainedModel,
    shard_set: ShardSet,
    targets: tuple[str, ...],
    *,
    views: EvaluationViews,
    num_lanes: int | None = None,
    device: torch.device | None = None,
) -> EvaluationLoader:
    """Every sample of a set once, for a model that was trained on sets like it.

    Raises:
        UserInputError: the model hears, and the set has no sound or spectrograms that were made otherwise.
    """
    name = str(trained.checkpoint.folder)
    notes = picture_notes(shard_set, trained.video, whose=name)
    if "audio" in trained.model.experts and trained.audio.policy != "none":
        require_sound(shard_set, whose=name)
        check_sound(shard_set, trained.audio, whose=name)
    elif "audio" in trained.model.experts and shard_set.manifest.audio.policy != "none":
        notes.append(f"{shard_set.where}: has sound, and {name} was trained without any: results mean little")
    for note in notes:
        _LOGGER.warning("%s", note)
    return evaluation_loader(
        trained.recipe,
        shard_set,
        targets,
        views=views,
        num_lanes=num_lanes,
        rank=0,
        world_size=1,
        device=device,
    )


def output_of_set(trained: TrainedModel, shard_set: ShardSet, views: EvaluationViews, *, what: str) -> Path:
    """The file in the run folder for what a checkpoint says of a set: another one for every set and choice of views."""
    folder, manifest = trained.checkpoint.folder, shard_set.manifest
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", f"{manifest.dataset}-{manifest.split}")[:_MOST_NAME]
    fingerprint = manifest.fingerprint[:_FINGERPRINT_CHARACTERS]
    return folder.parent.parent / (f"{what}.{folder.name}.{name}-{fingerprint}.{views.clips}x{views.crops}.parquet")


def load_trained(path: Path) -> TrainedModel:
    """Verify every byte of a checkpoint, then build its model, float32 throughout.

    Raises:
        UserInputError: not a checkpoint, or its frozen weights are not beside it.
        DataDamageError: bytes are not those that were written.
    """
    checkpoint = read_checkpoint(find_checkpoint(path))
    run = read_run_document(checkpoint.files[f"{RUN_DOCUMENT}.json"], where=str(checkpoint.folder))
    recipe, classes = run.recipe, run.classes
    model = build_model(recipe.model, recipe.clip, target_specs(classes), seed=recipe.training.seed)
    set_trainable(model, recipe.trainable)
    load_frozen(model, checkpoint.marker.experts, checkpoint.folder.parent.parent)
    put_model_tensors(model, tensors=read_model_tensors(model, data=checkpoint.files[MODEL_FILE]))
    return TrainedModel(
        model=model.eval(),
        recipe=recipe,
        classes=classes,
        audio=run.audio,
        video=run.video,
        checkpoint=checkpoint,
    )
