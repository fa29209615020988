"""Parameters of a conversion, its budget for rejects, and its plan: which sources go into which shard."""

import importlib.metadata
import platform
import re
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import av

from ca2st.errors import UserInputError, check_choice
from sharding.format.shard_set import AudioParameters, VideoParameters
from sharding.media.claims import MediaLimits
from sharding.media.codecs import DEFAULT_GOP_FRAMES, MOST_GOP_FRAMES, SIDE_MULTIPLE, StoredCodec, stored_codec
from sharding.media.encode import ClipJob
from sharding.media.picture import HDR_POLICIES, INTERLACED_POLICIES
from sharding.media.video import CLOCKS
from sharding.source import SourceList, SourceSample

AUDIO_POLICIES = {
    "required": "a segment without sound, or of digital silence, is a reject",
    "optional": "a segment without sound, or of digital silence, is kept, with an empty spectrogram",
    "none": "sound is not read at all",
}
TRAILER_BYTES = 10_240
"""A tar ends with zeros up to a multiple of this."""
LEAST_SHARD_BYTES = TRAILER_BYTES + 3 * 2 * 512
"""The smallest tar of a sample: three members, each a header and a block, and the end."""
_TOOLS = ("ca2st", "av", "numpy", "pyarrow", "torch", "torchaudio", "webdataset")
_SOURCE_FRAMES_PER_SECOND = 30.0
_UNKNOWN_SECONDS = 10.0
_BESIDE_BYTES = 4096
"""Of a sample in a tar: three headers, the JSON, padding."""
_PLAN_VERSION = 1
"""Of the rule of `plan_shards`; the same list is cut otherwise under another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectBudget:
    """How many samples may be rejected before a conversion fails: a count, or a share of the samples."""

    count: int = 0
    """Rejects that are accepted; 0, since a silent loss is worse than a stop."""
    fraction: float | None = None
    """Accepted share of all samples, 0..1; if given, it is used instead of `count`."""

    def __post_init__(self) -> None:
        if self.count < 0 or (self.fraction is not None and not 0 <= self.fraction <= 1):
            raise UserInputError(f"max rejects: expected a count >= 0 or a share of 0% to 100%, found {self}")

    @classmethod
    def parse(cls, text: str, *, option: str = "--max-rejects") -> "RejectBudget":
        """Read ``N`` or ``P%``; `option` names what it was given for.

        Raises:
            UserInputError: neither.
        """
        if re.fullmatch(r"\d{1,18}", text):
            return cls(count=int(text))
        if re.fullmatch(r"\d+(\.\d+)?%", text) and float(text[:-1]) <= 100:
            return cls(fraction=float(text[:-1]) / 100)
        raise UserInputError(f"{option}: expected a count such as 20 or a share (to 100%) such as 5%, found {text!r}")

    def allows(self, rejected: int, total: int) -> bool:
        """Return whether `rejected` of `total` samples stay within the budget."""
        return rejected <= (self.count if self.fraction is None else self.fraction * total)

    def __str__(self) -> str:
        return str(self.count) if self.fraction is None else f"{100 * self.fraction:g}%"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionConfig:
    """How sources become shards."""

    codec: str = "mjpeg"
    """Stored video codec, a name of `sharding.media.codecs.STORED_CODECS`; mjpeg is read by byte ranges anywhere."""
    short_side: int = 256
    """Most pixels of the shorter side, even; sources that are smaller keep their size. 256 serves crops of 224."""
    side_multiple: int | None = SIDE_MULTIPLE
    """Both sides are the multiples of this nearest to the source's shape; None: even sides, as in older sets."""
    quality: int | None = None
    """On the codec's scale, lower is better; None: its default, mjpeg 5 (visually clean), h264 20, hevc 23, vp9 30."""
    num_gop_frames: int = DEFAULT_GOP_FRAMES
    """Frames from one key frame to the next; mjpeg has none but key frames and ignores it."""
    frames_per_second: float | None = None
    """Keep at most this many frames per second, by time; None keeps every frame."""
    hdr: str = "tone-map"
    """A name of HDR_POLICIES; sources of a high dynamic range look pale and dark when they are stored as they are."""
    interlaced: str = "deinterlace"
    """A name of INTERLACED_POLICIES; fields a moment apart make combs that no progressive source has."""
    shard_bytes: int = 1_000_000_000
    """Bytes that a shard is planned to have (see `plan_shards`); its content decides how close it comes."""
    clip_seconds: float | None = None
    """What samples without times are taken to last when shards are planned; None: as long as the others on average, or
    10 s."""
    workers: int = 1
    """Decode children; the bytes written do not depend on it."""
    audio_policy: str = "required"
    """A name of AUDIO_POLICIES."""
    sample_rate_hz: int = 16_000
    """Rate the sound is resampled to; 16 000 as in the audio expert's pre-training, 24 000 in the EPIC recipes."""
    num_mel_bins: int = 128
    """Mel bins of the spectrogram; the audio expert's patch grid expects 128."""
    clock: str = "file"
    """Where the seconds of annotations count from, a name of `sharding.media.video.CLOCKS`."""
    max_rejects: RejectBudget = field(default_factory=RejectBudget)
    """More rejects than this and no manifest is written."""
    strict: bool = False
    """Refuse notes that question the data (see `sharding.source`): no manifest is written."""
    update: bool = False
    """Convert again what changed since a set was finished; otherwise such a set is refused and stays as it is."""
    append: bool = False
    """Add the list to a finished set: new shards, and a new manifest over old and new ones."""
    clip_timeout_seconds: float = 300.0
    """Wall time for one clip before it counts as a ``timeout`` reject."""
    clip_memory_bytes: int = 4 * 2**30
    """Address space a decode child may add to its own."""
    limits: MediaLimits = field(default_factory=MediaLimits)
    """What one source may cost."""

    def __post_init__(self) -> None:
        stored_codec(self.codec).check_quality(self.video.quality)
        check_choice("audio policy", self.audio_policy, AUDIO_POLICIES)
        check_choice("clock", self.clock, CLOCKS)
        check_choice("hdr", self.hdr, HDR_POLICIES)
        check_choice("interlaced", self.interlaced, INTERLACED_POLICIES)
        if not 1 <= self.num_gop_frames <= MOST_GOP_FRAMES:
            raise UserInputError(f"num_gop_frames: expected 1 to {MOST_GOP_FRAMES}, found {self.num_gop_frames}")
        if self.short_side < 16 or self.short_side % 2:
            raise UserInputError(f"short_side: expected an even number of at least 16 pixels, found {self.short_side}")
        if self.frames_per_second is not None and not 0 < self.frames_per_second <= 1000:
            raise UserInputError(f"frames_per_second: expected a rate above 0, found {self.frames_per_second}")
        if self.append and self.update:
            raise UserInputError("append, update: expected one of them at a time, found both; a set is updated first")
        if self.clip_seconds is not None and not 0 < self.clip_seconds <= 1e6:
            raise UserInputError(f"clip_seconds: expected seconds above 0, found {self.clip_seconds}")
        if not 4000 <= self.sample_rate_hz <= 192_000:
            raise UserInputError(f"sample_rate_hz: expected 4000 to 192000, found {self.sample_rate_hz}")
        if self.shard_bytes < LEAST_SHARD_BYTES:
            raise UserInputError(
                f"shard_bytes: expected at least {LEAST_SHARD_BYTES}, the size of a tar of one sample, found "
                f"{self.shard_bytes}"
            )
        for name in ("workers", "num_mel_bins", "clip_timeout_seconds", "clip_memory_bytes"):
            if getattr(self, name) <= 0:
                raise UserInputError(f"{name}: expected more than 0, found {getattr(self, name)}")

    @property
    def stored_codec(self) -> StoredCodec:
        """The facts of `codec`."""
        return stored_codec(self.codec)

    @property
    def video(self) -> VideoParameters:
        """What the manifest says about the video."""
        codec = self.stored_codec
        alone = codec.has_frame_ranges
        return VideoParameters(
            codec=codec.name,
            short_side=self.short_side,
            side_multiple=self.side_multiple,
            quality=codec.default_quality if self.quality is None else self.quality,
            frames_per_second=self.frames_per_second,
            num_gop_frames=None if alone else self.num_gop_frames,
            pixel_format=None if alone else codec.pixel_format,
            colour=None if alone else codec.colour,
            hdr=self.hdr,
            interlaced=self.interlaced,
        )

    @property
    def audio(self) -> AudioParameters:
        """What the manifest says about the sound."""
        return AudioParameters(
            policy=self.audio_policy, sample_rate_hz=self.sample_rate_hz, num_mel_bins=self.num_mel_bins
        )

    def job(self, sample: SourceSample) -> ClipJob:
        """Return the decode child's part of converting `sample`."""
        return ClipJob(
            path=sample.path.absolute(),  # a decode worker may run in another folder
            start_seconds=sample.start_seconds,
            end_seconds=sample.end_seconds,
            video=self.video,
            audio=self.audio,
            limits=self.limits,
            clock=self.clock,
            sound_path=sample.sound_path.absolute() if sample.sound_path and self.audio_policy != "none" else None,
        )


def tool_versions() -> dict[str, str]:
    """Return versions of everything that decides the bytes of a shard."""
    versions = {name: importlib.metadata.version(name) for name in _TOOLS}
    for library in ("libavcodec", "libavformat", "libswscale", "libswresample"):
        versions[library] = ".".join(str(part) for part in av.library_versions[library])
    return versions | {"machine": platform.machine()}


def conversion_identity(source: SourceList, config: ConversionConfig) -> dict[str, Any]:
    """Return everything that must be equal for shards of two runs to belong to one set."""
    return {
        "dataset": source.dataset,
        "split": source.split,
        "source_list_sha256": source.sha256,
        "video": config.video.as_json(),
        "audio": asdict(config.audio),
        "shard_bytes": config.shard_bytes,
        "shard_plan": {"version": _PLAN_VERSION, "clip_seconds": config.clip_seconds},
        "limits": asdict(config.limits),
        "tool_versions": tool_versions(),
        "clock": config.clock,
    }


def untimed_seconds(source: SourceList, config: ConversionConfig) -> float:
    """Return what a sample without times is taken to last."""
    num_timed, total = 0, 0.0  # added one by one: `sum` rounds otherwise, and plans must stay as they are
    for sample in source.samples:
        if sample.seconds is not None:
            num_timed += 1
            total += sample.seconds
    return config.clip_seconds or (total / num_timed if num_timed else _UNKNOWN_SECONDS)


def expected_frames(seconds: float, config: ConversionConfig) -> tuple[int, int]:
    """Return number and bytes of the frames of so many seconds of ordinary content, 30 source frames in each."""
    rate = min(config.frames_per_second or _SOURCE_FRAMES_PER_SECOND, _SOURCE_FRAMES_PER_SECOND)
    num_frames = round(seconds * rate)
    each = config.stored_codec.expected_frame_bytes(config.short_side, config.video.quality)
    return num_frames, round(num_frames * each)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlan:
    """Which sources go into which shard."""

    starts: Sequence[int]
    """Position of every shard's first source."""
    num_sources: int
    num_bytes: float
    """Forecast of all shards."""

    def __len__(self) -> int:
        return len(self.starts)

    def range(self, place: int) -> range:
        """Return positions of the sources of the shard at that place; none behind the last one."""
        if place >= len(self.starts):
            return range(0)
        return range(*(*self.starts[place : place + 2], self.num_sources)[:2])


def plan_shards(source: SourceList, config: ConversionConfig) -> ShardPlan:
    """Cut the list into shards; the same list and parameters give the same plan.

    Each sample's bytes are forecast from its annotated times, and a shard ends before it is expected to grow beyond
    `config.shard_bytes`. Nothing that a worker finds out changes the plan: so every shard can be made by itself, and a
    rejected source leaves its shard smaller.
    """
    untimed: float | None = None  # found when it is needed: it takes a pass over the list
    mel_bytes = 0 if config.audio_policy == "none" else 100_000 * config.num_mel_bins * 2
    bytes_per_second = (expected_frames(1000.0, config)[1] + mel_bytes) / 1000
    room = config.shard_bytes - TRAILER_BYTES
    starts, filled, total = array("q"), 0.0, 0.0
    for position, sample in enumerate(source.samples):
        if (seconds := sample.seconds) is None:
            if untimed is None:
                untimed = untimed_seconds(source, config)
            seconds = untimed
        num_bytes = _BESIDE_BYTES + seconds * bytes_per_second
        if not starts or filled + num_bytes > room:
            starts.append(position)
            total += filled
            filled = 0.0
        filled += num_bytes
    return ShardPlan(starts=starts, num_sources=len(source.samples), num_bytes=total + filled)
