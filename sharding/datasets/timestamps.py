"""Times in annotation files, to seconds: exactly the nearest float to what is written, never a sum of roundings."""

import re

from sharding.datasets.table import CellError

_CLOCK = re.compile(r"(\d{2,4}):([0-5]\d):([0-5]\d)(\.\d{1,12})?", re.ASCII)
_SECONDS = re.compile(r"\d{1,9}(\.\d{1,12})?", re.ASCII)


def clock_time(text: str) -> float:
    """Seconds of ``HH:MM:SS`` or ``HH:MM:SS.fff``.

    Raises:
        CellError: another form.
    """
    match = _CLOCK.fullmatch(text)
    if match is None:
        raise CellError("not a time", "a time HH:MM:SS.sss")
    hours, minutes, seconds, fraction = match.groups()
    return float(f"{int(hours) * 3600 + int(minutes) * 60 + int(seconds)}{fraction or ''}")


def seconds_or_clock_time(text: str) -> float:
    """Seconds of a plain number (``12.5``) or of a clock time.

    Raises:
        CellError: another form, a sign or an exponent.
    """
    if _SECONDS.fullmatch(text):
        return float(text)
    if ":" in text:
        return clock_time(text)
    raise CellError("not a time", "seconds (12.5) or a time HH:MM:SS.sss")
