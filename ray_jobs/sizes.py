"""Sizes and views as people write them: ``1GB``, ``256MB``, ``2x3``."""

import re
from reprlib import repr as shortened

from ca2st.errors import UserInputError

_MOST_VIEWS = 100
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """Number of bytes in ``1GB``, ``256 MB`` or ``1048576``.

    Raises:
        UserInputError: another form.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise UserInputError(f"size: expected a number with a unit such as 1GB or 256MB, found {shortened(text)}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_views(text: str) -> tuple[int, int]:
    """(clips, crops) of ``2x3``.

    Raises:
        UserInputError: another form, a zero, or more views than fit: all of a sample are in memory at once.
    """
    match = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", text)
    if match is None:
        raise UserInputError(f"--views: expected CLIPSxCROPS such as 2x3, found {shortened(text)}")
    clips, crops = int(match[1]), int(match[2])
    if clips * crops > _MOST_VIEWS:
        raise UserInputError(
            f"--views: expected at most {_MOST_VIEWS} views a sample, found {text}; published are 2x3 and 5x3"
        )
    return clips, crops
