"""Probe a source video (what may be read, what it may cost), and compare what it claims with what is there.

A file cut short often decodes without an error up to the cut. MP4, Matroska, AVI and ASF say how long their outermost
parts are, so a few reads tell a whole file from the front of one. Where the decoder met the end of a file, that is
held against the duration which the file claims, so zeros in place of what never arrived are noticed too. AVI has no
checksums: its index says where every chunk lies. Ogg numbers its pages, packets of ASF have one length, and elements of
Matroska lie side by side: FFmpeg passes over lost ones without a word. A live recording makes no claim.
"""

import contextlib
import mmap
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from numpy.typing import NDArray

from ca2st.errors import UserInputError
from sharding.errors import MediaError, RejectReason

_MP4_BOXES = frozenset(
    {b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"uuid", b"sidx", b"styp", b"mfra"}
)
_EBML_MAGIC = b"\x1a\x45\xdf\xa3"
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11")
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
_ASF_DATA_HEADER_BYTES = 50
_ASF_PACKET_MARK = 0x80  # the first bit of a packet: it begins with error correction data
_SEGMENT_ID, _CLUSTER_ID = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"
_LEAST_EBML_ID = 0x10  # its first byte: at most four bytes long
_SECONDS_AROUND = 10  # of a segment: the picture it is decoded from may lie that far in front
_STREAM_CLAIMS = ("mov,mp4,m4a,3gp,3g2,mj2", "avi")  # a length of every stream
_FILE_CLAIMS = ("matroska,webm", "flv", "asf")  # the length of the longest
_SLACK = Fraction(1, 4)  # durations are rounded, and last frames last differently long
_MOST_ZEROS = 64 * 1024  # at the end of a stream of packets, none of which is zeros
_OGG_HEADER_BYTES = 27
_MIRRORED_BYTES = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_OGG_BEGINS, _OGG_ENDS = 2, 4  # flags of a stream's first and last page
_OGG_PAGE_BYTES = _OGG_HEADER_BYTES + 255 + 255 * 255
_AVI_ENTRY = np.dtype([("kind", "S4"), ("flags", "<u4"), ("offset", "<u4"), ("bytes", "<u4")])
_AVI_LIST_FLAG = 1


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
        elif head[:8] == _ASF_HEADER:
            _check_asf(file, length)


def _check_end(part: str, end: int, length: int) -> None:
    if end > length:
        raise MediaError("truncated", f"expected {end} bytes as its {part} says, found {length}; fetch the file again")


def _check_mp4(file: IO[bytes], length: int) -> None:
    at, kinds = 0, set()
    while at + 8 <= length:
        file.seek(at)
        header = file.read(16)
        size, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if size == 1:
            size = int.from_bytes(header[8:16], "big")
        elif size == 0:  # to the end of the file
            size = length - at
        if kind in _MP4_BOXES and size >= 8:
            kinds.add(kind)
            _check_end(f"{kind.decode('ascii')} box", at + size, length)
        elif size < 8 or at + size > length:  # other bytes
            break
        at += size
    if b"moov" not in kinds:
        raise MediaError("no_index", "expected a moov box (the index of an MP4), found none; fetch the file again")


def _check_asf(file: IO[bytes], length: int) -> None:
    file.seek(0)
    header = file.read(64 * 1024)
    at = header.find(_ASF_FILE_PROPERTIES)
    is_live = at < 0 or int.from_bytes(header[at + 88 : at + 92], "little") & 1
    if not is_live:
        _check_end("header", int.from_bytes(header[at + 40 : at + 48], "little"), length)


def _check_matroska(file: IO[bytes], length: int) -> None:
    file.seek(4)
    header_bytes = _read_vint(file)
    if header_bytes is None:
        return
    _check_end("EBML header", file.tell() + header_bytes, length)
    file.seek(header_bytes, os.SEEK_CUR)
    if file.read(4) != _SEGMENT_ID:
        return
    segment_bytes = _read_vint(file)
    if segment_bytes is not None:
        _check_end("Segment element", file.tell() + segment_bytes, length)


def _read_vint(file: IO[bytes] | mmap.mmap) -> int | None:
    """Return the EBML size at the file's position, or None for an unknown one (a live recording) or none at all."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    extra = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (0x7F >> extra)]) + file.read(extra), "big")
    return None if value == (1 << 7 * (extra + 1)) - 1 else value


def check_ends_as_claimed(
    container: InputContainer, stream: VideoStream, *, found: Fraction, needed: Fraction | None
) -> None:
    """Hold the end of what was decoded against what the file claims; its packets are used up.

    Args:
        container: The file, read to its end.
        stream: The picture.
        found: End of the last frame on the container's clock.
        needed: End of the segment on that clock: what lies behind it is not asked for. None: everything is.

    Raises:
        MediaError: ``truncated``.
    """
    slack = max(3 / frame_rate(stream), _SLACK)
    if needed is not None and found >= needed - slack:
        return
    kind, path = container.format.name, Path(container.name.removeprefix("file:"))
    if kind in _STREAM_CLAIMS and stream.duration and stream.time_base:
        claimed = ((stream.start_time or 0) + stream.duration) * stream.time_base
    elif kind in _FILE_CLAIMS and container.duration:
        claimed = Fraction(container.duration, av.time_base)  # from the clock's zero on, or from the first frame: less
    else:
        _check_tail(path, kind)
        return
    wanted = (claimed if needed is None else min(claimed, needed)) - slack
    if found < wanted and kind in _FILE_CLAIMS:
        found = max(found, _end_of_all_streams(path))
    if found < wanted:
        raise MediaError(
            "truncated",
            f"expected frames to {float(claimed):.3f} s as the file says, found them to {float(found):.3f} s; "
            "fetch the file again",
        )


def _end_of_all_streams(path: Path, *, is_sound: bool = False) -> Fraction:
    """Return where the last packet of any stream ends; sound may be longer than the picture."""
    last = Fraction(0)
    with open_media(path, is_sound=is_sound) as container, contextlib.suppress(av.error.FFmpegError):
        for packet in container.demux():
            if packet.pts is not None and packet.time_base is not None:
                last = max(last, (packet.pts + (packet.duration or 0)) * packet.time_base)
    return last


def _check_tail(path: Path, kind: str) -> None:
    """Ogg's last page ends a stream, and the packets of the MPEG streams are never zeros."""
    if kind in ("mpegts", "mpeg"):
        check_no_zeros_at_end(path)
    if kind != "ogg":
        return
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2 * _OGG_PAGE_BYTES))
        tail = file.read()
    at = tail.rfind(b"OggS")
    header = tail[at : at + _OGG_HEADER_BYTES]
    is_last = at >= 0 and len(header) == _OGG_HEADER_BYTES and header[5] & _OGG_ENDS
    contents = at + _OGG_HEADER_BYTES + header[26] if is_last else 0
    if not is_last or contents + sum(tail[at + _OGG_HEADER_BYTES : contents]) != len(tail):
        raise MediaError(
            "truncated", "expected a last page that ends its stream at the end of the file, found none; fetch it again"
        )


def check_no_zeros_at_end(path: Path) -> None:
    """Raise MediaError ``truncated`` where a download wrote zeros for what never arrived."""
    length = path.stat().st_size
    with path.open("rb") as file:
        file.seek(length - min(length // 2, _MOST_ZEROS // 2))
        if not any(file.read()):
            raise MediaError("truncated", "expected media up to the end of the file, found zeros; fetch the file again")


def check_chunks(path: Path, stream: VideoStream, start: Fraction, end: Fraction | None) -> None:
    """Find lost parts inside an AVI, Matroska, Ogg or ASF, behind which FFmpeg goes on.

    Args:
        path: A file; one of another kind passes.
        stream: Its picture.
        start: Seconds from its start from where it is needed.
        end: Seconds up to where it is needed; None: everything.

    Raises:
        MediaError: ``decode_error`` where something is not there.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
            _check_avi_chunks(data, stream, end)
        elif data[:4] == b"OggS":
            _check_ogg_pages(data, _bytes_needed(path, stream, end))
        elif data[:8] == _ASF_HEADER:
            _check_asf_packets(data, _bytes_needed(path, stream, end))
        elif data[:4] == _EBML_MAGIC:
            num_bytes = _bytes_needed(path, stream, end)
            is_far = start > _SECONDS_AROUND
            _check_elements(data, _place_of(path, stream, start - _SECONDS_AROUND) if is_far else 0, num_bytes)


def _bytes_needed(path: Path, stream: VideoStream, end: Fraction | None) -> int:
    """Return up to a second behind the moment `end`."""
    return path.stat().st_size if end is None else _place_of(path, stream, end + 1)


def _place_of(path: Path, stream: VideoStream, moment: Fraction) -> int:
    """Return the byte where the first packet of the picture behind a moment lies, else the file's length."""
    if stream.time_base is None:
        return path.stat().st_size
    ticks = (stream.start_time or 0) + int(moment / stream.time_base)
    with open_media(path) as container, contextlib.suppress(av.error.FFmpegError):
        found = container.streams[stream.index]
        container.seek(ticks, stream=found)
        for packet in container.demux(found):
            if packet.pts is not None and packet.pts > ticks and packet.pos is not None:
                return packet.pos
    return path.stat().st_size


def _check_elements(data: mmap.mmap, first: int, last: int) -> None:
    """From cluster to cluster of a Matroska, and from block to block in those behind `first`, nothing is left out."""
    at, segment_end = _element(data, 0)[1], len(data)
    while at < last:
        contents, end = _element(data, at)
        kind = data[at : at + 4]
        is_cut = end > len(data) and segment_end <= len(data) and kind not in (_SEGMENT_ID, _CLUSTER_ID)
        if contents == at or is_cut:  # a live recording ends anywhere
            raise MediaError(
                "decode_error", f"expected an EBML element at byte {at}, found other bytes; fetch it again"
            )
        if kind == _SEGMENT_ID:
            last, segment_end = min(last, end), end
        at = contents if kind == _SEGMENT_ID or (kind == _CLUSTER_ID and end > first) else end


def _element(data: mmap.mmap, at: int) -> tuple[int, int]:
    """Return where an EBML element's contents start and end, far behind the file if nothing says; no element: `at`."""
    if at >= len(data) or data[at] < _LEAST_EBML_ID:
        return at, at
    data.seek(min(at + 9 - data[at].bit_length(), len(data)))  # a live recording may end inside of it
    num_bytes = _read_vint(data)
    return data.tell(), sys.maxsize if num_bytes is None else data.tell() + num_bytes


def _check_ogg_pages(data: mmap.mmap, num_bytes: int) -> None:
    """Check that pages follow each other without a gap: those of a stream are counted, each has a checksum."""
    at, numbers = 0, dict[bytes, int]()
    while at < num_bytes:
        header = data[at : at + _OGG_HEADER_BYTES]
        stream, number = header[14:18], int.from_bytes(header[18:22], "little")
        is_page = header[:4] == b"OggS" and len(header) == _OGG_HEADER_BYTES
        if not is_page or (number != numbers.get(stream, number) and not header[5] & _OGG_BEGINS):
            raise MediaError("decode_error", f"expected the next Ogg page at byte {at}, found another; fetch it again")
        numbers[stream] = (number + 1) % 2**32
        contents = at + _OGG_HEADER_BYTES + header[26]
        end = contents + sum(data[contents - header[26] : contents])
        if int.from_bytes(header[22:26], "little") != _ogg_checksum(header[:22] + bytes(4) + data[at + 26 : end]):
            raise MediaError(
                "decode_error", f"expected an Ogg page's checksum at byte {at}, found another; fetch it again"
            )
        at = end


def _ogg_checksum(page: bytes) -> int:
    """Return the CRC-32 of zlib's polynomial with the bits in the other order, from 0."""
    reflected = zlib.crc32(page.translate(_MIRRORED_BYTES), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)


def _check_asf_packets(data: mmap.mmap, num_bytes: int) -> None:
    """Every packet begins with the same mark."""
    at, properties = data.find(_ASF_DATA), data.find(_ASF_FILE_PROPERTIES)
    if at < 0 or properties < 0:
        return
    length = int.from_bytes(data[properties + 92 : properties + 96], "little")
    first, total = at + _ASF_DATA_HEADER_BYTES, int.from_bytes(data[at + 40 : at + 48], "little")
    last = min(num_bytes, first + total * length if total else num_bytes)
    marks = np.frombuffer(data[first:last:length] if length else b"", np.uint8) & _ASF_PACKET_MARK
    if np.count_nonzero(marks) * 2 <= len(marks):  # packets without it
        return
    for lost in np.flatnonzero(marks == 0)[:1]:
        raise MediaError("decode_error", f"expected an ASF packet at byte {first + lost * length}, found other bytes")


def _check_avi_chunks(data: mmap.mmap, stream: VideoStream, end: Fraction | None) -> None:
    """Compare the chunks with the index, if there is one: a lost chunk would put everything behind it too early."""
    lists = dict(_avi_lists(data))
    if b"movi" not in lists or b"idx1" not in lists:
        return
    movi, (at, num_bytes) = lists[b"movi"][0], lists[b"idx1"]
    index = data[at : at + num_bytes]
    entries = np.frombuffer(index, _AVI_ENTRY, count=len(index) // _AVI_ENTRY.itemsize)
    if end is not None:  # up to a second behind it, by the chunks of the picture, one per frame
        is_picture = np.char.startswith(entries["kind"], b"%02d" % stream.index)
        entries = entries[np.cumsum(is_picture) <= int((end + 1) * frame_rate(stream))]
    entries = entries[(entries["bytes"] > 0) & (entries["flags"] & _AVI_LIST_FLAG == 0)]
    there = max((_are_there(data, entries, base) for base in (movi, 0)), key=np.count_nonzero)
    if np.count_nonzero(there) * 2 <= len(there):  # an index of another file, or none: it proves nothing
        return
    for lost in np.flatnonzero(~there)[:1]:
        kind = entries["kind"][lost].decode("latin-1")
        raise MediaError(
            "decode_error", f"expected chunk {lost} ({kind!r}) where the index says, found other bytes; fetch it again"
        )


def _avi_lists(data: mmap.mmap) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """Yield place and length of the contents of the outermost chunks, lists by their type."""
    at = 12
    while at + 12 <= len(data):
        kind, num_bytes = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        yield (data[at + 8 : at + 12] if kind == b"LIST" else kind), (at + 8, num_bytes)
        at += 8 + num_bytes + num_bytes % 2


def _are_there(data: mmap.mmap, entries: NDArray[Any], base: int) -> NDArray[np.bool_]:
    """Return whether each entry's chunk, kind and size, is at its offset from `base`."""
    places = (entries["offset"].astype(np.int64) + base).tolist()
    headers = b"".join(data[place : place + 8].ljust(8, b"\0") for place in places)
    found = np.frombuffer(headers, np.dtype([("kind", "S4"), ("bytes", "<u4")]))
    there: NDArray[np.bool_] = (found["kind"] == entries["kind"]) & (found["bytes"] == entries["bytes"])
    return there


FORMATS = ("mov", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "ogg", "asf")
"""Demuxers that may read a source."""
SOUND_FORMATS = ("wav", "flac", "mp3", "aac", "w64")
"""Demuxers that may also read a file of its own for the sound."""
_ENCRYPTED_TAG = "drms"  # sound of a shop; what the standard encrypts is marked packet by packet
_STRICT = {"err_detect": "crccheck+explode"}
_STILLS = Disposition.attached_pic | Disposition.timed_thumbnails
_Stream = TypeVar("_Stream", VideoStream, AudioStream)
_ASIDE = (
    Disposition.comment
    | Disposition.dub
    | Disposition.karaoke
    | Disposition.hearing_impaired
    | Disposition.visual_impaired
    | Disposition.clean_effects
    | Disposition.non_diegetic
    | Disposition.descriptions
    | Disposition.dependent
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaLimits:
    """What one source may cost; more is a ``too_large`` reject. Guards against decompression bombs."""

    max_file_bytes: int = 256 * 2**30
    """Bytes of the file; generous, since hours of video are cut by time."""
    max_duration_seconds: float = 600.0
    """Seconds of a segment; the longest clips of the supported datasets take minutes."""
    max_frames: int = 36_000
    """Frames kept of a segment: ten minutes at 60 fps."""
    max_frame_pixels: int = 8192 * 4320
    """Width x height of a source frame: 8K."""
    max_decoded_pixels: int = 300_000_000_000
    """Width x height summed over the decoded frames: ten minutes of 4K at 60 fps."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise UserInputError(f"MediaLimits.{name}: expected a positive number, found {getattr(self, name)}")


class SourceState(NamedTuple):
    """Size and modification time of a source, to notice a change while it is read."""

    num_bytes: int
    modified_ns: int


def source_state(path: Path) -> SourceState:
    """Look at the file.

    Raises:
        MediaError: ``missing_file``.
    """
    try:
        found = path.stat()
        readable = os.access(path, os.R_OK) and path.is_file()
    except OSError as error:
        raise MediaError("missing_file", f"expected a readable file, found: {error.strerror}") from error
    if not readable:
        raise MediaError("missing_file", "expected a readable file, found a folder or one without read permission")
    return SourceState(found.st_size, found.st_mtime_ns)


def check_unchanged(path: Path, before: SourceState) -> None:
    """Raise MediaError ``source_changed`` unless the file is as it was."""
    try:
        same = source_state(path) == before
    except MediaError:
        same = False
    if not same:
        raise MediaError(
            "source_changed", "expected the same size and time as before reading, found others; convert again"
        )


@contextlib.contextmanager
def open_media(path: Path, *, is_sound: bool = False) -> Iterator[InputContainer]:
    """The opened container of a local file; `is_sound`: one for sound alone, which may be of other formats too.

    Raises:
        MediaError: ``not_a_video`` or ``not_a_sound`` when no allowed demuxer takes it.
    """
    formats = (*SOUND_FORMATS, *FORMATS) if is_sound else FORMATS
    # FFmpeg compares a demuxer's whole name ("matroska,webm"), and each of its aliases, with these entries.
    whitelist = ",".join((*formats, "mp4", "m4a", "3gp", "3g2", "mj2"))
    options = {"format_whitelist": whitelist, "protocol_whitelist": "file"}
    try:
        container = av.open(f"file:{path}", "r", options=options, metadata_errors="replace")  # titles in any encoding
    except av.error.MemoryError:
        raise
    except av.error.FFmpegError as error:
        reason: RejectReason = "not_a_sound" if is_sound else "not_a_video"
        raise MediaError(reason, f"expected one of {', '.join(formats)}, found: {error.strerror}") from error
    with container:
        yield container


def video_stream(container: InputContainer, limits: MediaLimits) -> VideoStream:
    """The stream players show, set up for strict decoding on one thread: the default one, else the largest picture.

    Cover pictures and thumbnails are never taken.

    Raises:
        MediaError: ``no_video_stream``; ``decode_error`` without a decoder; ``too_large`` by its frame size.
    """
    streams = moving_pictures(container)
    if not streams:
        found = len(container.streams)
        raise MediaError("no_video_stream", f"expected a video stream, found {found} streams without one")
    stream = max(_default_or_all(streams), key=_num_pixels)  # the first of equals
    be_strict(stream)
    if _num_pixels(stream) > limits.max_frame_pixels:
        found_size = f"{stream.width}x{stream.height}"
        raise MediaError(
            "too_large", f"expected at most {limits.max_frame_pixels} pixels per frame, found {found_size}"
        )
    return stream


def moving_pictures(container: InputContainer) -> list[VideoStream]:
    """Return the video streams that are neither cover pictures nor thumbnails."""
    return [stream for stream in container.streams.video if not stream.disposition & _STILLS]


def check_sound_is_whole(path: Path) -> None:
    """Hold the last packet of a file for sound alone against the length it claims; formats that claim none pass.

    Raises:
        MediaError: ``truncated``.
    """
    with open_media(path, is_sound=True) as container:
        if container.format.name not in (*_STREAM_CLAIMS, *_FILE_CLAIMS, "flac", "wav") or not container.duration:
            return
        first = Fraction(container.start_time or 0, av.time_base)
        claimed = first + Fraction(container.duration, av.time_base)
    found = _end_of_all_streams(path, is_sound=True)
    if found < claimed - _SLACK:
        raise MediaError(
            "truncated",
            f"expected sound to {float(claimed):.3f} s as the file says, found it to {float(found):.3f} s; "
            "fetch the file again",
        )


def audio_candidates(container: InputContainer, video: VideoStream | None) -> list[AudioStream]:
    """Return the audio streams that may be a clip's sound, the likeliest first: the first that is not silent is taken.

    The container's one default stream has no rival. Of several, the one with the most channels comes first, as in
    FFmpeg; without any, they keep their order. In a broadcast with several programs, sound of the picture's own.
    """
    streams = list(container.streams.audio)
    own = [stream for stream in streams if video is not None and container.streams.best("video", stream) == video]
    chosen = _default_or_all(own or streams)
    is_default = bool(chosen) and bool(chosen[0].disposition & Disposition.default)
    if not is_default:
        return chosen
    return sorted(chosen, key=lambda one: 0 if one.codec_context is None else one.channels, reverse=True)


def _default_or_all(streams: list[_Stream]) -> list[_Stream]:
    """Return the decodable streams flagged as default, else all; a commentary only if there is no other."""
    decodable = [stream for stream in streams if stream.codec_context is not None] or streams
    main = [stream for stream in decodable if not stream.disposition & _ASIDE] or decodable
    return [stream for stream in main if stream.disposition & Disposition.default] or main


def _num_pixels(stream: VideoStream) -> int:
    return 0 if stream.codec_context is None else stream.width * stream.height


def frame_rate(stream: VideoStream) -> Fraction:
    """Return frames per second as the file says; 30 where it says nothing."""
    return Fraction(stream.average_rate or stream.guessed_rate or 30)


def be_strict(stream: VideoStream | AudioStream) -> None:
    """Set a stream up for strict decoding on one thread.

    Raises:
        MediaError: ``decode_error`` without a decoder; ``encrypted``.
    """
    if stream.codec_context is None:
        raise MediaError(
            "decode_error", f"expected the {stream.type} in a codec that PyAV decodes, found an unknown one"
        )
    if stream.codec_context.codec_tag == _ENCRYPTED_TAG:
        raise MediaError("encrypted", f"expected a {stream.type} stream in the clear, found one under DRM")
    stream.codec_context.thread_count = 1
    stream.codec_context.options = dict(_STRICT)
