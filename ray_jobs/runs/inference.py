"""Trained models at work: loaded from a checkpoint, tested on shard sets, their features written."""

import itertools
import json
import logging
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor

from ca2st.batch import ClipBatch, Labelling
from ca2st.durable import writing
from ca2st.errors import DataDamageError, UserInputError, check_choice
from ca2st.model.network import HolisticModel, build_model, held_precision, hold_experts, set_trainable
from ca2st.training.checkpoint import Checkpoint, read_checkpoint
from ca2st.training.evaluate import SampleTally, Scored, check_complete, joined, scored_batches
from ca2st.training.resume import put_model_tensors, read_model_tensors, tensors_to_use
from ca2st.training.step import make_accelerator, model_logits
from pipelines.loader import EvaluationLoader
from pipelines.storage.shard_sets import check_sound, picture_notes, require_sound
from pipelines.views import EvaluationViews
from ray_jobs.config.recipe import Recipe
from ray_jobs.console import Update, progress, require_writable_place
from ray_jobs.runs.data import evaluation_loader
from ray_jobs.runs.model import RUN_DOCUMENT, find_checkpoint, load_frozen, read_run_document, target_specs
from sharding.format.shard_set import AudioParameters, ShardSet, VideoParameters, classes_that_differ, read_shard_set

_LOGGER = logging.getLogger(__name__)
_MOST_NAME, _FINGERPRINT_CHARACTERS = 60, 8
METADATA_KEY = b"ca2st"
"""Key of a features file's metadata that holds one JSON object: where the features come from."""
_ROWS_PER_GROUP = 1024
_SEVERAL = pa.list_(pa.int32())


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
    labelling: Labelling = "one"
    """How many labels a sample of its training had: ``one``, for a softmax, or ``several``, for sigmoids."""

    @property
    def targets(self) -> dict[str, int]:
        """Number of classes of each target."""
        return {name: len(classes) for name, classes in self.classes.items()}

    def logits(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return the scores of every target, float32 [views, classes], without gradients."""
        with torch.inference_mode():
            return dict(model_logits(self.model, batch))

    def batches(self, place: str | Path, *, views: EvaluationViews | None = None) -> Iterator[ClipBatch]:
        """Yield the samples of a shard set once, in stored order, as the model was trained to see and hear them.

        `place` is a folder or a URL; `views` None: one centred view per sample. The columns of labels are those of
        `classes`, in its order. Raises as `evaluate_checkpoint`.

        Raises:
            UserInputError: the set's classes are not the model's, so that its labels would mean others.
        """
        shards = read_shard_set(place, storage=self.recipe.data.loader.storage)
        for name, classes in self.classes.items() if shards.manifest.labelling != "none" else ():
            if classes != (found := list(shards.manifest.label_space(name).classes)):
                differing = classes_that_differ(classes, found, where=("in the model", "in the set"))
                raise UserInputError(
                    f"{shards.where}: expected the model's classes of {name}, found others: {differing}; "
                    "`ca2st evaluate` matches classes by name, `read_batches` gives the set as it is"
                )
        with trained_loader(self, shards, tuple(self.classes), views=views or EvaluationViews()) as loader:
            yield from loader.batches()


def trained_loader(
    trained: TrainedModel,
    shard_set: ShardSet,
    targets: tuple[str, ...],
    *,
    views: EvaluationViews,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
) -> EvaluationLoader:
    """Return every sample of a set once over all ranks, each in stored order, for a model trained on sets like it.

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
        num_lanes=world_size,
        rank=rank,
        world_size=world_size,
        device=device,
    )


def set_name(shard_set: ShardSet) -> str:
    """Return what a set is called in names of files and metrics: ``<dataset>-<split>``."""
    manifest = shard_set.manifest
    return re.sub(r"[^A-Za-z0-9_-]+", "-", f"{manifest.dataset}-{manifest.split}")[:_MOST_NAME]


def output_of_set(trained: TrainedModel, shard_set: ShardSet, views: EvaluationViews, *, what: str) -> Path:
    """Return the file in the run folder for what a checkpoint says of a set; one per set and choice of views."""
    folder, fingerprint = trained.checkpoint.folder, shard_set.manifest.fingerprint[:_FINGERPRINT_CHARACTERS]
    name = f"{set_name(shard_set)}-{fingerprint}"
    return folder.parent.parent / f"{what}.{folder.name}.{name}.{views.clips}x{views.crops}.parquet"


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
    put_model_tensors(model, tensors=read_model_tensors(model, data=tensors_to_use(checkpoint.files)))
    return TrainedModel(
        model=model.eval(),
        recipe=recipe,
        classes=classes,
        audio=run.audio,
        video=run.video,
        checkpoint=checkpoint,
        labelling=run.labelling,
    )


def score(trained: TrainedModel, shard_set: ShardSet, views: EvaluationViews) -> Scored:
    """Return the probabilities of every sample of a small set, in its own order, the mean over its views.

    Labels are those of the set. Raises as `trained_loader`.

    Raises:
        IncompleteEvaluationError: the samples scored are not those of the set.
    """
    accelerator = place_model(trained)
    targets, manifest = trained.targets, shard_set.manifest
    with (
        trained_loader(trained, shard_set, tuple(targets), views=views, device=accelerator.device) as loader,
        progress("Scoring", loader.num_samples) as update,
    ):
        found = joined(
            scored_batches(
                accelerator.prepare_model(trained.model, evaluation_mode=True),
                CountedSource(loader, views, update),
                accelerator=accelerator,
                targets=targets,
                per_device_batch_size=trained.recipe.training.per_device_batch_size,
                label_classes={name: len(manifest.label_space(name).classes) for name in targets},
                labelling=trained.labelling,
            )
        )
        tally = SampleTally()
        tally.add(found.sample_ids, found.num_views)
        check_complete(tally, loader)
    return found


class CountedSource:
    """A loader whose samples are counted as they come."""

    def __init__(self, loader: EvaluationLoader, views: EvaluationViews, update: Update) -> None:
        self._loader, self._num_views, self._update = loader, views.num_views, update
        self.num_samples = loader.num_samples

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


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturesReport:
    """What was written."""

    features: Path
    """The Parquet file."""
    num_samples: int
    experts: dict[str, int]
    """Width of each expert's feature."""


def write_features(
    path: Path,
    data: str | Path,
    views: EvaluationViews,
    *,
    experts: Sequence[str] | None = None,
    out: Path | None = None,
    rows_per_group: int = _ROWS_PER_GROUP,
) -> FeaturesReport:
    """Write what goes into the head of the model of a checkpoint or run folder, for every sample in `data`.

    Columns: `key`; `<target>_label` for each of the set's own targets, which need not be those the model was trained
    on (a list of several labels; no column of a set without labels); `has_audio`; and for each of `experts` (None: all)
    its feature, the mean over the views. Rows are in the set's order. At most about `rows_per_group` rows are held at a
    time.

    Raises:
        UserInputError: the model has no such expert.
        DataDamageError: checkpoint or shards are damaged; no file is left.
    """
    if out is not None:
        require_writable_place(out, "--out")
    trained = load_trained(path)
    known = tuple(trained.model.experts)
    for name in experts or ():
        check_choice("--experts", name, known)
    chosen = tuple(name for name in known if experts is None or name in experts)
    shard_set = read_shard_set(data, storage=trained.recipe.data.loader.storage)
    out = out or output_of_set(trained, shard_set, views, what="features")
    num_samples = 0
    with writing(out) as file, closing(_tables(trained, shard_set, views, chosen, rows_per_group)) as tables:
        first = next(tables)
        schema = first.schema.with_metadata({METADATA_KEY: json.dumps(_describe(trained, shard_set, views)).encode()})
        with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=["key"]) as writer:
            for table in itertools.chain([first], tables):
                writer.write_table(table, row_group_size=table.num_rows)
                num_samples += table.num_rows
        if num_samples != shard_set.manifest.num_samples:
            raise DataDamageError(
                f"{data}: expected {shard_set.manifest.num_samples} samples, found {num_samples}; no file is written"
            )
    return FeaturesReport(
        features=out,
        num_samples=num_samples,
        experts={name: first.schema.field(name).type.list_size for name in chosen},
    )


def _describe(trained: TrainedModel, shard_set: ShardSet, views: EvaluationViews) -> dict[str, object]:
    """Return what a reader of the file needs to know of its making."""
    manifest = shard_set.manifest
    return {
        "content": "pooled features of every expert as they go into the head, mean over the views of a sample",
        "model": asdict(trained.recipe.model),
        "clip": asdict(trained.recipe.clip),
        "recipe": trained.recipe.name,
        "checkpoint": trained.checkpoint.folder.name,
        "checkpoint_files": {name: facts["sha256"] for name, facts in trained.checkpoint.marker.files.items()},
        "expert_files": dict(trained.checkpoint.marker.experts),
        "dataset": manifest.dataset,
        "split": manifest.split,
        "manifest_fingerprint": manifest.fingerprint,
        "classes": {name: list(manifest.label_space(name).classes) for name in manifest.targets},
        "views": {"protocol": views.protocol, "clips": views.clips, "crops": views.crops},
    }


def _tables(
    trained: TrainedModel,
    shard_set: ShardSet,
    views: EvaluationViews,
    experts: tuple[str, ...],
    rows_per_group: int,
) -> Generator[pa.Table, None, None]:
    """Yield the rows in the set's order, whole batches until there are `rows_per_group`."""
    manifest, accelerator = shard_set.manifest, place_model(trained)
    loading = trained_loader(trained, shard_set, manifest.targets, views=views, device=accelerator.device)
    with loading as loader, progress("Features", manifest.num_samples) as update:
        waiting: list[pa.Table] = []
        held = done = 0
        for batch in loader.batches():
            waiting.append(_table(batch, _features(trained, batch, accelerator), manifest.targets, views, experts))
            held, done = held + waiting[-1].num_rows, done + waiting[-1].num_rows
            update(done, "samples")
            if held >= rows_per_group:
                yield pa.concat_tables(waiting)
                waiting, held = [], 0
        if held:
            yield pa.concat_tables(waiting)


def _features(trained: TrainedModel, batch: ClipBatch, accelerator: Accelerator) -> dict[str, Tensor]:
    """Return float32 `[views, dim]` of every expert, padding included."""
    parts: list[Mapping[str, Tensor]] = []
    with torch.inference_mode(), accelerator.autocast():
        for part in batch.split(trained.recipe.training.per_device_batch_size):
            here = part.to(accelerator.device)
            parts.append(
                trained.model(here.normalised_video(), here.mel, here.intervals_seconds, here.has_audio).features
            )
    return {name: torch.cat([part[name].float().cpu() for part in parts]) for name in parts[0]}


def _table(
    batch: ClipBatch,
    features: Mapping[str, Tensor],
    targets: tuple[str, ...],
    views: EvaluationViews,
    experts: tuple[str, ...],
) -> pa.Table:
    """Return a row for each sample of a batch that is no padding; the views of a sample follow each other."""
    first_views = slice(0, None, views.num_views)
    real = (~batch.is_padding[first_views]).nonzero().flatten()
    columns: dict[str, pa.Array] = {"key": pa.array([batch.sample_ids[first_views][index] for index in real.tolist()])}
    labels = batch.labels[first_views][real]
    if batch.labelling == "several":
        columns[f"{targets[0]}_label"] = pa.array([row.nonzero().flatten().tolist() for row in labels], _SEVERAL)
    for column, target in enumerate(targets if batch.labelling == "one" else ()):
        columns[f"{target}_label"] = pa.array(labels[:, column].numpy(), pa.int32())
    columns["has_audio"] = pa.array(batch.has_audio[first_views][real].tolist(), pa.bool_())
    for name in experts:
        mean = rearrange(features[name], "(s v) d -> s v d", v=views.num_views).mean(dim=1)[real]
        columns[name] = pa.FixedSizeListArray.from_arrays(
            pa.array(mean.contiguous().numpy().ravel(), pa.float32()), mean.shape[1]
        )
    return pa.table(columns)
