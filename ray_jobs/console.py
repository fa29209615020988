"""What commands read and print: sizes (``1GB``), views (``2x3``), places of files, lines, tables, JSON, progress."""

import contextlib
import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any, TextIO

from ca2st.checked_json import finite
from ca2st.durable import NO_FAULTS, FaultPoints
from ca2st.errors import UserInputError

if TYPE_CHECKING:
    from sharding.conversion import ConversionProgress, ConversionReport, OpenPool
    from sharding.settings import ConversionConfig
    from sharding.source import SourceList

_MOST_VIEWS = 100
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """Return the number of bytes in ``1GB``, ``256 MB`` or ``1048576``.

    Raises:
        UserInputError: another form.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise UserInputError(f"size: expected a number with a unit such as 1GB or 256MB, found {shortened(text)}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_views(text: str) -> tuple[int, int]:
    """Return (clips, crops) of ``2x3``.

    Raises:
        UserInputError: another form, a zero, or more views than fit: all of a sample are in memory at once.
    """
    match = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", text)
    if match is None:
        raise UserInputError(f"--views: expected CLIPSxCROPS such as 2x3, found {shortened(text)}")
    clips, crops = int(match[1]), int(match[2])
    if clips * crops > _MOST_VIEWS:
        raise UserInputError(
            f"--views: expected at most {_MOST_VIEWS} views per sample, found {text}; published are 2x3 and 5x3"
        )
    return clips, crops


def require_folder_place(path: Path, option: str) -> None:
    """Refuse a folder that cannot be one: a file has its name, or that of a folder above it.

    Raises:
        UserInputError: as said, or the name is longer than any may be.
    """
    for place in (path, *path.parents):
        try:
            found = place.exists()
        except OSError as error:
            raise UserInputError(f"{option}: expected the name of a folder, found {path}: {error.strerror}") from error
        if found and not place.is_dir():
            raise UserInputError(f"{option}: expected a folder, found the file {place}; choose another name")


def require_writable_place(path: Path | None, option: str) -> None:
    """Refuse a file that could not get its name at the end; None, no file, is fine.

    Raises:
        UserInputError: the folder is not there or cannot be written to, or `path` is a folder.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise UserInputError(
            f"{option}: expected a file in a folder that exists, found no {path.parent}; make it first"
        )
    if path.is_dir():
        raise UserInputError(f"{option}: expected the name of a file, found the folder {path}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserInputError(f"{option}: expected a folder that can be written to, found {path.parent}; name another")


Update = Callable[[int, str], None]
"""``update(done, note)``: how many are done, and a few words behind the bar."""

_PLAIN_INTERVAL_SECONDS = 5.0
_BAR_CELLS = 20
_results: list[TextIO] = []
"""Where results go inside of `stdout_for_results`."""


def show_log() -> None:
    """Print our packages' log lines and everybody's warnings on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding has no letters for
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    seen: set[str] = set()

    def is_news(record: logging.LogRecord) -> bool:  # an informative line the first time only; warnings always
        text = record.getMessage()
        is_known = record.levelno <= logging.INFO and text in seen
        seen.add(text)
        return not is_known

    logging.getLogger().handlers[0].addFilter(is_news)
    for package in ("ca2st", "pipelines", "ray_jobs", "sharding"):
        logging.getLogger(package).setLevel(logging.INFO)


def say(text: str) -> None:
    """A line for the person, on stderr: stdout is for results."""
    _write(text, sys.stderr)


def result(text: str) -> None:
    """A line of the command's result, on stdout."""
    _write(text, _results[-1] if _results else sys.stdout)


def print_json(facts: object) -> None:
    """One JSON object on stdout; a number that is not finite, of which JSON has none, is null."""
    result(json.dumps(finite(facts, default=_plain)))


def answer(facts: object, lines: Iterable[str], *, as_json: bool) -> None:
    """Print what a command found: `facts` as JSON, or the `lines` for a person."""
    if as_json:
        print_json(facts)
    else:
        for line in lines:
            result(line)


@contextlib.contextmanager
def stdout_for_results() -> Iterator[None]:
    """Let only `result` and `print_json` write to stdout in the block.

    What libraries print, their C code and child processes too, goes to stderr.
    """
    own = sys.stdout
    with contextlib.ExitStack() as stack:
        try:
            number = own.fileno()
        except (OSError, ValueError):  # replaced by something that is no file
            results = own
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        else:
            own.flush()
            copy = os.fdopen(os.dup(number), "w", encoding="utf-8", errors="backslashreplace")
            results = stack.enter_context(copy)
            os.dup2(sys.stderr.fileno(), number)
            stack.callback(os.dup2, results.fileno(), number)
            stack.callback(own.flush)
        _results.append(results)
        stack.callback(_results.pop)
        yield


def _write(text: str, stream: TextIO) -> None:
    """A line; where nobody reads any more (``| head``) the command goes on and ends with its own exit code."""
    try:
        stream.write(f"{text}\n")  # in its workers Ray Train replaces print by one that says all twice
        stream.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # what is written later, at the end too, fails no more
        os.close(nowhere)


def _plain(value: object) -> object:
    """Return what JSON does not know: dataclasses as objects, paths and the rest as text."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def table(rows: Mapping[str, object]) -> str:
    """Return two aligned columns, a line per fact."""
    width = max(map(len, rows), default=0)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Update]:
    """Show how far something is; the block gets a function to call with (done, note)."""
    if not sys.stderr.isatty():
        yield _lines(title, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    columns = (  # on a narrow terminal the note is cut, not the bar or the time that is left
        TextColumn("{task.description}", table_column=Column(no_wrap=True, max_width=24, overflow="ellipsis")),
        BarColumn(bar_width=_BAR_CELLS, table_column=Column(no_wrap=True, min_width=_BAR_CELLS)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, ratio=1, overflow="ellipsis")),
    )
    with Progress(*columns, console=Console(stderr=True), expand=True) as bar:
        task = bar.add_task(title, total=total, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)


def _lines(title: str, total: int) -> Update:
    last_shown = begun = time.monotonic()
    first: int | None = None

    def update(done: int, note: str) -> None:
        nonlocal last_shown, begun, first
        now = time.monotonic()
        if first is None:  # a run that is resumed does not begin at 0; nothing is known of its pace yet
            first, begun = done, now
        if done < total and now - last_shown < _PLAIN_INTERVAL_SECONDS:
            return
        last_shown = now
        left = (now - begun) / (done - first) * (total - done) if done > first else None
        told = "" if left is None or done >= total else f"  {duration(left)} left"
        say(f"{time.strftime('%H:%M:%S')} {title}: {done}/{total}{told}  {note}".rstrip())

    return update


def duration(seconds: float) -> str:
    """Return ``1:02:03``, or ``2:03`` of less than an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counted(counts: Mapping[str, Any]) -> str:
    """Return ``{"a": 1, "b": 2}`` as ``1 a, 2 b``; ``none`` when empty."""
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def convert_shown(
    source: "SourceList",
    out: str | Path,
    config: "ConversionConfig",
    *,
    faults: FaultPoints = NO_FAULTS,
    pool: "OpenPool | None" = None,
) -> "ConversionReport":
    """Run `sharding.conversion.convert` with a progress bar; raises as it does."""
    from sharding.conversion import convert

    with progress(f"Converting {source.dataset}/{source.split}", len(source.samples)) as update:

        def show(state: "ConversionProgress") -> None:
            rejected = f"  {state.num_rejected} rejected" if state.num_rejected else ""
            update(state.num_done, f"{state.clips_per_second:.1f} clips/s{rejected}")

        return convert(source, out, config, faults=faults, pool=pool, progress=show)
