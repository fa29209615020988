"""Predictions as a Parquet file: a row per sample in the set's own order, written in parts, joined and proved whole.

Every rank scores one run of the set, in stored order, into a part of its own. Joined in the order of the ranks the
parts have the set's order at any number of ranks, so the proof that every sample was scored exactly once is a
comparison of two streams of keys, and needs no memory. Nothing else is held either: parts are read and written some
thousand rows at a time.

Columns: ``key``, ``has_audio``, for each target ``<target>_label`` (null where the sample has no label that the model
knows; a set without labels has no such column; several labels per sample: a list) and ``<target>_probabilities``
(float32, one number per class of the model: the softmax, of a model of several labels the sigmoid, averaged over the
views). The metadata key ``ca2st`` holds a JSON object that says what made the file.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ca2st.checked_json import DocumentError, parse_json
from ca2st.durable import writing
from ca2st.errors import DataDamageError, UserInputError
from ca2st.training.errors import IncompleteEvaluationError
from ca2st.training.evaluate import SampleTally, Scored, check_complete
from sharding.format.index import parquet_batches, parquet_metadata

METADATA_KEY = b"ca2st"
BATCH_ROWS = 4096
"""Rows that are read or written at a time."""
_VIEWS_COLUMN = "num_views"
_PARQUET: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionFacts:
    """What a predictions file says of itself."""

    targets: dict[str, list[str]]
    """Class names of each target of the model, in the order of the probabilities."""
    labelled: tuple[str, ...]
    """Targets of which the set has labels."""
    several: bool = False
    """Whether a sample may have several labels."""
    dataset: str = ""
    split: str = ""
    manifest_fingerprint: str = ""
    """The shard set's hash."""
    num_samples: int = 0
    views: str = ""
    """Clips x crops per sample, such as ``2x3``."""
    recipe: str = ""
    model: str = ""
    """``cast``, ``cava``, ..."""
    checkpoint: str = ""
    """Name of the checkpoint's folder."""
    checkpoint_files: dict[str, str] = field(default_factory=dict)
    """Hashes of its files."""
    unmatched: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """By target: class names that only the model has (``model``), and that only the set has (``set``)."""
    perturbation: str = ""
    """What was done to the samples; empty: nothing."""

    def schema(self) -> pa.Schema:
        """Return the columns of a file."""
        label = pa.list_(pa.int32()) if self.several else pa.int32()
        fields = [pa.field("key", pa.string()), pa.field("has_audio", pa.bool_())]
        for target, classes in self.targets.items():
            if target in self.labelled:
                fields.append(pa.field(f"{target}_label", label))
            fields.append(pa.field(f"{target}_probabilities", pa.list_(pa.float32(), len(classes))))
        return pa.schema(fields)


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a predictions file."""

    keys: list[str]
    has_audio: NDArray[np.bool_]
    labels: dict[str, NDArray[np.int64]]
    """By target, -1 where the sample has no label that the model knows; of several labels `[rows, classes]`, 0 or 1."""
    probabilities: dict[str, NDArray[np.float32]]
    """By target: `[rows, classes]`."""

    def label_columns(self, targets: Sequence[str]) -> NDArray[np.int64]:
        """Return `[rows, targets]`, -1 for a target without labels."""
        none = np.full(len(self.keys), -1)
        return np.stack([self.labels.get(name, none) for name in targets], axis=1)


def read_facts(path: Path) -> PredictionFacts:
    """Return what a predictions file says of itself.

    Raises:
        UserInputError: no such file, or it is no file of `ca2st evaluate`.
    """
    try:
        data = parquet_metadata(path).get(METADATA_KEY)
        if data is not None:
            return parse_json(data, PredictionFacts, where=str(path))
    except FileNotFoundError:
        raise UserInputError(f"{path}: expected a predictions file of `ca2st evaluate`, found none") from None
    except (pa.ArrowException, OSError, DocumentError) as error:
        raise UserInputError(f"{path}: expected a predictions file of `ca2st evaluate`, found {error}") from error
    raise UserInputError(
        f"{path}: expected a predictions file of `ca2st evaluate`, found one that does not say what made it; evaluate "
        "the checkpoint again"
    )


def read_rows(path: Path, facts: PredictionFacts, *, targets: Sequence[str] | None = None) -> Iterator[Rows]:
    """Yield the rows of a predictions file, some thousand at a time; `targets` alone, or all.

    Raises:
        DataDamageError: its bytes are not those that were written.
    """
    chosen = [name for name in facts.targets if targets is None or name in targets]
    labelled = [name for name in chosen if name in facts.labelled]
    columns = [
        "key",
        "has_audio",
        *(f"{name}_label" for name in labelled),
        *(f"{name}_probabilities" for name in chosen),
    ]
    num_rows = 0
    try:
        for batch in parquet_batches(path, columns=columns, batch_rows=BATCH_ROWS):
            num_rows += batch.num_rows
            labels, probabilities = {}, {}
            for name in labelled:
                column = batch.column(f"{name}_label")
                if facts.several:
                    labels[name] = _hot_labels(column, len(facts.targets[name]))
                else:
                    labels[name] = np.asarray(column.fill_null(-1)).astype(np.int64)
            for name in chosen:
                flat = np.asarray(batch.column(f"{name}_probabilities").flatten())
                probabilities[name] = flat.reshape(batch.num_rows, -1)
            yield Rows(batch.column("key").to_pylist(), np.asarray(batch.column("has_audio")), labels, probabilities)
        if num_rows != facts.num_samples:
            raise ValueError(f"{num_rows} samples instead of {facts.num_samples}")
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        raise DataDamageError(
            f"{path}: expected the predictions that were written, found others ({error}); evaluate the checkpoint again"
        ) from error


def _hot_labels(column: pa.Array, num_classes: int) -> NDArray[np.int64]:
    hot = np.zeros((len(column), num_classes), np.int64)
    hot[np.repeat(np.arange(len(column)), np.asarray(column.value_lengths())), np.asarray(column.flatten())] = 1
    return hot


@contextmanager
def writing_part(path: Path, facts: PredictionFacts) -> Iterator[Callable[[Scored], None]]:
    """Write what one rank has scored; the file gets its name when the block ends well.

    Labels are those of the model: a column per labelled target, -1 for none; of several labels a column per class.
    """
    schema = facts.schema().append(pa.field(_VIEWS_COLUMN, pa.int32()))
    waiting: list[pa.RecordBatch] = []
    with (
        writing(path) as file,
        pq.ParquetWriter(file, schema, **_PARQUET) as writer,
    ):

        def write_waiting() -> None:
            if waiting:
                writer.write_table(pa.Table.from_batches(waiting).combine_chunks())
                waiting.clear()

        def add(scored: Scored) -> None:
            if len(scored):
                waiting.append(_record_batch(scored, facts, schema))
            if sum(one.num_rows for one in waiting) >= BATCH_ROWS:
                write_waiting()

        yield add
        write_waiting()


def _record_batch(scored: Scored, facts: PredictionFacts, schema: pa.Schema) -> pa.RecordBatch:
    columns: dict[str, pa.Array] = {
        "key": pa.array(scored.sample_ids, pa.string()),
        "has_audio": pa.array(scored.has_audio),
        _VIEWS_COLUMN: pa.array(scored.num_views.astype(np.int32)),
    }
    for column, name in enumerate(facts.labelled):
        if facts.several:
            lists = [np.flatnonzero(row).tolist() for row in scored.labels]
            columns[f"{name}_label"] = pa.array(lists, pa.list_(pa.int32()))
        else:
            labels = scored.labels[:, column].astype(np.int32)
            columns[f"{name}_label"] = pa.array(labels, mask=labels < 0)
    for name, values in scored.probabilities.items():
        flat = pa.array(np.ascontiguousarray(values, np.float32).ravel())
        columns[f"{name}_probabilities"] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


class ExpectedKeys:
    """The keys that must have been scored, in the set's order: read anew at each pass."""

    def __init__(self, read: Callable[[], Iterable[str]], num_samples: int) -> None:
        self._read = read
        self.num_samples = num_samples

    def sample_ids(self) -> Iterable[str]:
        """Return the keys of the whole set, in stored order."""
        return self._read()

    def batches(self) -> Iterator[Any]:
        """Return nothing: there is nothing to score."""
        return iter(())


def join_parts(
    parts: Sequence[Path], out: Path, facts: PredictionFacts, expected: ExpectedKeys, *, num_views: int
) -> None:
    """Write the predictions file from the parts of all ranks, in their order, if they hold the set exactly once.

    Raises:
        IncompleteEvaluationError: samples are missing, foreign, scored twice or by another number of views; no file is
            left.
    """
    schema, tally, keys = facts.schema(), SampleTally(), iter(expected.sample_ids())
    metadata = {METADATA_KEY: json.dumps(asdict(facts), ensure_ascii=False).encode()}
    with (
        suppress(_NotWhole),
        writing(out) as file,
        pq.ParquetWriter(file, schema.with_metadata(metadata), **_PARQUET) as writer,
    ):
        for part in parts:
            for batch in parquet_batches(part, columns=[*schema.names, _VIEWS_COLUMN], batch_rows=BATCH_ROWS):
                found = batch.column("key").to_pylist()
                views = np.asarray(batch.column(_VIEWS_COLUMN))
                if not (views == num_views).all() or any(key != next(keys, None) for key in found):
                    raise _NotWhole
                tally.add(found, views)
                writer.write_table(pa.Table.from_batches([batch.select(schema.names)], schema))
        different = tally.num_different()
        if different != expected.num_samples or different == 0 or next(keys, None) is not None:
            raise _NotWhole  # so that `writing` leaves no file
        return
    _refuse(parts, expected)


class _NotWhole(Exception):  # noqa: N818  # it never leaves this module
    """The parts are not the set; what is wrong is looked for in another pass."""


def _refuse(parts: Sequence[Path], expected: ExpectedKeys) -> None:
    """Say what the parts lack or have too much of, by name."""
    tally = SampleTally()
    for part in parts:
        for batch in parquet_batches(part, columns=["key", _VIEWS_COLUMN], batch_rows=BATCH_ROWS):
            tally.add(batch.column("key").to_pylist(), np.asarray(batch.column(_VIEWS_COLUMN)))
    check_complete(tally, expected)
    raise IncompleteEvaluationError(
        "evaluation: expected the samples in the set's order by as many views as were asked for, found another order "
        "or number; no metric is reported"
    )


def label_counts(path: Path, facts: PredictionFacts) -> Mapping[str, int]:
    """Return by target how many samples have a label that the model does not know."""
    lost = dict.fromkeys(facts.labelled, 0)
    if facts.several:
        return lost
    columns = [f"{name}_label" for name in facts.labelled]
    for batch in parquet_batches(path, columns=columns, batch_rows=BATCH_ROWS) if columns else ():
        for name in facts.labelled:
            lost[name] += batch.column(f"{name}_label").null_count
    return lost
