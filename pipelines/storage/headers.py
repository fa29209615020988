"""Headers of JPEG, MP4 and spectrogram members, checked before a decoder sees them.

Size of a JPEG from its header, without decoding it.

What an MP4 member's own boxes say of its video, read without decoding it.

A decoder sees a member only when its codec, picture size and number of frames are those that the index and the
manifest promise: DALI would fill frames that are not there with black, and a false size can ask for any memory.

The spectrogram member: parsed by hand-checked header, cropped, padded and normalised.
"""

import io
import struct
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.augment.spectrogram import UNCHANGED, SpectrogramDraw
from pipelines.errors import SampleDamageError
from sharding.media.codecs import StoredCodec

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


MEL_MEAN = -4.2677393
MEL_SCALE = 2 * 4.5689974
"""(x - MEL_MEAN) / MEL_SCALE is what the audio expert was trained on (AudioSet statistics of AST)."""
_HEADER_ERRORS = (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError)
"""What NumPy's parser of headers raises, which reads them as Python literals."""


def parse_mel(data: bytes, *, num_rows: int, num_bins: int, where: str) -> NDArray[np.float16]:
    """The float16 [rows, bins] array of a ``.mel.npy`` member; `where` names it in messages.

    The shape comes from the index and the header must agree, so a hostile header reserves no memory.

    Raises:
        SampleDamageError: not an npy file of that dtype, shape, order and size.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"npy version {version}")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    except _HEADER_ERRORS as error:
        raise SampleDamageError(f"{where}: not a spectrogram ({error}); convert the set again") from error
    found = (shape, dtype.str, fortran_order, len(data) - stream.tell())
    expected = ((num_rows, num_bins), "<f2", False, 2 * num_rows * num_bins)
    if found != expected:
        raise SampleDamageError(
            f"{where}: expected (shape, dtype, Fortran order, bytes) {expected}, found {found}; convert the set again"
        )
    return np.frombuffer(data, dtype="<f2", offset=stream.tell()).reshape(num_rows, num_bins)


def mel_view(
    mel: NDArray[np.float16],
    *,
    start_row: int,
    num_rows: int,
    has_audio: bool,
    draw: SpectrogramDraw = UNCHANGED,
) -> NDArray[np.float32]:
    """`num_rows` rows from `start_row`, zero rows appended where the clip ends, rolled, normalised, noise and masks.

    Without audio all zeros: the mean of what the expert reads, not the value of a padded row.
    """
    view = np.zeros((num_rows, mel.shape[1]), dtype=np.float32)
    if not has_audio:
        return view
    rows = mel[start_row : start_row + num_rows]
    view[: len(rows)] = rows
    if draw.roll:
        view = np.roll(view, draw.roll, axis=0)
    return draw.finish((view - np.float32(MEL_MEAN)) / np.float32(MEL_SCALE))
