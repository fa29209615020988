"""Clips as pictures inside a page: stills over time and the spectrogram beneath, as data URIs."""

import base64
import io
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from ca2st.spec import MEL_ROW_SECONDS
from pipelines.decode.reference import decode_frames
from pipelines.rendering import JpegFrames, RenderRequest
from pipelines.storage.samples import FetchedSample, SampleReader
from ray_jobs.pages.charts import Tick, hertz_ticks, seconds_ticks
from sharding.format.index import TICKS_PER_SECOND
from sharding.format.shard_set import ShardSet

_FRAME_QUALITY = 88
_SILENT_GREY = 34


def frame_jpeg(frame: NDArray[np.uint8]) -> str:
    """Return a data URI of an RGB frame."""
    return data_uri(Image.fromarray(frame), "JPEG", quality=_FRAME_QUALITY)


def spectrogram_png(mel: NDArray[np.float32], num_heard_rows: int) -> str:
    """Return a data URI of [rows, bins] as a grey picture, time to the right, low frequencies at the bottom.

    Contrast is that of the sound alone; what is padding or silence is one dark grey.
    """
    grey = np.full(mel.shape, _SILENT_GREY, np.uint8)
    if num_heard_rows:
        heard = mel[:num_heard_rows]
        low, high = np.quantile(heard, (0.02, 0.998))
        grey[:num_heard_rows] = np.round(255 * np.clip((heard - low) / max(high - low, 1e-6), 0, 1))
    return data_uri(Image.fromarray(np.ascontiguousarray(grey.T[::-1])), "PNG")


def data_uri(image: Image.Image, kind: str, **options: int) -> str:
    """Return an image as the text of a data URI; `options` are those of Pillow's encoder."""
    sink = io.BytesIO()
    image.save(sink, kind, optimize=True, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(sink.getvalue()).decode()}"


NUM_STILLS = 8


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
    """One per label space of the manifest."""
    pictures: Pictures


def read_pictures(shard_set: ShardSet, keys: Sequence[str]) -> list[Pictures]:
    """Return the stills and the spectrogram of each named sample.

    Raises:
        DataDamageError: the shards are not what was written.
    """
    reader = SampleReader(shard_set)
    places = [(number, row) for number, shard in enumerate(shard_set.shards) for row in range(shard.num_samples)]
    place_of = dict(zip(reader.indexes.sample_ids(), places, strict=True))
    return [clip.pictures for clip in _read(reader, [place_of[key] for key in keys])]


def read_spread_clips(shard_set: ShardSet, *, most: int) -> list[StoredClip]:
    """Return up to `most` clips, evenly spread over the set in stored order; raises as `read_pictures`."""
    num_samples = shard_set.manifest.num_samples
    count = min(most, num_samples)
    ends = np.cumsum([shard.num_samples for shard in shard_set.shards])
    places = []
    for number in range(count):
        place = (2 * number + 1) * num_samples // (2 * count)
        shard = int(np.searchsorted(ends, place, side="right"))
        places.append((shard, place - int(ends[shard]) + shard_set.shards[shard].num_samples))
    return _read(SampleReader(shard_set), places)


def _read(reader: SampleReader, places: Sequence[tuple[int, int]]) -> list[StoredClip]:
    rate = reader.shard_set.manifest.audio.sample_rate_hz
    with closing(reader):
        clips = []
        for place in places:
            entry = reader.indexes.entry(*place)
            stills = tuple(int((still + 0.5) * entry.num_frames / NUM_STILLS) for still in range(NUM_STILLS))
            pictures = _pictures(reader.fetch(entry, stills), stills, sample_rate_hz=rate)
            clips.append(StoredClip(key=entry.key, labels=entry.labels, pictures=pictures))
        return clips


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
    """Return stored JPEGs as they are; frames of the other codecs decoded."""
    frames = sample.clip_frames(stills)
    if isinstance(frames, JpegFrames):
        return [f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" for data in frames.frames]
    decoded = decode_frames(RenderRequest(frames=frames, boxes=(), flip=False, where=sample.entry.where))
    return [frame_jpeg(frame) for frame in rearrange(decoded, "t c h w -> t h w c").numpy()]
