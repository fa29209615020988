"""A part in a process of its own: a crash, a hang or a lost device costs that part its remaining rows, no more."""

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ca2st.child_processes import SPAWN
from ray_jobs.gpu_check.settings import GpuCheckSettings, PartName

Row = dict[str, Any]
_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PartResult:
    """What a part gave."""

    rows: list[Row]
    """As many as it found."""
    error: str | None
    """Why there are no more; None: it came to its end."""
    seconds: float
    budget_seconds: float


RunPart = Callable[[PartName, GpuCheckSettings, float], PartResult]
"""Runs a part within some seconds."""


def run_in_process(name: PartName, settings: GpuCheckSettings, seconds: float) -> PartResult:
    """Run a part in a process of its own, which is ended when its time is up."""
    begin, rows, error = time.monotonic(), list[Row](), None
    ours, theirs = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=_serve, args=(theirs, name, settings))
    process.start()
    theirs.close()
    try:
        for row in _received(ours, begin + seconds):
            rows.append(row)
        process.join(_PATIENCE_SECONDS)
    except _EndError as end:
        error = str(end)
    finally:
        ours.close()
        _end(process)
    if error is None and process.exitcode:
        error = f"its process ended with exit code {process.exitcode}"
    return PartResult(rows=rows, error=error, seconds=time.monotonic() - begin, budget_seconds=seconds)


def run_here(name: PartName, settings: GpuCheckSettings, seconds: float) -> PartResult:
    """Run a part in this process; its time is not limited."""
    from ray_jobs.gpu_check.parts import PARTS

    begin, rows, error = time.monotonic(), list[Row](), None
    try:
        rows.extend(PARTS[name](settings))
    except Exception as raised:  # noqa: BLE001 - a part that fails is a result, and the others go on
        error = _told(raised)
    return PartResult(rows=rows, error=error, seconds=time.monotonic() - begin, budget_seconds=seconds)


class _EndError(Exception):
    """The part gives no more rows."""


def _received(connection: Connection, deadline: float) -> Iterator[Row]:
    while True:
        if not connection.poll(max(0.0, deadline - time.monotonic())):
            raise _EndError("its time is up")
        try:
            kind, value = connection.recv()
        except EOFError:
            raise _EndError("its process ended without a word") from None
        if kind == "row":
            yield value
        elif kind == "error":
            raise _EndError(value)
        else:
            return


def _serve(connection: Connection, name: PartName, settings: GpuCheckSettings) -> None:
    from ray_jobs.gpu_check.parts import PARTS

    try:
        for row in PARTS[name](settings):
            connection.send(("row", row))
        connection.send(("end", None))
    except Exception as error:  # noqa: BLE001 - told to the parent
        connection.send(("error", _told(error)))


def _told(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} (line {last.lineno} of {last.name})"


def _end(process: Any) -> None:
    if process.is_alive():
        process.terminate()
        process.join(_PATIENCE_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
