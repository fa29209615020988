"""The bytes of a sample: read by range, compared with the index, and their headers checked before a decoder sees them.

Where every frame is a picture of its own only the wanted ones are read; where frames depend on others, the whole
member. What is read is checked: DALI would fill frames that are not there with black, and a false size can ask for
any memory.
"""

import re
import struct
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import SampleDamageError
from pipelines.rendering import ClipFrames, JpegFrames, VideoMember
from pipelines.storage.index import SampleEntry, ShardIndexCache
from pipelines.storage.remote import open_files
from pipelines.storage.shard_files import Verify
from pipelines.threads import StatsRecorder
from sharding.format.index import frame_checksum, member_checksum
from sharding.format.shard_set import ShardSet
from sharding.media.codecs import StoredCodec

_MOST_GAP_BYTES = 4096
"""Ranges closer than this are read as one: a page more costs less than a call more."""
MOST_MEMBER_BYTES = 1 << 28
"""A video that is read whole may be so large: ten minutes at short side 256. Some dozens are in memory at a time."""
MOST_PIXELS = 1 << 26
"""Larger pictures are refused before a decoder sees them."""
_REMEDY = "the shard was damaged after it was written: restore it from a copy or convert it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedSample:
    """What a backend needs of one sample, checked."""

    entry: SampleEntry
    frames: dict[int, bytes]
    """JPEG bytes by frame index, only those asked for; empty where there is a `member`."""
    height: int
    width: int
    mel: NDArray[np.float16]
    """All rows, not normalised."""
    member: bytes | None = None
    """The whole video file, for codecs whose frames depend on others."""

    def clip_frames(self, frame_indices: tuple[int, ...]) -> ClipFrames:
        """Return the frames of a view, as a backend takes them."""
        if self.member is None:
            return JpegFrames(tuple(self.frames[index] for index in frame_indices))
        return VideoMember(self.member, self.entry.codec.name, frame_indices)


class SampleReader:
    """Reads the samples of one shard set; safe to use from several threads."""

    def __init__(
        self,
        shard_set: ShardSet,
        stats: StatsRecorder | None = None,
        *,
        verify: Verify = "size",
        index_cache_bytes: int = 1 << 24,
    ) -> None:
        """Nothing is opened before it is read."""
        self.shard_set, self.fingerprint = shard_set, shard_set.manifest.fingerprint
        self._stats = stats or StatsRecorder()
        self.files = open_files(shard_set, self._stats, verify=verify)
        self.indexes = ShardIndexCache(self.files, most_bytes=index_cache_bytes)

    def fetch(self, entry: SampleEntry, frame_indices: Iterable[int], *, is_second: bool = False) -> FetchedSample:
        """Return the named frames (or the member that holds them) and the spectrogram of a sample.

        Where the bytes are damaged in this machine's cache alone they are fetched again, once.

        Raises:
            ShardSetDamageError: the shard is missing or too short.
            SampleDamageError: bytes differ from their checksum, or are not the pictures, video or spectrogram that the
                index says.
        """
        wanted, offsets = sorted(set(frame_indices)), entry.frame_offsets
        frames: dict[int, bytes] = {}
        member = None
        with ExitStack() as held:
            with self._stats.timed("fetch_seconds", where=entry.where):
                shard = held.enter_context(self.files.opened(entry.shard))
                if entry.codec.has_frame_ranges:
                    for group in coalesce(wanted, offsets):
                        first, end = int(offsets[group[0]]), int(offsets[group[-1] + 1])
                        data = shard.read(first, end - first)
                        self._stats.add("bytes_read", len(data))
                        frames |= {i: data[int(offsets[i]) - first : int(offsets[i + 1]) - first] for i in group}
                elif entry.video_bytes > MOST_MEMBER_BYTES:
                    raise SampleDamageError(
                        f"{entry.where}: expected a video of at most {MOST_MEMBER_BYTES} bytes, found "
                        f"{entry.video_bytes}; convert with shorter segments, or with --codec mjpeg, which is read "
                        "frame by frame"
                    )
                else:
                    member = shard.read(entry.video_offset, entry.video_bytes)
                    self._stats.add("bytes_read", len(member))
                mel = shard.read(entry.mel_offset, entry.mel_bytes)
                self._stats.add("bytes_read", len(mel))
            try:
                return self._checked(entry, frames, member, mel)
            except SampleDamageError:
                if is_second or not self.files.invalidate(entry.shard, shard.descriptor):
                    raise
        return self.fetch(entry, wanted, is_second=True)

    def close(self) -> None:
        """Close the files."""
        self.files.close()

    def _checked(self, entry: SampleEntry, frames: dict[int, bytes], member: bytes | None, mel: bytes) -> FetchedSample:
        with self._stats.timed("checksum_seconds", where=entry.where):
            for index, data in frames.items():
                expected, found = int(entry.frame_xxh32[index]), frame_checksum(data)
                if found != expected:
                    raise SampleDamageError(
                        f"{entry.where}, frame {index} at byte {entry.frame_offsets[index]} ({len(data)} bytes): "
                        f"expected xxh32 {expected:08x}, found {found:08x}; {_REMEDY}"
                    )
            if member is not None:
                _require_member(entry, "mp4", entry.video_offset, member, entry.video_xxh64)
            _require_member(entry, "mel.npy", entry.mel_offset, mel, entry.mel_xxh64)
        if member is None:
            sizes = {index: jpeg_size(data, where=f"{entry.where}, frame {index}") for index, data in frames.items()}
            if len(set(sizes.values())) != 1:
                raise SampleDamageError(
                    f"{entry.where}: expected frames of one size, found {sizes}; convert the set again"
                )
            height, width = next(iter(sizes.values()))
        else:
            facts = video_facts(member, entry.codec, where=entry.where)
            height, width = facts.height, facts.width
            if facts.num_frames != entry.num_frames:
                raise SampleDamageError(
                    f"{entry.where}: expected a video of {entry.num_frames} frames, found {facts.num_frames}; "
                    "convert the set again"
                )
        num_bins = self.shard_set.manifest.audio.num_mel_bins
        rows = parse_mel(mel, num_rows=entry.mel_rows, num_bins=num_bins, where=f"{entry.where}, mel.npy")
        return FetchedSample(entry=entry, frames=frames, height=height, width=width, mel=rows, member=member)


def coalesce(wanted: list[int], offsets: NDArray[np.int64], *, most_gap: int = _MOST_GAP_BYTES) -> list[list[int]]:
    """Return runs of ascending frame indices whose byte ranges touch or lie at most `most_gap` bytes apart."""
    groups = [wanted[:1]]
    for before, index in pairwise(wanted):
        if offsets[index] - offsets[before + 1] <= most_gap:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _require_member(entry: SampleEntry, name: str, offset: int, data: bytes, expected: int) -> None:
    found = member_checksum(data)
    if found != expected:
        raise SampleDamageError(
            f"{entry.where}, {name} at byte {offset} ({len(data)} bytes): "
            f"expected xxh3-64 {expected:016x}, found {found:016x}; {_REMEDY}"
        )


_START_OF_IMAGE = b"\xff\xd8"
_FRAME_HEADERS = frozenset({0xC0, 0xC1, 0xC2})
"""Baseline, extended and progressive; every other coding is one our encoder never writes."""
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD8)})


def jpeg_size(data: bytes, *, where: str) -> tuple[int, int]:
    """Return (height, width) of the picture in `data`; `where` names the frame in messages.

    Raises:
        SampleDamageError: not a JPEG, not one of three components, or larger than `MOST_PIXELS`.
    """
    position = 2
    if data[:2] != _START_OF_IMAGE:
        raise SampleDamageError(f"{where}: expected a JPEG, found bytes {data[:4].hex()}; convert the set again")
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in _FRAME_HEADERS:
            header = data[position + 4 : position + 10]
            if len(header) < 6:
                raise SampleDamageError(f"{where}: the JPEG ends inside its frame header; convert the set again")
            _, height, width, components = struct.unpack(">BHHB", header)
            if components != 3 or not 0 < height * width <= MOST_PIXELS:
                raise SampleDamageError(
                    f"{where}: expected 3 colour components and at most {MOST_PIXELS} pixels, found {components} "
                    f"components and {width} x {height}; convert the set again"
                )
            return height, width
        length = 0 if marker in _WITHOUT_LENGTH else int.from_bytes(data[position + 2 : position + 4], "big")
        position += 2 + length
    raise SampleDamageError(f"{where}: a JPEG without a baseline or progressive frame header; convert the set again")


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
    width: int
    num_frames: int


def video_facts(data: bytes, codec: StoredCodec, *, where: str) -> VideoFacts:
    """Return what the boxes of an MP4 say of its only track; `where` names the sample in messages.

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
    """Return where the contents of the first box of that kind in `span` begin and end."""
    begin, end = span
    while begin + 8 <= end:
        size, found = struct.unpack_from(">I4s", data, begin)
        header = 8
        if size == 1 and begin + 16 <= end:
            (size,), header = struct.unpack_from(">Q", data, begin + 8), 16
        if size < header or begin + size > end:
            break  # a size that makes no sense
        if found == kind:
            return begin + header, begin + size
        begin += size
    raise SampleDamageError(f"{where}: expected an MP4 with a box {kind.decode()}, found none; convert the set again")


# Not read by NumPy, which parses headers as Python source: older CPythons (3.11.7; their issue 106905) count the depth
# of that for all threads together, and now and then one gets a SystemError for another's.
_NPY_START = re.compile(
    rb"\x93NUMPY\x01\x00(?P<size>..)\{'descr': '(?P<dtype>[^']{1,99})', 'fortran_order': (?P<order>True|False), "
    rb"'shape': \((?P<shape>[0-9]{1,12}(?:, [0-9]{1,12})*),?\), \} *\n",
    re.DOTALL,
)
"""Magic, version 1.0, size of the header and header, as NumPy writes them."""


def parse_mel(data: bytes, *, num_rows: int, num_bins: int, where: str) -> NDArray[np.float16]:
    """Return the float16 [rows, bins] array of a ``.mel.npy`` member; `where` names it in messages.

    The shape comes from the index and the header must agree, so a hostile header reserves no memory.

    Raises:
        SampleDamageError: not an npy file of that dtype, shape, order and size.
    """
    start = _NPY_START.match(data)
    if start is None or start.end() != start.end("size") + int.from_bytes(start["size"], "little"):
        raise SampleDamageError(
            f"{where}: not a spectrogram (expected the header of an npy file of version 1.0, found {data[:16]!r}...); "
            "convert the set again"
        )
    shape = tuple(int(side) for side in start["shape"].split(b", "))
    found = (shape, start["dtype"].decode("latin-1"), start["order"] == b"True", len(data) - start.end())
    expected = ((num_rows, num_bins), "<f2", False, 2 * num_rows * num_bins)
    if found != expected:
        raise SampleDamageError(
            f"{where}: expected (shape, dtype, Fortran order, bytes) {expected}, found {found}; convert the set again"
        )
    return np.frombuffer(data, dtype="<f2", offset=start.end()).reshape(num_rows, num_bins)
