"""Pickled DataFrames: read as pandas reads them, and nothing of the file is ever run."""

import contextlib
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sharding.datasets.frame_pickle import read_frame
from sharding.errors import AnnotationError

COLUMNS: dict[str, list[Any]] = {
    "unique_narration_id": ["P01-1", "P01-2", "P01-3"],
    "start_timestamp": [0.5, 2.25, 10.0],
    "main_action_classes": [[(3, 97)], [], [(0, 1), (2, 3)]],
    "count": [1, 2, 3],
    "end_timestamp": [1.5, 3.0, 11.125],
    "kept": [True, False, True],
}


def frame(storage: str = "python") -> pd.DataFrame:
    """As pandas makes it where PyArrow is not installed ("python"), or is ("pyarrow")."""
    with pd.option_context("mode.string_storage", storage):
        return pd.DataFrame(COLUMNS)


def objects() -> pd.DataFrame:
    """As pandas before 3 makes it: texts are objects."""
    columns = {name: pd.Series(values, dtype=object) for name, values in COLUMNS.items() if name != "count"}
    made = pd.DataFrame({**columns, "count": COLUMNS["count"]})
    made.columns = pd.Index(list(made.columns), dtype=object)
    return made


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("made", [frame(), objects()], ids=["texts", "objects"])
def test_every_column_is_what_pandas_wrote(tmp_path: Path, made: pd.DataFrame, protocol: int) -> None:
    path = tmp_path / "frame.pkl"
    made.to_pickle(path, protocol=protocol)
    assert read_frame(path) == COLUMNS
    assert list(read_frame(path)) == list(made.columns)


def test_a_frame_in_pieces_and_one_of_one_row_are_read(tmp_path: Path) -> None:
    path = tmp_path / "frame.pkl"
    for made in (frame().iloc[[1]], pd.concat([objects(), objects()]).reset_index(drop=True), frame()[["count"]]):
        made.to_pickle(path)
        assert read_frame(path) == made.to_dict(orient="list")


def test_texts_that_arrow_holds_are_refused_with_the_way_to_export_them(tmp_path: Path) -> None:
    frame("pyarrow").to_pickle(tmp_path / "frame.pkl")
    with pytest.raises(AnnotationError, match=r"ArrowStringArray; export it with pandas: frame\.to_json"):
        read_frame(tmp_path / "frame.pkl")


class Evil:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Evil(os.system, "true"), r"found the name posix\.system; export it with pandas"),
        (Evil(eval, "1 + 1"), r"found the name builtins\.eval"),
        (OrderedDict(a=1), r"found the name collections\.OrderedDict"),
        ({"a": [1]}, "expected a pickled DataFrame, found other contents"),
    ],
)
def test_a_pickle_of_anything_else_is_refused_and_not_run(tmp_path: Path, value: object, message: str) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(AnnotationError, match=message):
        read_frame(path)


def test_a_damaged_pickle_is_an_annotation_error_wherever_it_is_cut_or_changed(tmp_path: Path) -> None:
    path = tmp_path / "frame.pkl"
    frame().to_pickle(path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x20]) + whole[place + 1 :]):
            path.write_bytes(damaged)
            with contextlib.suppress(AnnotationError):  # and no other error; a flipped bit of a value is not seen
                read_frame(path)


def test_values_nested_without_end_are_refused_quickly(tmp_path: Path) -> None:
    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(nested))
    with pytest.raises(AnnotationError, match="expected DataFrame, found tuple"):
        read_frame(path)
