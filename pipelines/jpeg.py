"""Size of a JPEG from its header, without decoding it."""

from pipelines.errors import SampleDamageError

_START_OF_IMAGE = b"\xff\xd8"
_FRAME_HEADERS = frozenset({0xC0, 0xC1, 0xC2})
"""Baseline, extended and progressive; every other coding is one our encoder never writes."""
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD8)})
MOST_PIXELS = 1 << 26
"""Larger pictures are refused before a decoder sees them."""


def jpeg_size(data: bytes, *, where: str) -> tuple[int, int]:
    """(height, width) of the picture in `data`; `where` names the frame in messages.

    Raises:
        SampleDamageError: not a JPEG, not one of three components, or larger than `MOST_PIXELS`.
    """
    position = 2
    if data[:2] != _START_OF_IMAGE:
        raise SampleDamageError(f"{where}: expected a JPEG, found bytes {data[:4].hex()}; convert the set again")
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in _FRAME_HEADERS:
            return _checked_size(data[position + 4 : position + 10], where)
        length = 0 if marker in _WITHOUT_LENGTH else int.from_bytes(data[position + 2 : position + 4], "big")
        position += 2 + length
    raise SampleDamageError(f"{where}: a JPEG without a baseline or progressive frame header; convert the set again")


def _checked_size(header: bytes, where: str) -> tuple[int, int]:
    if len(header) < 6:
        raise SampleDamageError(f"{where}: the JPEG ends inside its frame header; convert the set again")
    height, width, components = int.from_bytes(header[1:3], "big"), int.from_bytes(header[3:5], "big"), header[5]
    if components != 3 or not 0 < height * width <= MOST_PIXELS:
        raise SampleDamageError(
            f"{where}: expected 3 colour components and at most {MOST_PIXELS} pixels, found {components} components "
            f"and {width} x {height}; convert the set again"
        )
    return height, width
