"""What a media file's own outermost structure claims, compared with the bytes that are there.

A file cut short often decodes without an error up to the cut. MP4, Matroska and AVI say how long their outermost
parts are, so a few reads tell a whole file from the front of one. Other containers make no claim.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sharding.errors import MediaError

_MP4_BOXES = frozenset(
    {b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"uuid", b"sidx", b"styp", b"mfra"}
)
_EBML_MAGIC = b"\x1a\x45\xdf\xa3"
_SEGMENT_ID = b"\x18\x53\x80\x67"


def check_container_is_whole(path: Path) -> None:
    """Compare the sizes the outermost parts of `path` claim with its length.

    Raises:
        MediaError: ``truncated`` when a part ends behind the file's end; ``no_index`` for an MP4 without its moov box.
    """
    length = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[4:8] in _MP4_BOXES:
            _check_mp4(file, length)
        elif head[:4] == _EBML_MAGIC:
            _check_matroska(file, length)
        elif head[:4] == b"RIFF":
            _check_end("RIFF chunk", 8 + int.from_bytes(head[4:8], "little"), length)


def _check_end(part: str, end: int, length: int) -> None:
    if end > length:
        raise MediaError("truncated", f"expected {end} bytes as its {part} says, found {length}; fetch the file again")


def _check_mp4(file: IO[bytes], length: int) -> None:
    kinds = set()
    for kind, end in _mp4_boxes(file, length):
        kinds.add(kind)
        _check_end(f"{kind.decode('ascii')} box", end, length)
    if b"moov" not in kinds:
        raise MediaError("no_index", "expected a moov box (the index of an MP4), found none; fetch the file again")


def _mp4_boxes(file: IO[bytes], length: int) -> Iterator[tuple[bytes, int]]:
    at = 0
    while at + 8 <= length:
        file.seek(at)
        header = file.read(16)
        size, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if size == 1:
            size = int.from_bytes(header[8:16], "big")
        if kind not in _MP4_BOXES or (size < 8 and size != 0):
            at += size if size >= 8 and at + size <= length else length
            continue
        end = at + size if size else length
        yield kind, end
        at = end


def _check_matroska(file: IO[bytes], length: int) -> None:
    file.seek(4)
    header_bytes = _read_vint(file)
    if header_bytes is None:
        return
    file.seek(header_bytes, 1)
    if file.read(4) != _SEGMENT_ID:
        return
    segment_bytes = _read_vint(file)
    if segment_bytes is not None:
        _check_end("Segment element", file.tell() + segment_bytes, length)


def _read_vint(file: IO[bytes]) -> int | None:
    """The EBML size at the file's position, or None for an unknown one (a live recording) or none at all."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    extra = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (0x7F >> extra)]) + file.read(extra), "big")
    return None if value == (1 << 7 * (extra + 1)) - 1 else value
