"""Pooled features of every expert for a whole shard set: one Parquet row a sample, written as they come."""

import json
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

from ca2st.batch import ClipBatch
from ca2st.durable import writing
from ca2st.errors import DataDamageError, check_choice
from pipelines.views import EvaluationViews
from ray_jobs.console import progress, require_writable_place
from ray_jobs.runs.inference import TrainedModel, load_trained, output_of_set, place_model, trained_loader
from sharding.format.shard_set import ShardSet, read_shard_set

METADATA_KEY = b"ca2st"
"""Key of the file's metadata that holds one JSON object: where the features come from."""
_ROWS_A_GROUP = 1024


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
    rows_a_group: int = _ROWS_A_GROUP,
) -> FeaturesReport:
    """Write what goes into the head of the model of a checkpoint or run folder, for every sample in `data`.

    Columns: `key`; `<target>_label` for each of the set's own targets, which need not be those the model was trained
    on; `has_audio`; and for each of `experts` (None: all) its feature, the mean over the views. Rows are in the set's
    order. At most about `rows_a_group` rows are held at a time.

    Raises:
        UserInputError: the model has no such expert.
        DataDamageError: checkpoint or shards are damaged; no file is left.
    """
    if out is not None:
        require_writable_place(out, "--out")
    trained = load_trained(path)
    chosen = _choose(tuple(trained.model.experts), experts)
    shard_set = read_shard_set(data, storage=trained.recipe.data.loader.storage)
    out = out or output_of_set(trained, shard_set, views, what="features")
    with writing(out) as file, closing(_tables(trained, shard_set, views, chosen)) as tables:
        first = next(tables)
        about = _describe(trained, shard_set, views)
        schema = first.schema.with_metadata({METADATA_KEY: json.dumps(about).encode()})
        groups = _grouped(first, tables, rows_a_group)
        with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=["key"]) as writer:
            num_samples = sum(_write_group(writer, group) for group in groups)
        if num_samples != shard_set.manifest.num_samples:
            raise DataDamageError(
                f"{data}: expected {shard_set.manifest.num_samples} samples, found {num_samples}; no file is written"
            )
    return FeaturesReport(
        features=out,
        num_samples=num_samples,
        experts={name: first.schema.field(name).type.list_size for name in chosen},
    )


def _choose(known: tuple[str, ...], wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The wanted experts, in the model's order."""
    for name in wanted or ():
        check_choice("--experts", name, known)
    return tuple(name for name in known if wanted is None or name in wanted)


def _describe(trained: TrainedModel, shard_set: ShardSet, views: EvaluationViews) -> dict[str, object]:
    """What a reader of the file needs to know of its making."""
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


def _grouped(first: pa.Table, rest: Iterator[pa.Table], rows_a_group: int) -> Iterator[pa.Table]:
    """Small tables joined until they have `rows_a_group` rows."""
    waiting, count = [first], first.num_rows
    for table in rest:
        if count >= rows_a_group:
            yield pa.concat_tables(waiting)
            waiting, count = [], 0
        waiting.append(table)
        count += table.num_rows
    yield pa.concat_tables(waiting)


def _write_group(writer: pq.ParquetWriter, table: pa.Table) -> int:
    writer.write_table(table, row_group_size=max(1, table.num_rows))
    rows: int = table.num_rows
    return rows


def _tables(
    trained: TrainedModel, shard_set: ShardSet, views: EvaluationViews, experts: tuple[str, ...]
) -> Generator[pa.Table, None, None]:
    """One table a batch, in the set's order."""
    targets = shard_set.manifest.targets
    accelerator = place_model(trained)
    total = shard_set.manifest.num_samples
    with (
        trained_loader(trained, shard_set, targets, views=views, num_lanes=1, device=accelerator.device) as loader,
        progress("Features", total) as update,
    ):
        done = 0
        for batch in loader.batches():
            table = _table(batch, _features(trained, batch, accelerator), targets, views, experts)
            done += table.num_rows
            update(done, "samples")
            if table.num_rows:
                yield table


def _features(trained: TrainedModel, batch: ClipBatch, accelerator: Accelerator) -> dict[str, Tensor]:
    """float32 `[views, dim]` of every expert, padding included."""
    parts: list[Mapping[str, Tensor]] = []
    with torch.inference_mode(), accelerator.autocast():
        for part in batch.split(trained.recipe.training.per_device_batch_size):
            here = part.to(accelerator.device)
            parts.append(trained.model(here.normalised_video(), here.mel, here.intervals_seconds).features)
    return {name: torch.cat([part[name].float().cpu() for part in parts]) for name in parts[0]}


def _table(
    batch: ClipBatch,
    features: Mapping[str, Tensor],
    targets: tuple[str, ...],
    views: EvaluationViews,
    experts: tuple[str, ...],
) -> pa.Table:
    """A row for each sample of a batch that is no padding; the views of a sample follow each other."""
    first_views = slice(0, None, views.num_views)
    real = (~batch.is_padding[first_views]).nonzero().flatten()
    columns: dict[str, pa.Array] = {"key": pa.array([batch.sample_ids[first_views][index] for index in real.tolist()])}
    labels = batch.labels[first_views][real]
    for column, target in enumerate(targets):
        columns[f"{target}_label"] = pa.array(labels[:, column].numpy(), pa.int32())
    columns["has_audio"] = pa.array(batch.has_audio[first_views][real].tolist(), pa.bool_())
    for name in experts:
        mean = rearrange(features[name], "(s v) d -> s v d", v=views.num_views).mean(dim=1)[real]
        columns[name] = pa.FixedSizeListArray.from_arrays(
            pa.array(mean.contiguous().numpy().ravel(), pa.float32()), mean.shape[1]
        )
    return pa.table(columns)
