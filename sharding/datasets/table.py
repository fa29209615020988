"""Annotation tables, lists and documents, read strictly, with the place in every message: file:line:column.

Everything wrong with a file is gathered (`Problems`) before anything is refused, so all rows are named at once. A
record is one physical line: a line break inside quotes is refused where it starts, instead of swallowing rows. Times
become seconds: exactly the nearest float to what is written, never a sum of roundings.
"""

import csv
import re
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from ca2st.checked_json import DocumentError, parse_json, read_json
from ca2st.errors import EnvironmentFault, did_you_mean, listed
from sharding.errors import AnnotationError
from sharding.format.index import read_parquet

_MAX_LISTED = 20


class Problems:
    """Collects what is wrong; `refuse_any` raises one error that lists it.

    Args:
        source: What is being read, for the message: a path.
        advice: What to do about it.
    """

    def __init__(self, source: object, *, advice: str = "correct it and run again") -> None:
        self._source, self._advice = source, advice
        self._listed: list[str] = []
        self._kinds: Counter[str] = Counter()

    def add(self, kind: str, message: str) -> None:
        """Note one problem; `kind` is what it is counted under, `message` starts with its place."""
        self._kinds[kind] += 1
        if len(self._listed) < _MAX_LISTED:
            self._listed.append(message)

    def refuse_any(self) -> None:
        """Refuse what was noted, if anything was.

        Raises:
            AnnotationError: what is wrong, where (at most 20 places) and how often by kind; one line for one problem.
        """
        count = self._kinds.total()
        if count == 1:
            raise AnnotationError(f"{self._listed[0]}; {self._advice}")
        if count:
            counts = ", ".join(f"{kind} {number}" for kind, number in self._kinds.most_common())
            places = listed(self._listed, most=_MAX_LISTED, count=count, separator="\n  ")
            raise AnnotationError(f"{self._source}: {count} problems ({counts}); {self._advice}:\n  {places}")


_T = TypeVar("_T")
_LINE_BREAK = re.compile("\r\n|\n|\r")
_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars", " ": "spaces"}
_MARKS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"PK\x03\x04": "a spreadsheet (xlsx or ods)",
    b"\x1f\x8b": "gzip",
}


class CellError(ValueError):
    """A cell that cannot be used: `kind` is what it is counted under, `expected` completes the message."""

    def __init__(self, kind: str, expected: str) -> None:
        super().__init__(f"expected {expected}")
        self.kind, self.expected = kind, expected


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One record of a table; ``row["column"]`` is a cell without the spaces around it."""

    path: Path
    line: int
    text: str
    """The line as it stands in the file."""
    columns: tuple[str, ...]
    cells: tuple[str, ...]
    problems: Problems
    """Takes what is wrong with its cells."""

    def __getitem__(self, column: str) -> str:
        return self.cells[self.columns.index(column)]

    def get(self, column: str) -> str:
        """Return the cell, or an empty text where the table has no such column."""
        return self[column] if column in self.columns else ""

    @property
    def where(self) -> str:
        """``file:line``."""
        return f"{self.path}:{self.line}"

    def place(self, column: str) -> str:
        """``file:line:column: name``, with the character the cell starts at, from 1, as editors count."""
        return f"{self.where}:{_cell_start(self.text, self.columns.index(column))}: {column}"

    def read(self, column: str, parse: Callable[[str], _T]) -> _T | None:
        """Return `parse` of a cell; a CellError becomes a problem, and None is returned."""
        try:
            return parse(self[column])
        except CellError as error:
            self.refuse(column, error.kind, error.expected)
            return None

    def read_segment(
        self, start_column: str, end_column: str, parse: Callable[[str], float]
    ) -> tuple[float, float] | None:
        """Return start and end in seconds; None, and a problem, where one is wrong or the end is not later."""
        start, end = self.read(start_column, parse), self.read(end_column, parse)
        if start is None or end is None:
            return None
        if end <= start:
            after = f"a time after {start_column} ({self[start_column]})"
            self.refuse(end_column, "segment ends before it starts", after)
            return None
        return start, end

    def refuse(self, column: str, kind: str, expected: str) -> None:
        """Note a cell as a problem, with its place and what it holds."""
        self.problems.add(kind, f"{self.place(column)}: expected {expected}, found {self[column]!r}")


def matching(pattern: str, kind: str, expected: str) -> "Callable[[str], re.Match[str]]":
    """Return a cell parser for texts of one form, whose classes mean ASCII; others are a CellError."""
    form = re.compile(pattern, re.ASCII)

    def parse(text: str) -> "re.Match[str]":
        match = form.fullmatch(text)
        if match is None:
            raise CellError(kind, expected)
        return match

    return parse


def read_table(
    path: Path, *, required: Sequence[str], optional: Sequence[str] | None = None, problems: Problems
) -> tuple[tuple[str, ...], tuple[Row, ...]]:
    """Return the columns and the rows of a comma-separated table.

    Args:
        path: The file: UTF-8, with or without a byte order mark, any line ends.
        required: Columns that must be there, in any order.
        optional: The only columns that may be there too; None: any may, and are ignored.
        problems: Takes the rows of a wrong form.

    Raises:
        AnnotationError: unreadable, another encoding or delimiter, a wrong header, or no rows.
    """
    (number, header), *lines = numbered_lines(path, expected=f"a header {','.join(required)}")
    where = f"{path}:{number}:1"
    columns = _cells(header)
    if columns is None or not set(required) <= set(columns):
        _refuse_other_delimiter(where, header, required)
    if columns is None:
        raise AnnotationError(f"{where}: expected the header {','.join(required)}, found {_shortened(header)}")
    check_columns(where, columns, required=required, optional=optional)
    if not lines:
        raise AnnotationError(f"{path}: expected rows below the header, found none")
    return columns, tuple(_rows(path, lines, columns, problems))


def read_rows(path: Path, *, columns: tuple[str, ...], problems: Problems) -> tuple[Row, ...]:
    """Read a comma-separated table without a header, whose columns are known; raises as `read_table`."""
    return tuple(_rows(path, numbered_lines(path), columns, problems))


def read_pairs(
    path: Path, *, columns: tuple[str, str], problems: Problems, separator: str | None = None
) -> tuple[Row, ...]:
    """Read lines of two fields, the last one without spaces: ``a name.mp4 12``; raises as `read_table`.

    With a `separator` the first field ends at the first one.
    """
    rows = []
    for number, line in numbered_lines(path):
        cells = line.split(separator, 1) if separator else line.strip().rsplit(None, 1)
        row = Row(
            path=path,
            line=number,
            text=line,
            columns=columns,
            cells=tuple(cell.strip() for cell in cells),
            problems=problems,
        )
        if len(cells) == len(columns):
            rows.append(row)
        else:
            problems.add("wrong number of cells", f"{row.where}:1: expected {' and '.join(columns)}, found {line!r}")
    return tuple(rows)


def numbered_lines(path: Path, *, expected: str = "rows") -> list[tuple[int, str]]:
    """Return the lines of a text file that are not blank, with their numbers from 1; `expected` is for the message.

    Raises:
        AnnotationError: as `read_text`, or there are none.
    """
    lines = [(number, line) for number, line in enumerate(split_lines(read_text(path)), start=1) if line.strip()]
    if not lines:
        raise AnnotationError(f"{path}: expected {expected}, found an empty file")
    return lines


def first_line(path: Path) -> str:
    """Return the first line that is not blank, which tells the form of a list; raises as `numbered_lines`."""
    return numbered_lines(path)[0][1]


def read_records(path: Path, *, columns: Sequence[str] | None = None) -> list[tuple[int, dict[str, Any]]]:
    """Return the rows of a Parquet file (``.parquet``), else of JSON Lines, with their numbers from 1.

    Of a Parquet file only those of `columns` are read that it has; None: all.

    Raises:
        AnnotationError: not readable, of another form, or without rows.
    """
    if path.suffix.lower() == ".parquet":
        try:
            found = read_parquet(path)
            if columns is not None:
                found = found.select([name for name in columns if name in found.column_names])
            rows = found.to_pylist()
        except (OSError, OverflowError, ValueError, pa.ArrowException) as error:  # overflow: a time beyond Python's
            raise AnnotationError(f"{path}: expected a Parquet file, found something else ({error})") from error
        if not rows:
            raise AnnotationError(f"{path}: expected rows, found none")
        return list(enumerate(rows, start=1))
    try:
        return [
            (number, parse_json(line, dict[str, Any], where=f"{path}:{number}"))
            for number, line in numbered_lines(path)
        ]
    except DocumentError as error:
        raise AnnotationError(f"{error}; expected one row per line (JSON Lines)") from error


def read_document(path: Path, kind: type[_T] | types.GenericAlias) -> _T:
    """Return the JSON document of an annotation file, checked to be of type `kind` (see `ca2st.checked_json`).

    Raises:
        AnnotationError: not readable, no JSON, or of another form.
    """
    try:
        return read_json(path, kind)
    except (DocumentError, EnvironmentFault) as error:
        raise AnnotationError(f"{error}; is this the owners' file?") from error


def read_text(path: Path, *, what: str = "an annotation file", option: str = "--annotations") -> str:
    """Return the text of an annotation file, or of what else an option names.

    Raises:
        AnnotationError: not readable, or not UTF-8; the message says what it looks like and where.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AnnotationError(f"{path}: expected {what}, found: {error.strerror}; check {option}") from error
    for mark, name in _MARKS.items():
        if data.startswith(mark):
            raise AnnotationError(f"{path}: expected UTF-8 text, found {name}; save it as CSV in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig")
        raise AnnotationError(
            f"{_place_after(path, before)}: expected UTF-8, found byte 0x{data[error.start]:02x} "
            "(Latin-1 or Windows-1252?); save the file as UTF-8"
        ) from None
    if "\0" in text:
        place = _place_after(path, text[: text.index("\0")])
        raise AnnotationError(f"{place}: expected text, found a zero byte; is this an annotation file?")
    return text


def split_lines(text: str) -> list[str]:
    """Return the lines of a text file: Unix, Windows and old Mac line ends, and no others."""
    return _LINE_BREAK.split(text)


def _place_after(path: Path, before: str) -> str:
    """``file:line:column`` of what follows `before`, the text from the start of the file."""
    lines = split_lines(before)
    return f"{path}:{len(lines)}:{len(lines[-1]) + 1}"


def check_columns(
    where: str, columns: Sequence[str], *, required: Sequence[str], optional: Sequence[str] | None
) -> None:
    """Refuse a table whose columns are not those expected, as `read_table` says.

    Raises:
        AnnotationError: a required column is missing, one is there twice, or one is unknown.
    """
    missing = [name for name in required if name not in columns]
    if missing:
        near = did_you_mean(missing[0], list(columns))
        raise AnnotationError(
            f"{where}: expected the columns {','.join(required)}, found {_shortened(','.join(columns))}; "
            f"missing: {', '.join(missing)}{near}"
        )
    doubled = sorted({name for name in columns if columns.count(name) > 1})
    if doubled:
        raise AnnotationError(f"{where}: expected every column once, found {', '.join(doubled)} several times")
    if optional is None:
        return
    known = [*required, *optional]
    unknown = [name for name in columns if name not in known]
    if unknown:
        near = did_you_mean(unknown[0], known)
        raise AnnotationError(
            f"{where}: expected only the columns {', '.join(known)}, found {', '.join(map(repr, unknown))}{near}; "
            "rename or remove it"
        )


def _refuse_other_delimiter(where: str, line: str, required: Sequence[str]) -> None:
    for delimiter, name in _DELIMITERS.items():
        cells = [cell.strip().strip('"') for cell in line.split(delimiter)]
        if len(cells) > 1 and set(required) <= set(cells):
            raise AnnotationError(
                f"{where}: expected commas between the columns, found {name}; save it comma-separated"
            )


def _rows(path: Path, lines: Sequence[tuple[int, str]], columns: tuple[str, ...], problems: Problems) -> Iterator[Row]:
    """Yield the rows of the right form; the others are problems."""
    for number, line in lines:
        cells = _cells(line)
        where = f"{path}:{number}"
        if cells is None and len(line) > csv.field_size_limit():
            expected = f"a line of at most {csv.field_size_limit()} characters, found {len(line)}"
            problems.add("line too long", f"{where}:1: expected {expected}")
        elif cells is None:
            expected = f"quotes closed on the same line, found {_shortened(line)}"
            start = line.rfind('"') + 1
            problems.add("broken quotes", f"{where}:{start}: expected {expected}")
        elif len(cells) != len(columns):
            start = _cell_start(line, min(len(cells) - 1, len(columns)))
            hint = "; quote cells that hold commas" if len(cells) > len(columns) else ""
            expected = f"{len(columns)} cells ({','.join(columns)}), found {len(cells)}{hint}"
            problems.add("wrong number of cells", f"{where}:{start}: expected {expected}")
        else:
            yield Row(path=path, line=number, text=line, columns=columns, cells=cells, problems=problems)


def _cells(line: str) -> tuple[str, ...] | None:
    """Return the cells of a line without the spaces around them, or None when its quotes are broken."""
    try:
        (cells,) = csv.reader([line], strict=True, skipinitialspace=True)
    except (csv.Error, ValueError):
        return None
    return tuple(cell.strip() for cell in cells)


def _cell_start(line: str, number: int) -> int:
    """Return the character of a line, from 1, that the cell of that number starts at; quoted commas do not count."""
    # The csv module does not say where a cell starts.
    start, in_quotes, is_quoted_cell = 0, False, False
    for position, character in enumerate(line):
        if number == 0:
            break
        if character == '"' and (is_quoted_cell or not line[start:position].strip()):
            in_quotes, is_quoted_cell = not in_quotes, True
        elif character == "," and not in_quotes:
            number, start, is_quoted_cell = number - 1, position + 1, False
    return start + 1


def _shortened(line: str) -> str:
    return repr(line if len(line) <= 120 else f"{line[:117]}...")


_clock = matching(r"(\d{2,4}):([0-5]\d):([0-5]\d)(\.\d{1,12})?", "not a time", "a time HH:MM:SS.sss")
_digits = matching(r"\d{1,6}", "not a time", "whole seconds")
_SECONDS = re.compile(r"\d{1,9}(\.\d{1,30})?(e-\d{1,2})?", re.ASCII)  # as programs write any float of that size


def clock_time(text: str) -> float:
    """Return seconds of ``HH:MM:SS`` or ``HH:MM:SS.fff``; another form is a CellError."""
    hours, minutes, seconds, fraction = _clock(text).groups()
    return float(f"{int(hours) * 3600 + int(minutes) * 60 + int(seconds)}{fraction or ''}")


def seconds_or_clock_time(text: str) -> float:
    """Return seconds of a plain number (``12.5``) or of a clock time.

    Raises:
        CellError: another form, a sign, or an exponent but that of a small number (``1e-05``).
    """
    if _SECONDS.fullmatch(text):
        return float(text)
    if ":" in text:
        return clock_time(text)
    raise CellError("not a time", "seconds (12.5) or a time HH:MM:SS.sss")


def whole_seconds(text: str) -> int:
    """Return the seconds of a whole number; another form is a CellError."""
    return int(_digits(text)[0])
