"""Sizes and views as people write them: ``1GB``, ``256MB``, ``2x3``."""

import re

from ca2st.errors import UserInputError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """Number of bytes in ``1GB``, ``256 MB`` or ``1048576``.

    Raises:
        UserInputError: another form.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise UserInputError(f"size: expected a number with a unit such as 1GB or 256MB, found {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_views(text: str) -> tuple[int, int]:
    """(clips, crops) of ``2x3``.

    Raises:
        UserInputError: another form, or a zero.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise UserInputError(f"--views: expected CLIPSxCROPS such as 2x3, found {text!r}")
    return int(match[1]), int(match[2])
