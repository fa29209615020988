"""Stored clips as a page shows them: stills over time and the sound beneath."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from einops import rearrange

from ca2st.spec import MEL_ROW_SECONDS
from pipelines.fetch import ByteFetcher, FetchedSample
from pipelines.reference import decode_frames
from pipelines.rendering import JpegFrames, RenderRequest
from pipelines.shard_files import ShardFiles
from pipelines.shard_index import SampleEntry, ShardIndexCache
from pipelines.shard_store import open_store
from pipelines.stats import StatsRecorder
from ray_jobs.pages.axes import Tick, hertz_ticks, seconds_ticks
from ray_jobs.pages.pictures import frame_jpeg, spectrogram_png
from sharding.index import TICKS_PER_SECOND
from sharding.shard_set import ShardSet

NUM_STILLS = 8
_INDEX_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """What of a stored clip is shown."""

    stills: list[str]
    """Data URIs, in order."""
    still_seconds: list[float]
    spectrogram: str
    """Data URI, time to the right, low frequencies at the bottom."""
    has_audio: bool
    seconds: list[Tick]
    hertz: list[Tick]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredClip:
    """A clip with its key and labels."""

    key: str
    labels: tuple[int, ...]
    """One a label space of the manifest."""
    pictures: Pictures


def read_pictures(shard_set: ShardSet, keys: Sequence[str]) -> list[Pictures]:
    """The stills and the spectrogram of each named sample.

    Raises:
        DataDamageError: the shards are not what was written.
    """
    indexes = _indexes(shard_set)
    places = [(number, row) for number, shard in enumerate(shard_set.shards) for row in range(shard.num_samples)]
    place_of = dict(zip(indexes.sample_ids(), places, strict=True))
    return [clip.pictures for clip in _read(shard_set, [indexes.entry(*place_of[key]) for key in keys])]


def read_spread_clips(shard_set: ShardSet, *, most: int) -> list[StoredClip]:
    """Up to `most` clips, evenly spread over the set in stored order; raises as `read_pictures`."""
    num_samples = shard_set.manifest.num_samples
    count = min(most, num_samples)
    ends = np.cumsum([shard.num_samples for shard in shard_set.shards])
    indexes, entries = _indexes(shard_set), []
    for number in range(count):
        place = (2 * number + 1) * num_samples // (2 * count)
        shard = int(np.searchsorted(ends, place, side="right"))
        entries.append(indexes.entry(shard, place - int(ends[shard]) + shard_set.shards[shard].num_samples))
    return _read(shard_set, entries)


def _indexes(shard_set: ShardSet) -> ShardIndexCache:
    return ShardIndexCache(shard_set, most_bytes=_INDEX_BYTES, store=open_store(shard_set))


def _read(shard_set: ShardSet, entries: Sequence[SampleEntry]) -> list[StoredClip]:
    audio, files = shard_set.manifest.audio, ShardFiles(shard_set)
    fetcher = ByteFetcher(files, StatsRecorder(), num_mel_bins=audio.num_mel_bins)
    try:
        clips = []
        for entry in entries:
            stills = tuple(int((still + 0.5) * entry.num_frames / NUM_STILLS) for still in range(NUM_STILLS))
            pictures = _pictures(fetcher.fetch(entry, stills), stills, sample_rate_hz=audio.sample_rate_hz)
            clips.append(StoredClip(key=entry.key, labels=entry.labels, pictures=pictures))
        return clips
    finally:
        files.close()


def _pictures(sample: FetchedSample, stills: tuple[int, ...], *, sample_rate_hz: int) -> Pictures:
    mel = sample.mel.astype(np.float32)
    seconds = max(len(mel) * MEL_ROW_SECONDS, float(sample.entry.frame_ticks[-1]) / TICKS_PER_SECOND, MEL_ROW_SECONDS)
    shown = mel if len(mel) else np.zeros((1, 1), np.float32)
    return Pictures(
        stills=_stills(sample, stills),
        still_seconds=[float(sample.entry.frame_ticks[still]) / TICKS_PER_SECOND for still in stills],
        spectrogram=spectrogram_png(shown, len(mel)),
        has_audio=sample.entry.has_audio,
        seconds=seconds_ticks(0.0, len(mel) * MEL_ROW_SECONDS if len(mel) else seconds),
        hertz=hertz_ticks(sample_rate_hz),
    )


def _stills(sample: FetchedSample, stills: tuple[int, ...]) -> list[str]:
    """Stored JPEGs as they are; frames of the other codecs decoded."""
    frames = sample.clip_frames(stills)
    if isinstance(frames, JpegFrames):
        return [f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" for data in frames.frames]
    decoded = decode_frames(RenderRequest(frames=frames, boxes=(), flip=False, where=sample.entry.where))
    return [frame_jpeg(frame) for frame in rearrange(decoded, "t c h w -> t h w c").numpy()]
