"""Turn one source segment into a stored clip: decode it, encode its frames as JPEGs or short groups of pictures.

``mjpeg``: every frame a whole JPEG at a known place, in full range. H.264, HEVC and VP9: limited range, tagged; short
closed groups of pictures for decoders that want a video and not single frames. Every group starts with a key frame at
a regular place and needs no other group: no open groups, no scene cuts of the encoder's choice. No B-frames: frame i is
packet i, and decoding order is display order.

The bytes depend on the frames and their times alone: one thread, no look-ahead (libx264 with it gives other bytes now
and then), a quality instead of a bit rate, bitexact encoder, muxer and scaler.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
from av.audio.stream import AudioStream
from av.codec.context import Flags
from av.video.stream import VideoStream

from sharding.errors import MediaError
from sharding.format.index import TICKS_PER_SECOND
from sharding.format.shard_set import AudioParameters, VideoParameters
from sharding.media import claims
from sharding.media.audio import EncodedAudio, cut_audio
from sharding.media.codecs import stored_codec
from sharding.media.picture import FULL_RANGE, LIMITED_RANGE, PictureMaker, pixel_aspect_of
from sharding.media.video import Segment, TimedFrame, VideoCut, clock_zero, file_start, thinned
from sharding.source import SILENT_SOUND

_TICK = Fraction(1, TICKS_PER_SECOND)
_TRACKS = {"video_track": "pictures", "audio_track": "sound tracks"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipJob:
    """What to cut out of which file, and how to store it."""

    path: Path
    start_seconds: float | None
    end_seconds: float | None
    video: VideoParameters
    audio: AudioParameters
    limits: claims.MediaLimits
    clock: str = "file"
    """Where the seconds count from, a name of `sharding.media.video.CLOCKS`."""
    sound_path: Path | None = None
    """A file of its own for the sound; None: that of `path`."""

    @property
    def clock_of_cut(self) -> str:
        """The clock, or that of a whole file, which starts at its first frame."""
        return "first-frame" if self.start_seconds is None and self.end_seconds is None else self.clock


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedVideo:
    """A clip as it is stored, with the place of every frame inside it."""

    mp4: bytes
    width: int
    height: int
    frame_data_offset: int
    """Where the first frame's bytes start, the others following without a gap; 0 where frames have no bytes of their
    own."""
    frame_bytes: tuple[int, ...]
    """Bytes of every frame; empty where frames depend on others."""
    frame_ticks: tuple[int, ...]
    """Presentation times in ticks from the segment's start; increasing, >= 0."""


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
    sound_bytes: int | None = None
    """Of the file that the sound has of its own; None: it is the video's."""

    @property
    def has_audio(self) -> bool:
        """Whether there is something to hear; digital silence counts as no sound."""
        return self.audio is not None and not self.audio.is_silent


def encode_clip(job: ClipJob) -> EncodedClip:
    """Decode the job's segment completely and strictly, and encode it.

    Raises:
        MediaError: for every `RejectReason` that a file can give.
    """
    before, sound_before = _state_to_begin(job.path, job.limits), None
    if job.sound_path is not None:
        with _naming_sound(job.sound_path):
            sound_before = _state_to_begin(job.sound_path, job.limits)
    try:
        clip = _encoded(job, before.num_bytes, None if sound_before is None else sound_before.num_bytes)
    except MediaError as error:
        if error.reason == "decode_error":
            claims.check_no_zeros_at_end(job.path)  # the better reason
        raise
    claims.check_unchanged(job.path, before)
    if job.sound_path is not None and sound_before is not None:
        with _naming_sound(job.sound_path):
            claims.check_unchanged(job.sound_path, sound_before)
    return clip


def _state_to_begin(path: Path, limits: claims.MediaLimits) -> claims.SourceState:
    """Return the state of a file that may be decoded."""
    state = claims.source_state(path)
    if state.num_bytes == 0:
        raise MediaError("empty_file", "expected a video or sound, found 0 bytes; fetch the file again")
    if state.num_bytes > limits.max_file_bytes:
        raise MediaError("too_large", f"expected at most {limits.max_file_bytes} bytes, found {state.num_bytes}")
    claims.check_container_is_whole(path)
    return state


@contextlib.contextmanager
def _naming_sound(path: Path) -> Iterator[None]:
    """Say of a file of its own for the sound what is wrong with it."""
    try:
        yield
    except MediaError as error:
        raise MediaError(error.reason, f"the sound's own file {path.name}: {error}") from error


def _encoded(job: ClipJob, source_bytes: int, sound_bytes: int | None) -> EncodedClip:
    segment = Segment.of(job.start_seconds, job.end_seconds)
    with claims.open_media(job.path) as container:
        stream = claims.video_stream(container, job.limits)
        source_size = stream.width, stream.height  # later ones may differ
        cut = VideoCut(container, stream, segment, limits=job.limits, clock=job.clock_of_cut)
        pictures = PictureMaker(job.video, pixel_aspect=pixel_aspect_of(stream))
        encoder = ClipEncoder(job.video, pictures)
        for frame in thinned(pictures.prepared(cut.frames()), job.video.frames_per_second):
            encoder.add(frame)
        claims.check_chunks(job.path, stream, segment.start, segment.end)
        if job.sound_path is not None:
            behind_start = cut.zero - clock_zero(container, cut.zero, "file")
            with _naming_sound(job.sound_path):
                audio, tracks = _sound_of_its_own(job, job.sound_path, segment, cut, behind_start=behind_start)
        else:
            candidates = [] if job.audio.policy == "none" else claims.audio_candidates(container, stream)
            audio, tracks = _audio(job, segment, cut, [one.index for one in candidates], zero=cut.zero)
        tracks |= _of_several(stream, claims.moving_pictures(container))
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
            sound_bytes=sound_bytes,
        )


def _sound_of_its_own(
    job: ClipJob, path: Path, segment: Segment, cut: VideoCut, *, behind_start: Fraction
) -> tuple[EncodedAudio | None, dict[str, Any]]:
    """As `_audio`, of another file; the media clock's zero lies `behind_start` seconds behind the start of both."""
    with claims.open_media(path, is_sound=True) as container:
        zero = (file_start(container) or Fraction(0)) + behind_start
        candidates = [one.index for one in claims.audio_candidates(container, None)]
    audio, tracks = _audio(job, segment, cut, candidates, zero=zero)
    if audio is None or "sound ends early" in audio.notes:
        claims.check_sound_is_whole(path)
    return audio, tracks


def _audio(
    job: ClipJob, segment: Segment, cut: VideoCut, candidates: Sequence[int], *, zero: Fraction
) -> tuple[EncodedAudio | None, dict[str, Any]]:
    """Return the first sound track that is not silent in the segment, and which one it is where there is a choice.

    `candidates` are places of streams in the file of the sound, `zero` of the media's clock in it.
    """
    audio, tracks = None, dict[str, Any]()
    for candidate in candidates:
        with claims.open_media(job.sound_path or job.path, is_sound=job.sound_path is not None) as container:
            stream = cast(AudioStream, container.streams[candidate])
            claims.be_strict(stream)
            heard = cut_audio(
                container,
                stream,
                segment,
                zero=zero,
                duration=cut.duration,
                rate_hz=job.audio.sample_rate_hz,
                limits=job.limits,
            )
            if candidate == candidates[0] or (heard is not None and (audio is None or not heard.is_silent)):
                audio, tracks = heard, _of_several(stream, container.streams.audio)
        if audio is not None and not audio.is_silent:
            break
    if job.audio.policy == "required" and (audio is None or audio.is_silent):
        none = "an audio stream without samples there" if candidates else "no audio stream"
        found = "digital silence" if audio else none
        raise MediaError("no_audio", f"expected sound in the segment, found {found}; --audio optional accepts it")
    return audio, tracks


def _of_several(stream: VideoStream | AudioStream, tracks: Sequence[object]) -> dict[str, Any]:
    """Return which track was taken where a file has several of a kind: its index in the container and its language."""
    if len(tracks) < 2:
        return {}
    language = {"language": stream.language} if stream.language else {}
    return {f"{stream.type}_track": {"index": stream.index, "of": len(tracks)} | language}


def _notes(audio: EncodedAudio | None, tracks: Mapping[str, Any]) -> tuple[str, ...]:
    of_audio = () if audio is None else (SILENT_SOUND,) if audio.is_silent else audio.notes
    return (*of_audio, *(f"one of several {_TRACKS[kind]}" for kind in tracks))


_COLOUR_BT709 = 1  # primaries and transfer, which no conversion here changes; the matrix is LIMITED_RANGE's
_KEY_FRAMES = "keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0:bframes=0"
_X264 = "threads=1:lookahead-threads=1:sliced-threads=0:sync-lookahead=0:rc-lookahead=0:mbtree=0"
_X265 = "pools=none:frame-threads=1:wpp=0:lookahead-slices=0:rc-lookahead=0:cutree=0:info=0:log-level=none"

GOP_ENCODINGS: dict[str, tuple[str, Mapping[str, str]]] = {
    "h264": ("libx264", {"preset": "medium", "crf": "{quality}", "x264-params": f"{_KEY_FRAMES}:{_X264}"}),
    "hevc": ("libx265", {"preset": "fast", "crf": "{quality}", "x265-params": f"{_KEY_FRAMES}:{_X265}"}),
    "vp9": (
        "libvpx-vp9",
        {
            "crf": "{quality}",
            "b": "0",
            "g": "{gop}",
            "keyint_min": "{gop}",
            "deadline": "good",
            "cpu-used": "4",
            "row-mt": "0",
            "tile-columns": "0",
            "lag-in-frames": "0",
            "auto-alt-ref": "0",
        },
    ),
}
"""FFmpeg's encoder of a codec of ours, and its options, in which `{gop}` and `{quality}` are filled in."""
_MJPEG = ("mjpeg", {"qmin": "{quality}", "qmax": "{quality}"})


class ClipEncoder:
    """Takes a clip's frames in order, made ready by `pictures`, and gives its stored form."""

    def __init__(self, video: VideoParameters, pictures: PictureMaker) -> None:
        self._codec, self._pictures = stored_codec(video.codec), pictures
        self._gop = 1 if self._codec.has_frame_ranges or video.num_gop_frames is None else video.num_gop_frames
        self._form = FULL_RANGE if self._codec.has_frame_ranges else LIMITED_RANGE
        self._encoder, options = GOP_ENCODINGS.get(video.codec, _MJPEG)
        self._options = {name: value.format(gop=self._gop, quality=video.quality) for name, value in options.items()}
        self._stream: av.VideoStream | None = None
        self._ticks: list[int] = []
        self._durations: list[int] = []
        self._packets: list[bytes] = []
        self._sink = io.BytesIO()
        ticks = str(TICKS_PER_SECOND)  # of the movie too: a first frame behind the start is kept to the tick
        settings = {"fflags": "+bitexact", "movie_timescale": ticks, "video_track_timescale": ticks}
        self._container = av.open(self._sink, "w", format="mp4", options=settings)

    def add(self, frame: TimedFrame) -> None:
        """Make the frame ready and encode it.

        Raises:
            MediaError: ``bad_timestamps`` when it is not behind the last one; ``too_small``.
        """
        picture = self._pictures.upright(frame)
        if not self._codec.has_frame_ranges:  # without what else a source's frame carries: its type forces key frames
            picture = av.VideoFrame.from_ndarray(picture.to_ndarray(), format=self._form.pixel_format)
            picture.color_range, picture.colorspace = self._form.colour_range, self._form.colour_space
        tick = round(frame.seconds * TICKS_PER_SECOND)
        if self._ticks and tick <= self._ticks[-1]:
            raise MediaError("bad_timestamps", f"expected frames at least a tick apart, found two at {tick}")
        picture.pts, picture.time_base = tick, _TICK
        self._ticks.append(tick)
        self._durations.append(max(1, round(frame.duration * TICKS_PER_SECOND)))
        if self._stream is None:
            self._stream = self._open_stream(picture)
        self._write(self._stream.encode(picture))

    def finish(self) -> EncodedVideo:
        """Close the MP4 and give everything; no more frames after this.

        Raises:
            MediaError: ``decode_error`` when there was no frame.
        """
        if self._stream is None:
            raise MediaError("decode_error", "expected at least one frame, found none")
        self._write(self._stream.encode(None))
        if len(self._packets) != len(self._ticks):
            raise RuntimeError("the encoder did not give a packet per frame; this FFmpeg cannot be used")
        self._container.close()
        mp4, offset = self._sink.getvalue(), 0
        frame_bytes: tuple[int, ...] = ()
        if self._codec.has_frame_ranges:
            offset, frames = mp4.find(self._packets[0]), b"".join(self._packets)
            if mp4[offset : offset + len(frames)] != frames:
                raise RuntimeError("the muxer did not write the frames' packets together; this FFmpeg cannot be used")
            frame_bytes = tuple(map(len, self._packets))
        return EncodedVideo(
            mp4=mp4,
            width=self._stream.width,
            height=self._stream.height,
            frame_data_offset=offset,
            frame_bytes=frame_bytes,
            frame_ticks=tuple(self._ticks),
        )

    def _write(self, packets: "list[av.Packet[av.VideoStream]]") -> None:
        """Write packets in the order of the frames; frame i must be packet i."""
        for packet in packets:
            number = len(self._packets)
            if packet.pts != packet.dts or packet.pts != self._ticks[number]:
                raise RuntimeError(f"packet {number} is not frame {number}; this FFmpeg cannot be used")
            if packet.is_keyframe != (number % self._gop == 0):
                raise RuntimeError(
                    f"frame {number}: expected a key frame every {self._gop} frames and nowhere else; this FFmpeg's "
                    f"{self._encoder} cannot be used"
                )
            packet.duration = self._durations[number]
            self._packets.append(bytes(packet))
            self._container.mux(packet)

    def _open_stream(self, picture: av.VideoFrame) -> av.VideoStream:
        codec, form = self._codec, self._form
        if min(picture.width, picture.height) < codec.smallest_side:
            raise MediaError(
                "too_small",
                f"expected at least {codec.smallest_side} pixels per side for {codec.name}, found "
                f"{picture.width}x{picture.height}",
            )
        stream = cast(av.VideoStream, self._container.add_stream(self._encoder, rate=30, options=self._options))
        context = stream.codec_context
        stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, form.pixel_format
        stream.time_base = context.time_base = _TICK
        context.thread_count = 1
        context.flags |= Flags.bitexact
        context.color_range, context.colorspace = form.colour_range, form.colour_space
        if not codec.has_frame_ranges:
            context.gop_size, context.max_b_frames = self._gop, 0
            context.color_primaries = context.color_trc = _COLOUR_BT709
        return stream
