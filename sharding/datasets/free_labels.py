"""Labels of somebody's own list: names or numbers, against a class list or making one."""

import re
from collections.abc import Sequence
from pathlib import Path

from sharding.datasets.label_spaces import check_class_name, class_index, class_name, is_whole_number, read_classes
from sharding.datasets.problems import Problems
from sharding.datasets.table import CellError, Row, read_cell

_DECIMAL = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?", re.ASCII)


def label_column(
    rows: Sequence[Row], column: str, classes: Path | None, *, problems: Problems
) -> tuple[tuple[str, ...], list[int | None]]:
    """The classes, and each row's label or None where it is wrong.

    With a class list: a column of numbers that are no names of it holds indices into it, any other column names.
    Without: all numbers are indices, which must run from 0 without gaps; names are sorted.
    """
    texts = [row[column] for row in rows]
    if classes is not None:
        names = read_classes(classes)
        numbers = all(map(is_whole_number, texts)) and not set(texts) <= set(names)
        parse = class_index(len(names)) if numbers else class_name(names)
        return names, [read_cell(row, column, parse, problems) for row in rows]
    if any(map(is_whole_number, texts)):
        return _numbered(rows, column, problems)
    labels = [read_cell(row, column, _name, problems) for row in rows]
    names = tuple(sorted({name for name in labels if name is not None}))
    indices = {name: index for index, name in enumerate(names)}
    return names, [None if name is None else indices[name] for name in labels]


def _name(text: str) -> str:
    if not text:
        raise CellError("empty label", "a class name")
    if _DECIMAL.fullmatch(text):
        raise CellError("label not a whole number", "a class name or a whole number from 0")
    check_class_name(text)
    return text


def _number(text: str) -> int:
    if not is_whole_number(text):
        raise CellError("label not a whole number", "a whole number from 0, as in other rows")
    if int(text) < 0:
        raise CellError("label out of range", "a whole number from 0")
    return int(text)


def _numbered(rows: Sequence[Row], column: str, problems: Problems) -> tuple[tuple[str, ...], list[int | None]]:
    labels = [read_cell(row, column, _number, problems) for row in rows]
    used = sorted({label for label in labels if label is not None})
    if None not in labels and used != list(range(len(used))):
        gap = next(number for number in range(len(used)) if number != used[number])
        hint = "are they counted from 1? " if used[0] == 1 else ""
        problems.add(
            "class without samples",
            f"{rows[0].path}: {column}: expected class numbers from 0 without gaps, found none with {gap} "
            f"({len(used)} classes, {used[0]} to {used[-1]}); {hint}pass --classes with all class names",
        )
    return tuple(map(str, range(len(used)))), labels
