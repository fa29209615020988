"""Trained models, and their evaluation.

A trained model back from a checkpoint folder: what evaluation and prediction start from.

Multi-view test of a checkpoint: metrics, and one Parquet row a sample.
"""

import io
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from torch import Tensor

from ca2st.batch import ClipBatch
from ca2st.checked_json import parse_json
from ca2st.durable import write_bytes
from ca2st.errors import UserInputError
from ca2st.model.network import HolisticModel
from ca2st.model.parameters import build_model, held_precision, hold_experts, set_trainable
from ca2st.training.checkpoint import (
    CHECKPOINTS_NAME,
    Checkpoint,
    list_checkpoints,
    read_checkpoint,
    read_checkpoint_file,
)
from ca2st.training.evaluate import EvaluationResult, evaluate
from ca2st.training.metrics import main_metric
from ca2st.training.state import MODEL_FILE, put_model_tensors, read_model_tensors
from ca2st.training.step import make_accelerator, model_logits
from pipelines.loader import EvaluationLoader
from pipelines.storage.shard_sets import check_sound, picture_notes, require_sound
from pipelines.views import EvaluationViews
from ray_jobs.config.recipe import Recipe, stored_recipe
from ray_jobs.console import Update, progress, require_writable_place
from ray_jobs.runs.data import evaluation_loader
from ray_jobs.runs.model import load_frozen, target_specs
from sharding.datasets.label_spaces import classes_that_differ
from sharding.format.shard_set import AudioParameters, ShardSet, VideoParameters, read_shard_set

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

    def logits(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return the scores of every target, float32 [views, classes], without gradients."""
        with torch.inference_mode():
            return dict(model_logits(self.model, batch))

    def batches(self, place: str | Path, *, views: EvaluationViews | None = None) -> Iterator[ClipBatch]:
        """Yield the samples of a shard set once, in stored order, as the model was trained to see and hear them.

        `place` is a folder or a URL; `views` None: one centred view per sample. Raises as `evaluate_checkpoint`.
        """
        shards = read_shard_set(place, storage=self.recipe.data.loader.storage)
        with trained_loader(self, shards, tuple(self.classes), views=views or EvaluationViews(), num_lanes=1) as loader:
            yield from loader.batches()


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


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReport:
    """What a test found."""

    metrics: dict[str, float]
    main_metric: str
    """Which of the metrics stands for the model."""
    num_samples: int
    predictions: Path
    """Parquet file: key, labels, probabilities by target."""
    checkpoint: Path


def evaluate_checkpoint(
    path: Path, data: str | Path, views: EvaluationViews, *, predictions: Path | None = None
) -> EvaluationReport:
    """Test the model of a checkpoint or run folder on the shards in `data`, a folder or a URL.

    Raises:
        UserInputError: the shards have other classes than the model was trained on.
        DataDamageError: checkpoint or shards are damaged; nothing is skipped, no metric is reported.
    """
    if predictions is not None:
        require_writable_place(predictions, "--predictions")
    trained = load_trained(path)
    shard_set = read_shard_set(data, storage=trained.recipe.data.loader.storage)
    _require_same_classes(trained, shard_set)
    result = score(trained, shard_set, views)
    folder = trained.checkpoint.folder
    out = predictions or output_of_set(trained, shard_set, views, what="predictions")
    write_bytes(out, _predictions_parquet(result))
    return EvaluationReport(
        metrics=dict(result.metrics),
        main_metric=main_metric(tuple(trained.classes)),
        num_samples=result.num_samples,
        predictions=out,
        checkpoint=folder,
    )


def score(trained: TrainedModel, shard_set: ShardSet, views: EvaluationViews) -> EvaluationResult:
    """Probabilities of every sample of a set, the mean over its views; raises as `place_model`."""
    accelerator = place_model(trained)
    targets = tuple(trained.classes)
    with (
        trained_loader(trained, shard_set, targets, views=views, device=accelerator.device) as loader,
        progress("Scoring", loader.num_samples) as update,
    ):
        return evaluate(
            accelerator.prepare_model(trained.model, evaluation_mode=True),
            _Shown(loader, views.num_views, update),
            accelerator=accelerator,
            targets={name: len(classes) for name, classes in trained.classes.items()},
            per_device_batch_size=trained.recipe.training.per_device_batch_size,
        )


class _Shown:
    """A loader whose batches are told as they come."""

    def __init__(self, loader: EvaluationLoader, num_views: int, update: Update) -> None:
        self._loader, self._num_views, self._update = loader, num_views, update
        self.num_samples = loader.num_samples

    def sample_ids(self) -> list[str]:
        """As the loader's."""
        return self._loader.sample_ids()

    def batches(self) -> Iterator[ClipBatch]:
        """As the loader's."""
        done = 0
        for batch in self._loader.batches():
            yield batch
            done += int((~batch.is_padding).sum()) // self._num_views
            self._update(done, "samples")


def place_model(trained: TrainedModel) -> Accelerator:
    """Put the model on this machine's device, ready to be called under the returned Accelerator's autocast.

    Its experts are held from then on as `experts.precision` of its recipe says for this machine.
    """
    recipe = trained.recipe
    accelerator = make_accelerator(recipe.training, cpu=not torch.cuda.is_available())
    held = held_precision(recipe.experts.precision, training=recipe.training.precision, device=accelerator.device.type)
    hold_experts(trained.model, held)
    trained.model.to(accelerator.device)
    return accelerator


def _require_same_classes(trained: TrainedModel, shard_set: ShardSet) -> None:
    for name, classes in trained.classes.items():
        found = list(shard_set.manifest.label_space(name).classes)
        if found != classes:
            differing = classes_that_differ(classes, found, where=("in the model", "in the set"))
            raise UserInputError(
                f"{shard_set.where}: label space {name!r} has {len(found)} classes that are not the {len(classes)} the "
                f"model was trained on: {differing}; convert with the same class list (--classes)"
            )


def _predictions_parquet(result: EvaluationResult) -> bytes:
    columns: dict[str, pa.Array] = {"key": pa.array(result.sample_ids)}
    for column, (name, probabilities) in enumerate(result.probabilities.items()):
        columns[f"{name}_label"] = pa.array(result.labels[:, column].tolist(), pa.int32())
        columns[f"{name}_probabilities"] = pa.array(probabilities.tolist(), pa.list_(pa.float32()))
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue()
