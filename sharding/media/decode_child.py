"""Turn one source segment into a stored clip, in a child process."""

import contextlib
import ctypes
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import av
from av.audio.stream import AudioStream
from av.video.stream import VideoStream

from ca2st.processes import die_with_parent
from sharding.errors import MediaError
from sharding.media.audio import EncodedAudio, cut_audio
from sharding.media.claims import check_chunks, check_container_is_whole, check_no_zeros_at_end
from sharding.media.encode import EncodedVideo, clip_encoder
from sharding.media.picture import PictureMaker, pixel_aspect_of
from sharding.media.probe import (
    MediaLimits,
    audio_candidates,
    be_strict,
    check_unchanged,
    moving_pictures,
    open_media,
    source_state,
    video_stream,
)
from sharding.media.video import Segment, VideoCut, thinned
from sharding.source import SILENT_SOUND

_MAX_OPEN_FILES = 64
_LONGEST_SECONDS = 1e9  # what a limit of the system can express on every machine
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWNET = 0x40000000
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446  # the same numbers on every processor
_LANDLOCK_VERSION = 1
_READS = 1 << 2 | 1 << 3  # of files, of folders
_FILE_ACTS = {1: 13, 2: 14, 3: 15}  # bits that each version of Landlock knows, the newest of these for all later ones
_BIND_OR_CONNECT_TCP, _NET_VERSION = 0b11, 4
_TRACKS = {"video_track": "pictures", "audio_track": "sound tracks"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipJob:
    """What to cut out of which file, and how to store it."""

    path: Path
    start_seconds: float | None
    end_seconds: float | None
    codec: str
    short_side: int
    quality: int
    num_gop_frames: int | None
    frames_per_second: float | None
    hdr: str
    """A name of `sharding.media.picture.HDR_POLICIES`."""
    interlaced: str
    """A name of `sharding.media.picture.INTERLACED_POLICIES`."""
    ticks_per_second: int
    audio_policy: str
    """``required``, ``optional`` or ``none``."""
    sample_rate_hz: int
    limits: MediaLimits
    clock: str = "file"
    """Where the seconds count from, a name of `sharding.media.video.CLOCKS`."""

    @property
    def clock_of_cut(self) -> str:
        """The clock, or that of a whole file, which starts at its first frame."""
        return "first-frame" if self.start_seconds is None and self.end_seconds is None else self.clock


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedClip:
    """A stored clip with the facts of its source."""

    video: EncodedVideo
    audio: EncodedAudio | None
    duration_seconds: float
    source_frames_per_second: float
    source_size: tuple[int, int]
    source_bytes: int
    source_codec: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What was done to the source on the way (turned, scaled to square pixels, a track chosen), in JSON's types."""
    notes: tuple[str, ...] = ()
    """Kinds of what a user should know about this clip, counted over the set: ``tone-mapped``, ``silent sound``."""

    @property
    def has_audio(self) -> bool:
        """Whether there is something to hear; digital silence counts as no sound."""
        return self.audio is not None and not self.audio.is_silent


@dataclass(frozen=True, slots=True)
class Rejected:
    """Why a clip could not be made; `what` names no path, so that it is the same in every place."""

    reason: str
    what: str


def encode_clip(job: ClipJob) -> EncodedClip:
    """Decode the job's segment completely and strictly, and encode it.

    Raises:
        MediaError: for every reason of `sharding.media.probe.REASONS` that a file can give.
    """
    before = source_state(job.path)
    if before.num_bytes == 0:
        raise MediaError("empty_file", "expected a video, found 0 bytes; fetch the file again")
    if before.num_bytes > job.limits.max_file_bytes:
        raise MediaError("too_large", f"expected at most {job.limits.max_file_bytes} bytes, found {before.num_bytes}")
    check_container_is_whole(job.path)
    try:
        clip = _encoded(job, before.num_bytes)
    except MediaError as error:
        if error.reason == "decode_error":
            check_no_zeros_at_end(job.path)  # the better reason
        raise
    check_unchanged(job.path, before)
    return clip


def _encoded(job: ClipJob, source_bytes: int) -> EncodedClip:
    segment = Segment.of(job.start_seconds, job.end_seconds)
    with open_media(job.path) as container:
        stream = video_stream(container, job.limits)
        source_size = stream.width, stream.height  # later ones may differ
        cut = VideoCut(container, stream, segment, limits=job.limits, clock=job.clock_of_cut)
        pictures = PictureMaker(
            job.codec,
            short_side=job.short_side,
            hdr=job.hdr,
            interlaced=job.interlaced,
            pixel_aspect=pixel_aspect_of(stream),
        )
        encoder = clip_encoder(
            job.codec,
            pictures=pictures,
            quality=job.quality,
            num_gop_frames=job.num_gop_frames,
            ticks_per_second=job.ticks_per_second,
        )
        for frame in thinned(pictures.prepared(cut.frames()), job.frames_per_second):
            encoder.add(frame)
        check_chunks(job.path, stream, segment.start, segment.end)
        candidates = [] if job.audio_policy == "none" else audio_candidates(container, stream)
        audio, tracks = _audio(job, segment, cut, candidates)
        tracks |= _of_several(stream, moving_pictures(container))
        return EncodedClip(
            video=encoder.finish(),
            audio=audio,
            duration_seconds=float(cut.duration),
            source_frames_per_second=float(stream.average_rate or stream.guessed_rate or 0),
            source_size=source_size,
            source_bytes=source_bytes,
            source_codec=stream.codec_context.name,
            changes={**cut.changes, **pictures.changes, **tracks},
            notes=(*cut.notes, *pictures.notes, *_notes(audio, tracks)),
        )


def _audio(
    job: ClipJob, segment: Segment, cut: VideoCut, candidates: Sequence[AudioStream]
) -> tuple[EncodedAudio | None, dict[str, Any]]:
    """The first sound track that is not silent in the segment, and which one it is where there is a choice."""
    audio, tracks = None, dict[str, Any]()
    for candidate in candidates:
        with open_media(job.path) as container:
            stream = cast(AudioStream, container.streams[candidate.index])
            be_strict(stream)
            heard = cut_audio(
                container,
                stream,
                segment,
                zero=cut.zero,
                duration=cut.duration,
                rate_hz=job.sample_rate_hz,
                limits=job.limits,
            )
            if candidate is candidates[0] or (heard is not None and (audio is None or not heard.is_silent)):
                audio, tracks = heard, _of_several(stream, container.streams.audio)
        if audio is not None and not audio.is_silent:
            break
    if job.audio_policy == "required":
        _require_sound(audio, has_stream=bool(candidates))
    return audio, tracks


def _require_sound(audio: EncodedAudio | None, *, has_stream: bool) -> None:
    if audio is not None and not audio.is_silent:
        return
    found = "digital silence" if audio else "an audio stream without samples there" if has_stream else "no audio stream"
    raise MediaError("no_audio", f"expected sound in the segment, found {found}; --audio optional accepts it")


def _of_several(stream: VideoStream | AudioStream, tracks: Sequence[object]) -> dict[str, Any]:
    """Which track was taken where a file has several of a kind: its index in the container and its language."""
    if len(tracks) < 2:
        return {}
    language = {"language": stream.language} if stream.language else {}
    return {f"{stream.type}_track": {"index": stream.index, "of": len(tracks)} | language}


def _notes(audio: EncodedAudio | None, tracks: Mapping[str, Any]) -> tuple[str, ...]:
    of_audio = () if audio is None else (SILENT_SOUND,) if audio.is_silent else audio.notes
    return (*of_audio, *(f"one of several {_TRACKS[kind]}" for kind in tracks))


def serve(
    connection: Connection, job_function: Callable[[Any], Any], memory_bytes: int, timeout_seconds: float
) -> None:
    """Answer jobs from `connection` until it closes; the body of a child process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()
    _limit_resources(memory_bytes)
    _give_up_privileges()
    with contextlib.suppress(EOFError, ConnectionError):
        connection.send("ready")
        while True:
            job = connection.recv()
            _limit_processor_time(timeout_seconds)
            connection.send(_answer(job_function, job))


def _answer(job_function: Callable[[Any], Any], job: Any) -> Any:
    try:
        return job_function(job)
    except MediaError as error:
        return Rejected(error.reason, str(error))
    except MemoryError:
        return Rejected("out_of_memory", "decoding needed more memory than a child may have")
    except av.error.FFmpegError as error:  # some are OSErrors, too
        return Rejected("decode_error", f"FFmpeg: {error.strerror}")
    except OSError as error:
        return Rejected("missing_file", f"expected a readable file, found: {error.strerror}")
    except Exception as error:  # noqa: BLE001  a fault on one file is counted with its name, not the end of a conversion
        return Rejected("internal_error", f"{type(error).__name__}: {error}")


def _limit_resources(memory_bytes: int) -> None:
    """`memory_bytes` of address space more than the process has now, no core files, few open files and no writing."""
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, 0)  # a write fails; pipes have no size
    _lower(resource.RLIMIT_NOFILE, _MAX_OPEN_FILES)
    if sys.platform == "linux":
        now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _lower(resource.RLIMIT_AS, now + memory_bytes)


def _lower(limit: int, value: int) -> None:
    """For good; a limit from outside that is lower stays."""
    _, hard = resource.getrlimit(limit)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def _limit_processor_time(seconds: float) -> None:
    """SIGXCPU ends a process that computes for as long as the clip may take, should nobody watch it any more."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(time.process_time() + min(seconds, _LONGEST_SECONDS)) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _give_up_privileges() -> None:
    """As much of the file system and the network as this system lets a process give up; see the module's text."""
    if sys.platform != "linux":
        return
    linux = ctypes.CDLL(None)
    linux.unshare(_CLONE_NEWNET)  # refused to most: no harm
    linux.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    version = linux.syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION)
    if version < 1:  # not in this kernel, or switched off
        return
    acts = ((1 << _FILE_ACTS[min(version, max(_FILE_ACTS))]) - 1) & ~_READS
    rules = (ctypes.c_uint64 * 2)(acts, _BIND_OR_CONNECT_TCP if version >= _NET_VERSION else 0)
    ruleset = linux.syscall(_LANDLOCK_CREATE_RULESET, rules, ctypes.sizeof(rules), 0)
    if ruleset >= 0:
        linux.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0)
        os.close(ruleset)
