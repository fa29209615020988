"""From decoded clips to the samples of a shard, and from samples to shards; pure but for the spectrogram."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from sharding.errors import MediaError
from sharding.folder import Reject
from sharding.format.index import sample_key
from sharding.format.shard_set import LabelSpace
from sharding.format.writer import ShardRange, StoredSample
from sharding.media.decode_child import EncodedClip, Rejected
from sharding.media.spectrogram import log_mel, no_spectrogram, npy_bytes
from sharding.settings import ConversionConfig
from sharding.source import SourceList, SourceSample

_TRAILER_BYTES = 10_240  # a tar ends with zeros up to a multiple of this


Outcome = StoredSample | Reject


def assemble(
    position: int, sample: SourceSample, clip: EncodedClip | Rejected, source: SourceList, config: ConversionConfig
) -> Outcome:
    """The stored sample of a decoded clip, or the reject it is."""
    if isinstance(clip, Rejected):
        return Reject(position=position, sample_id=sample.sample_id, reason=clip.reason, what=clip.what)
    try:
        mel = log_mel(clip.audio.pcm, config.audio) if clip.audio and clip.has_audio else no_spectrogram(config.audio)
    except MediaError as error:
        return Reject(position=position, sample_id=sample.sample_id, reason=error.reason, what=str(error))
    key = sample_key(sample.sample_id)
    record = sample_record(key, sample, clip, source.label_spaces, config)
    return StoredSample(
        key=key,
        labels=sample.labels,
        video=clip.video.mp4,
        mel=npy_bytes(mel),
        json=json.dumps(record, sort_keys=True, ensure_ascii=False).encode(),
        num_frames=len(clip.video.frame_ticks),
        duration_seconds=clip.duration_seconds,
        has_audio=clip.has_audio,
        mel_rows=len(mel),
        frame_data_offset=clip.video.frame_data_offset,
        frame_bytes=clip.video.frame_bytes,
        frame_ticks=clip.video.frame_ticks,
        notes=clip.notes,
    )


def sample_record(
    key: str, sample: SourceSample, clip: EncodedClip, spaces: tuple[LabelSpace, ...], config: ConversionConfig
) -> dict[str, Any]:
    """Contents of a sample's ``.json``."""
    record = {
        "key": key,
        "sample_id": sample.sample_id,
        "source": sample.path.name,
        "source_bytes": clip.source_bytes,
        "start_seconds": sample.start_seconds,
        "end_seconds": sample.end_seconds,
        "duration_seconds": clip.duration_seconds,
        "labels": {
            space.name: {"index": index, "name": space.classes[index]}
            for space, index in zip(spaces, sample.labels, strict=True)
        },
        "video": {
            "codec": config.codec,
            "width": clip.video.width,
            "height": clip.video.height,
            "num_frames": len(clip.video.frame_ticks),
            "source_codec": clip.source_codec,
            "source_width": clip.source_size[0],
            "source_height": clip.source_size[1],
            "source_frames_per_second": clip.source_frames_per_second,
        },
        "audio": _audio_record(clip, config),
    }
    said = {"changes": dict(clip.changes), "notes": list(clip.notes)}
    return record | {name: value for name, value in said.items() if value}


def _audio_record(clip: EncodedClip, config: ConversionConfig) -> dict[str, Any]:
    if clip.audio is None:
        return {"has_audio": False}
    return {
        "has_audio": clip.has_audio,
        "is_silent": clip.audio.is_silent,
        "sample_rate_hz": config.sample_rate_hz,
        "num_samples": len(clip.audio.pcm),
        "source_sample_rate_hz": clip.audio.source_rate_hz,
        "source_channels": clip.audio.source_channels,
    }


class ShardCutter:
    """Cuts a stream of outcomes into shards by size.

    A shard's range of sources ends right behind its last sample; rejects after it belong to the next shard, those at
    the very end to the last one. So the cuts depend on the outcomes alone, not on where a conversion was interrupted.
    """

    def __init__(self, outcomes: Iterator[tuple[int, Outcome]], *, first: int, end: int, shard_bytes: int) -> None:
        self._outcomes, self._last_end, self._room = outcomes, end, shard_bytes - _TRAILER_BYTES
        self._first = self._end = first
        self._rejects: list[Reject] = []
        self._before_next: list[Reject] = []
        self._next: tuple[int, StoredSample] | None = None
        self._advance()

    @property
    def has_samples(self) -> bool:
        """Whether at least one more sample is to be written."""
        return self._next is not None

    def samples(self) -> Iterator[StoredSample]:
        """The samples of the next shard; at least one when `has_samples`."""
        self._first, self._rejects = self._end, []
        num_bytes = 0
        while self._next is not None:
            position, sample = self._next
            if num_bytes and num_bytes + sample.tar_bytes > self._room:
                return
            num_bytes += sample.tar_bytes
            self._end = position + 1
            self._take_rejects()
            self._advance()
            yield sample
        self._end = self._last_end
        self._take_rejects()

    def covers(self) -> ShardRange:
        """What the shard last cut covers; call it when its samples are used up."""
        rejects: tuple[Mapping[str, Any], ...] = tuple(asdict(reject) for reject in self._rejects)
        return ShardRange(first=self._first, end=self._end, rejects=rejects)

    @property
    def depends_end(self) -> int:
        """Position behind the last source on which the shard last cut depends: the sample that no longer fitted."""
        return self._last_end if self._next is None else self._next[0] + 1

    @property
    def rejects_without_shard(self) -> list[Reject]:
        """Rejects behind the last sample that no shard has taken."""
        return list(self._before_next)

    def _take_rejects(self) -> None:
        self._rejects += self._before_next
        self._before_next = []

    def _advance(self) -> None:
        self._next = None
        for position, outcome in self._outcomes:
            if isinstance(outcome, StoredSample):
                self._next = (position, outcome)
                return
            self._before_next.append(outcome)
