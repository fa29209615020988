"""What an MP4 member's own boxes say of its video, read without decoding it.

A decoder sees a member only when its codec, picture size and number of frames are those that the index and the
manifest promise: DALI would fill frames that are not there with black, and a false size can ask for any memory.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.errors import SampleDamageError
from pipelines.jpeg import MOST_PIXELS
from sharding.codecs import StoredCodec

_TO_SAMPLE_TABLE = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
_ENTRY_AT = 8
"""Where the first entry of a sample description starts: behind version, flags and number of entries."""
_SIZE_AT = 32
"""Width and height behind the start of a visual sample entry, 16 bits each."""
_COUNT_AT = 8
"""Number of samples in a table of sample sizes, 32 bits."""
_Span = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFacts:
    """What the boxes say."""

    height: int
    """Pixels of every frame."""
    width: int
    num_frames: int


def video_facts(data: bytes, codec: StoredCodec, *, where: str) -> VideoFacts:
    """Size and number of frames of the only track of the MP4 in `data`; `where` names the sample in messages.

    Raises:
        SampleDamageError: not an MP4 of that codec, or pictures larger than `MOST_PIXELS`.
    """
    table = (0, len(data))
    for kind in _TO_SAMPLE_TABLE:
        table = _box(data, table, kind, where)
    begin, end = _box(data, table, b"stsd", where)
    entry = data[begin + _ENTRY_AT : end]
    sizes = data[slice(*_box(data, table, b"stsz", where))]
    if len(entry) < _SIZE_AT + 4 or entry[4:8] not in codec.sample_entries or len(sizes) < _COUNT_AT + 4:
        raise SampleDamageError(
            f"{where}: expected a track of {codec.name}, found {entry[4:8]!r}; convert the set again"
        )
    width, height = struct.unpack_from(">HH", entry, _SIZE_AT)
    if not 0 < width * height <= MOST_PIXELS:
        raise SampleDamageError(
            f"{where}: expected at most {MOST_PIXELS} pixels, found {width} x {height}; convert the set again"
        )
    return VideoFacts(height=height, width=width, num_frames=struct.unpack_from(">I", sizes, _COUNT_AT)[0])


def _box(data: bytes, span: _Span, kind: bytes, where: str) -> _Span:
    """First and behind the last byte of the contents of the first box of that kind in `span`."""
    for name, inside in _boxes(data, *span):
        if name == kind:
            return inside
    raise SampleDamageError(f"{where}: expected an MP4 with a box {kind.decode()}, found none; convert the set again")


def _boxes(data: bytes, begin: int, end: int) -> Iterator[tuple[bytes, _Span]]:
    """Boxes up to one whose size makes no sense."""
    while begin + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, begin)
        header = 8
        if size == 1 and begin + 16 <= end:
            (size,), header = struct.unpack_from(">Q", data, begin + 8), 16
        if size < header or begin + size > end:
            return
        yield kind, (begin + header, begin + size)
        begin += size
