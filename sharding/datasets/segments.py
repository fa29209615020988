"""A row's segment of a media file."""

from collections.abc import Callable

from sharding.datasets.problems import Problems
from sharding.datasets.table import Row, read_cell


def read_segment(
    row: Row, start_column: str, end_column: str, parse: Callable[[str], float], *, problems: Problems
) -> tuple[float, float] | None:
    """Start and end in seconds; None, and a problem, where one is wrong or the end is not after the start."""
    start = read_cell(row, start_column, parse, problems)
    end = read_cell(row, end_column, parse, problems)
    if start is None or end is None:
        return None
    if end <= start:
        problems.add(
            "segment ends before it starts",
            f"{row.place(end_column)}: expected a time after {start_column} ({row[start_column]}), "
            f"found {row[end_column]!r}",
        )
        return None
    return start, end
