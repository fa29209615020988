"""Open and probe one source video with PyAV; what may be read, what it may cost, why a source is rejected.

Only the containers of FORMATS are opened, from plain files, so a playlist or a text file cannot lead the decoder
anywhere else. Streams are set up to be decoded strictly (`sharding.media.video`).
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from ca2st.errors import UserInputError
from sharding.errors import MediaError

FORMATS = ("mov", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "ogg", "asf")
"""Demuxers that may read a source."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceState:
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
    return SourceState(num_bytes=found.st_size, modified_ns=found.st_mtime_ns)


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
def open_media(path: Path) -> Iterator[InputContainer]:
    """The opened container of a local file.

    Raises:
        MediaError: ``not_a_video`` when no allowed demuxer takes it.
    """
    options = {"format_whitelist": _whitelist(), "protocol_whitelist": "file"}
    try:
        container = av.open(f"file:{path}", "r", options=options, metadata_errors="replace")  # titles in any encoding
    except av.error.MemoryError:
        raise
    except av.error.FFmpegError as error:
        raise MediaError("not_a_video", f"expected one of {', '.join(FORMATS)}, found: {error.strerror}") from error
    with container:
        yield container


def _whitelist() -> str:
    # FFmpeg compares a demuxer's whole name ("matroska,webm"), and each of its aliases, with these entries.
    return ",".join((*FORMATS, "mp4", "m4a", "3gp", "3g2", "mj2"))


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


def audio_candidates(container: InputContainer, video: VideoStream) -> list[AudioStream]:
    """Return the audio streams that may be a clip's sound, the likeliest first: the first that is not silent is taken.

    The container's one default stream has no rival. Of several, the one with the most channels comes first, as in
    FFmpeg; without any, they keep their order. In a broadcast with several programs, sound of the picture's own.
    """
    streams = list(container.streams.audio)
    own = [stream for stream in streams if container.streams.best("video", stream) == video]
    chosen = _default_or_all(own or streams)
    is_default = bool(chosen) and bool(chosen[0].disposition & Disposition.default)
    return sorted(chosen, key=_num_channels, reverse=True) if is_default else chosen


def _default_or_all(streams: list[_Stream]) -> list[_Stream]:
    """The decodable streams that are flagged as default, else all of them; a commentary only if there is no other."""
    decodable = [stream for stream in streams if stream.codec_context is not None] or streams
    main = [stream for stream in decodable if not stream.disposition & _ASIDE] or decodable
    return [stream for stream in main if stream.disposition & Disposition.default] or main


def _num_channels(stream: AudioStream) -> int:
    return 0 if stream.codec_context is None else stream.channels


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
