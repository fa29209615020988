"""What a model answered instead of what, counted from the predictions of a test."""

import csv
import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sharding.parquet import parquet_batches, parquet_columns

_BATCH_ROWS = 4096


def confusion_tables(predictions: Path, classes: Mapping[str, list[str]]) -> dict[str, str]:
    """A CSV table ``true,predicted,count`` for each target of `classes` that `predictions` has, commonest first.

    Pairs that never occurred are left out. Of two classes that are equally likely the lower one was answered.
    """
    columns = parquet_columns(predictions)
    return {
        target: _table(_counts(predictions, target), names)
        for target, names in classes.items()
        if f"{target}_probabilities" in columns
    }


def _counts(predictions: Path, target: str) -> Counter[tuple[int, int]]:
    """Samples by (true, answered) class."""
    found: Counter[tuple[int, int]] = Counter()
    columns = [f"{target}_label", f"{target}_probabilities"]
    for batch in parquet_batches(predictions, columns=columns, batch_rows=_BATCH_ROWS):
        values = np.asarray(batch.column(1).flatten()).reshape(batch.num_rows, -1)
        found.update(zip(batch.column(0).to_pylist(), values.argmax(axis=1).tolist(), strict=True))
    return found


def _table(counts: Counter[tuple[int, int]], names: list[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("true", "predicted", "count"))
    for (true, answered), count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        writer.writerow((names[true], names[answered], count))
    return text.getvalue()
