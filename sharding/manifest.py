"""The manifest of a shard set (format v1): what the set holds and the hashes that prove it.

``manifest.json`` is written last and names ``shards.parquet`` by hash, which names every shard and index by hash:
one file vouches for every byte. Trainers take the manifest, never a glob.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ca2st.durable import NO_FAULTS, FaultPoints, write_bytes
from sharding.errors import ManifestError, ShardDamageError
from sharding.parquet import read_parquet

FORMAT_NAME = "ca2st-shards"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SHARDS_NAME = "shards.parquet"

_SHARDS_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("index_bytes", pa.int64()),
        ("index_sha256", pa.string()),
        ("num_samples", pa.int64()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelSpace:
    """A named, ordered list of classes; a label is an index into it."""

    name: str
    """What is labelled: ``label``, ``verb``, ``noun``, ``space``, ..."""
    classes: tuple[str, ...]
    """Class names in label order."""

    @property
    def sha256(self) -> str:
        """Hash of the class names in order."""
        return sha256_of_json(list(self.classes))


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioParameters:
    """How the spectrograms of a set were made."""

    policy: str
    """``required``, ``optional`` or ``none``."""
    sample_rate_hz: int = 16_000
    """Rate the audio was resampled to, once, before the filter bank."""
    num_mel_bins: int = 128
    """Mel bins of a row."""
    frame_length_ms: float = 25.0
    """Length of the Hann window."""
    frame_shift_ms: float = 10.0
    """Time between rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoParameters:
    """How the videos of a set were encoded."""

    codec: str = "mjpeg"
    """``mjpeg``: every frame a JPEG, readable by byte ranges."""
    short_side: int = 256
    """Pixels of the shorter side; smaller sources keep their size."""
    quality: int = 5
    """MJPEG quantiser scale, 2 (best) to 31."""
    frames_per_second: float | None = None
    """Thinned to this rate, or None: every frame of the source."""


def index_name(shard: str) -> str:
    """File name of the index of the shard with this file name."""
    return shard.removesuffix(".tar") + ".index.parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One shard and its index, as named in ``shards.parquet``."""

    name: str
    """File name of the tar, ``ca2st-000000.tar``."""
    bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str
    num_samples: int

    @property
    def index_name(self) -> str:
        """File name of the shard's index."""
        return index_name(self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Contents of ``manifest.json``."""

    dataset: str
    split: str
    label_spaces: tuple[LabelSpace, ...]
    """Every label space the samples carry, in the order of the index's ``labels``."""
    targets: tuple[str, ...]
    """Names of the label spaces a training reads unless its recipe names others."""
    audio: AudioParameters
    video: VideoParameters
    tool_versions: Mapping[str, str]
    source_list_sha256: str
    """Hash of the sources in order: ids, times, labels."""
    rejected: Mapping[str, int]
    """Rejected samples by reason."""
    num_samples: int
    num_shards: int
    shards_sha256: str
    """Hash of ``shards.parquet``."""

    @property
    def fingerprint(self) -> str:
        """Hash that stands for every byte of the set: the manifest's own `self_sha256`."""
        return sha256_of_json(self._payload())

    def label_space(self, name: str) -> LabelSpace:
        """The label space of that name.

        Raises:
            ManifestError: the set has none of that name; the message lists those it has.
        """
        for space in self.label_spaces:
            if space.name == name:
                return space
        known = ", ".join(space.name for space in self.label_spaces)
        raise ManifestError(f"label space {name!r}: not in this set; it has {known}")

    def _payload(self) -> dict[str, Any]:
        payload = asdict(self)
        payload["format"], payload["format_version"] = FORMAT_NAME, FORMAT_VERSION
        payload["label_spaces"] = [asdict(space) | {"sha256": space.sha256} for space in self.label_spaces]
        payload["audio_sha256"] = sha256_of_json(asdict(self.audio))
        payload["video_sha256"] = sha256_of_json(asdict(self.video))
        return payload

    def to_json(self) -> bytes:
        """Indented JSON with `self_sha256` over the canonical JSON of everything else."""
        payload = self._payload() | {"self_sha256": self.fingerprint}
        return (json.dumps(payload, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSet:
    """A manifest with its shards, read from a folder."""

    root: Path
    manifest: Manifest
    shards: tuple[ShardEntry, ...]


def sha256_of_json(value: object) -> str:
    """Hash of the canonical JSON of `value`: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_shard_set(
    root: Path, manifest_fields: Mapping[str, Any], shards: tuple[ShardEntry, ...], *, faults: FaultPoints = NO_FAULTS
) -> Manifest:
    """Write ``shards.parquet`` and then, last, ``manifest.json``.

    `manifest_fields` are Manifest's fields except `num_samples`, `num_shards` and `shards_sha256`, which follow
    from `shards`.
    """
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(shard) for shard in shards], schema=_SHARDS_SCHEMA), sink)
    data = sink.getvalue()
    manifest = Manifest(
        **manifest_fields,
        num_samples=sum(shard.num_samples for shard in shards),
        num_shards=len(shards),
        shards_sha256=hashlib.sha256(data).hexdigest(),
    )
    write_bytes(root / SHARDS_NAME, data, faults=faults, point="shards_table")
    write_bytes(root / MANIFEST_NAME, manifest.to_json(), faults=faults, point="manifest")
    return manifest


def read_shard_set(root: Path) -> ShardSet:
    """Read and check ``manifest.json`` and ``shards.parquet``; shards themselves are not opened.

    Raises:
        ManifestError: no manifest, not one of ours, or of a newer format.
        ShardDamageError: the manifest or the shard table is not what its hash says.
    """
    manifest = read_manifest(root)
    path = root / SHARDS_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardDamageError(f"{path}: named by {MANIFEST_NAME} but not readable ({error.strerror})") from error
    if hashlib.sha256(data).hexdigest() != manifest.shards_sha256:
        raise ShardDamageError(f"{path}: sha256 differs from the manifest's; restore it or convert again")
    rows = read_parquet(data).to_pylist()
    return ShardSet(root=root, manifest=manifest, shards=tuple(ShardEntry(**row) for row in rows))


def read_manifest(root: Path) -> Manifest:
    """Read and check ``manifest.json`` alone; raises as `read_shard_set`."""
    path = root / MANIFEST_NAME
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        hint = "the conversion has not finished: rerun it" if any(root.glob("*.tar")) else "is it a shard folder?"
        raise ManifestError(f"{path}: no such file; {hint}") from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}); give the folder of a shard set") from error
    try:
        payload = json.loads(text)
        if payload["format"] != FORMAT_NAME:
            raise KeyError(payload["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise ShardDamageError(
            f"{path}: not a {FORMAT_NAME} manifest ({type(error).__name__}: {error}); restore it or convert again"
        ) from error
    if payload.get("format_version") != FORMAT_VERSION:
        raise ManifestError(
            f"{path}: format version {payload.get('format_version')}, this ca2st reads {FORMAT_VERSION}; "
            "use a matching release"
        )
    claimed = payload.pop("self_sha256", None)
    if sha256_of_json(payload) != claimed:
        raise ShardDamageError(f"{path}: self_sha256 differs from the contents; restore it or convert again")
    manifest = _manifest_from(payload)
    if manifest.to_json() != text:
        raise ShardDamageError(
            f"{path}: white space or order changed since it was written; restore it or convert again"
        )
    return manifest


def _manifest_from(payload: dict[str, Any]) -> Manifest:
    derived = ("format", "format_version", "audio_sha256", "video_sha256")
    fields = {name: value for name, value in payload.items() if name not in derived}
    fields["label_spaces"] = tuple(
        LabelSpace(name=space["name"], classes=tuple(space["classes"])) for space in payload["label_spaces"]
    )
    fields["targets"] = tuple(payload["targets"])
    fields["audio"] = AudioParameters(**payload["audio"])
    fields["video"] = VideoParameters(**payload["video"])
    return Manifest(**fields)
