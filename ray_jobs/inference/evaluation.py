"""Multi-view test of a checkpoint: metrics, and one Parquet row a sample."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator

from ca2st.batch import ClipBatch
from ca2st.durable import write_bytes
from ca2st.errors import UserInputError
from ca2st.model.precision import held_precision, hold_experts
from ca2st.training.accelerator import make_accelerator
from ca2st.training.evaluate import EvaluationResult, evaluate
from ca2st.training.metrics import main_metric
from pipelines.draws import EvaluationViews
from pipelines.loader import EvaluationLoader
from ray_jobs.console import Update, progress
from ray_jobs.inference.trained import TrainedModel, load_trained, output_of_set, trained_loader
from ray_jobs.output_file import require_writable_place
from sharding.datasets.label_spaces import classes_that_differ
from sharding.shard_set import ShardSet, read_shard_set


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
