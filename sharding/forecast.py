"""What a conversion will weigh: from the annotations and, where videos are there, from pieces of a few of them.

Annotations tell how many samples there are and, often, how long they last. What a second of them takes depends on the
codec and on what they show: of a few videos, spread over the list, three pieces are encoded as the conversion will
encode them, in children with the conversion's bounds. What is left is how much the others differ from these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import av

from sharding.format.index import MEMBERS
from sharding.media.claims import open_media, video_stream
from sharding.media.encode import ClipJob, encode_clip
from sharding.settings import ConversionConfig, expected_frames, untimed_seconds
from sharding.source import SourceList
from sharding.workers import DecodePool, Rejected

NUM_PROBED = 8
_LOOKED_AT = 8  # files that are looked for, for each that is probed
_NUM_PIECES, _PIECE_SECONDS = 3, 1.0
_MP4_BYTES = 900  # of a container around no frames
_BLOCK_BYTES = 512  # a member's header; half of one is its padding on average
_BESIDE_BYTES = 900 + 100 + 128  # of a sample: its JSON, its row of the index, the header of its spectrogram
_FRAME_BYTES = {True: 7, False: 1}  # of a frame's place, time and checksum in the index; of its time alone


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbedClip:
    """What pieces of one sample tell about it."""

    seconds: float
    """Of the whole sample."""
    num_frames: float
    """Stored frames of the whole sample."""
    video_bytes: float
    """Bytes of the whole sample's video."""
    has_audio: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a conversion is expected to write."""

    num_samples: int
    num_probed: int
    """Samples of which pieces were encoded; 0: from the annotations alone."""
    duration_seconds: float
    num_frames: int
    video_bytes: int
    mel_bytes: int
    other_bytes: int
    """Headers, JSON and indexes."""

    @property
    def total_bytes(self) -> int:
        """Everything."""
        return self.video_bytes + self.mel_bytes + self.other_bytes


def forecast_storage(source: SourceList, config: ConversionConfig, *, most: int = NUM_PROBED) -> Forecast:
    """Return what converting `source` will take; pieces of at most `most` of its videos are encoded.

    Samples whose file is not there, or cannot be decoded, are taken to be like the others.
    """
    looked_at = _spread(range(len(source.samples)), _LOOKED_AT * most)
    places = _spread([place for place in looked_at if source.samples[place].path.is_file()], most)
    if not places:
        return forecast_of(source, config, {})
    with DecodePool(
        probe_clip,
        num_workers=min(config.workers, len(places)),
        timeout_seconds=config.clip_timeout_seconds,
        memory_bytes=config.clip_memory_bytes,
    ) as pool:
        policy = "none" if config.audio_policy == "none" else "optional"  # a piece may be silent
        lenient = replace(config, audio_policy=policy)
        found = list(pool.map(lenient.job(source.samples[place]) for place in places))
    return forecast_of(
        source, config, {place: one for place, one in zip(places, found, strict=True) if not isinstance(one, Rejected)}
    )


def _spread(places: Sequence[int], most: int) -> Sequence[int]:
    return [places[number * len(places) // most] for number in range(most)] if len(places) > most else places


def forecast_of(source: SourceList, config: ConversionConfig, probed: Mapping[int, ProbedClip]) -> Forecast:
    """Return the forecast that follows from what was probed, by place in the list: samples not probed are like it."""
    known = list(probed.values())
    length = sum(one.seconds for one in known)
    each = length / len(known) if known else untimed_seconds(source, config)
    unknown = [one.seconds for place, one in enumerate(source.samples) if place not in probed]
    rest = sum(each if one is None else one for one in unknown)
    if not known:
        seconds = rest
        frames, video = map(float, expected_frames(seconds, config))
        heard = 0.0 if config.audio_policy == "none" else seconds
    else:
        scale = 1 + rest / max(length, 1e-9)
        seconds = scale * length
        frames, video = scale * sum(one.num_frames for one in known), scale * sum(one.video_bytes for one in known)
        heard = scale * sum(one.seconds for one in known if one.has_audio)
    mel = heard * 1000 / config.audio.frame_shift_ms * config.num_mel_bins * 2
    beside = len(MEMBERS) * 1.5 * _BLOCK_BYTES + _BESIDE_BYTES
    other = len(source.samples) * beside + frames * _FRAME_BYTES[config.stored_codec.has_frame_ranges]
    return Forecast(
        num_samples=len(source.samples),
        num_probed=len(known),
        duration_seconds=seconds,
        num_frames=round(frames),
        video_bytes=round(video),
        mel_bytes=round(mel),
        other_bytes=round(other),
    )


def probe_clip(job: ClipJob) -> ProbedClip:
    """Encode pieces of the job's segment, or all of a short one, and return what the whole will take.

    Raises:
        MediaError: as `encode_clip`.
    """
    start = job.start_seconds or 0.0
    length = _length(job, start)
    pieces = []  # all of it
    if length is not None and length > _NUM_PIECES * _PIECE_SECONDS:
        each = length / _NUM_PIECES
        firsts = [start + number * each + (each - _PIECE_SECONDS) / 2 for number in range(_NUM_PIECES)]
        pieces = [(round(first, 3), round(first + _PIECE_SECONDS, 3)) for first in firsts]
    clips = [
        encode_clip(replace(job, start_seconds=first, end_seconds=last, clock=job.clock_of_cut))
        for first, last in pieces
    ] or [encode_clip(job)]
    seconds = sum(clip.duration_seconds for clip in clips)
    share = 1.0 if length is None or not pieces else length / max(seconds, 1e-9)
    return ProbedClip(
        seconds=seconds * share,
        num_frames=share * sum(len(clip.video.frame_ticks) for clip in clips),
        video_bytes=share * sum(max(0, len(clip.video.mp4) - _MP4_BYTES) for clip in clips) + _MP4_BYTES,
        has_audio=any(clip.has_audio for clip in clips),
    )


def _length(job: ClipJob, start: float) -> float | None:
    """Return seconds of the segment that the file holds, as it claims; None where it claims nothing."""
    with open_media(job.path) as container:
        stream = video_stream(container, job.limits)
        if stream.duration is not None and stream.time_base is not None:
            claimed = float(stream.duration * stream.time_base)
        elif container.duration is not None:
            claimed = container.duration / av.time_base
        else:
            return None if job.end_seconds is None else job.end_seconds - start
    return max(0.0, min(claimed, claimed if job.end_seconds is None else job.end_seconds) - start)
