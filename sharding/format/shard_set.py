"""The manifest of a shard set and the table of its shards (format v1): written last, read from a folder or a URL.

``manifest.json`` says what the set holds and names ``shards.parquet`` by hash, which names every shard and index by
hash: one file vouches for every byte. Trainers take the manifest, never a glob.
"""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from ca2st.checked_json import DocumentError, canonical_json, checked, parse_json, sha256_of_json
from ca2st.durable import NO_FAULTS, FaultPoints, write_bytes
from ca2st.errors import EnvironmentFault, listed
from sharding.errors import ManifestError, ShardDamageError
from sharding.format import remote
from sharding.format.index import read_parquet

FORMAT_NAME = "ca2st-shards"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
Labelling = Literal["one", "several", "none"]
"""Labels of a sample: ``one`` in each label space; ``several``: any number of the one label space; ``none``: a test set
whose owners keep them."""
SHARDS_NAME = "shards.parquet"


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


def written(name: str) -> str:
    """Return a name between quotes; what is not ASCII is also given by its code points, which tell likenesses apart."""
    return repr(name) if repr(name) == ascii(name) else f"{name!r} {name!a}"


def classes_that_differ(here: Sequence[str], there: Sequence[str], *, where: tuple[str, str]) -> str:
    """Say which of two unequal lists of classes has what alone, or where the order begins to differ.

    `where` are words for the two lists: ``("in the model", "in the set")``.
    """
    alone = [sorted(set(here) - set(there)), sorted(set(there) - set(here))]
    if not any(alone):
        at = next(at for at, names in enumerate(zip(here, there, strict=True)) if names[0] != names[1])
        found = f"{written(here[at])} {where[0]} and {written(there[at])} {where[1]}"
        return f"the same names in another order (class {at} is {found})"
    told = []
    for place, names in zip(where, alone, strict=True):
        told += [f"only {place} {listed([*map(written, names)], most=8)}"] if names else []
    return "; ".join(told)


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
    """A name of `sharding.media.codecs.STORED_CODECS`."""
    short_side: int = 256
    """Most pixels of the shorter side; smaller sources keep their size."""
    side_multiple: int | None = None
    """Both sides are multiples of this; None: a set from before it, of even sides."""
    quality: int = 5
    """On the codec's own scale: mjpeg's quantiser, 2 (best) to 31; the others' constant rate factor."""
    frames_per_second: float | None = None
    """Thinned to this rate, or None: every frame of the source."""
    num_gop_frames: int | None = None
    """Frames 0, n, 2n, ... of every clip are key frames and the groups closed; None: every frame stands alone."""
    pixel_format: str | None = None
    """FFmpeg's name; None: mjpeg's yuvj420p."""
    colour: str | None = None
    """Matrix and range; None: mjpeg's bt601-full."""

    hdr: str | None = None
    """A name of `sharding.media.picture.HDR_POLICIES`; None: a set from before it, sources stored as they were."""
    interlaced: str | None = None
    """A name of `sharding.media.picture.INTERLACED_POLICIES`; None: a set from before it, fields and the pixels'
    shape stored as they were."""

    def as_json(self) -> dict[str, Any]:
        """Return the fields; what a codec or an older set does not have is left out, so that their hashes stay."""
        return {name: value for name, value in asdict(self).items() if name not in _OPTIONAL or value is not None}


_OPTIONAL = ("side_multiple", "num_gop_frames", "pixel_format", "colour", "hdr", "interlaced")


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
    clock: str = "first-frame"
    """Where seconds count from, a name of `sharding.media.video.CLOCKS`; sets from before there was a choice leave it
    out."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """What was unusual about the sources and accepted, by kind; a set without any leaves the field out."""
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of notes about the source list: kind to the first places, ``file:line`` or a name; left out where there are none.
    Those of the samples are in their JSON."""
    labelling: Labelling = "one"
    """How many labels a sample has, in its JSON and in the index; ``one`` is left out, as in sets from before it."""
    rejects_sha256: str | None = None
    """Hash of ``rejects.jsonl``; None: no rejects, or a set from before this field, whose indexes name them all."""

    source_lists: tuple[str, ...] = ()
    """Hashes of the lists of a set that was added to, in order, over which `source_list_sha256` goes; () for a set of
    one list."""
    table: str = SHARDS_NAME
    """File name of the table of shards: another one after each addition, so that either manifest has its own."""

    @property
    def fingerprint(self) -> str:
        """Hash that stands for every byte of the set: the manifest's own `self_sha256`."""
        return sha256_of_json(self._payload())

    def label_space(self, name: str) -> LabelSpace:
        """Return the label space of that name.

        Raises:
            ManifestError: the set has none of that name; the message lists those it has.
        """
        for space in self.label_spaces:
            if space.name == name:
                return space
        known = ", ".join(space.name for space in self.label_spaces)
        raise ManifestError(f"label space {name!r}: not in this set; it has {known}")

    def _payload(self) -> dict[str, Any]:
        # A field of its default is left out, as in sets from before it: so their hashes stay.
        defaults: dict[str, Any] = {
            one.name: {} if one.default_factory is dict else one.default for one in fields(self)
        }
        payload = {name: value for name, value in asdict(self).items() if value != defaults[name]}
        payload["format"], payload["format_version"] = FORMAT_NAME, FORMAT_VERSION
        payload["label_spaces"] = [asdict(space) | {"sha256": space.sha256} for space in self.label_spaces]
        payload["audio_sha256"] = sha256_of_json(asdict(self.audio))
        payload["video"] = self.video.as_json()
        payload["video_sha256"] = sha256_of_json(payload["video"])
        return payload

    def to_json(self) -> bytes:
        """Return indented JSON with `self_sha256` over the canonical JSON of everything else."""
        payload = self._payload() | {"self_sha256": self.fingerprint}
        return canonical_json(payload)


def read_manifest(root: Path) -> Manifest:
    """Read and check the ``manifest.json`` of a folder.

    Raises:
        ManifestError: there is none, it cannot be read, or is of another format version.
        ShardDamageError: as `parse_manifest`.
    """
    path = root / MANIFEST_NAME
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        hint = "the conversion has not finished: rerun it" if any(root.glob("*.tar")) else "is it a shard folder?"
        raise ManifestError(f"{path}: no such file; {hint}") from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}); give the folder of a shard set") from error
    return parse_manifest(text, where=str(path))


def parse_manifest(text: bytes, *, where: str) -> Manifest:
    """Return the manifest in the bytes of a ``manifest.json``; `where` names it in messages.

    Raises:
        ManifestError: of another format version, or with other fields.
        ShardDamageError: not a manifest, or not the one that was written.
    """
    try:
        payload = parse_json(text, dict[str, Any], where=where)
    except DocumentError as error:
        raise ShardDamageError(f"{error}; restore it or convert again") from error
    if payload.get("format") != FORMAT_NAME or "format_version" not in payload:
        raise ShardDamageError(f"{where}: not a {FORMAT_NAME} manifest; restore it or convert again")
    if payload.get("format_version") != FORMAT_VERSION:
        raise ManifestError(
            f"{where}: format version {payload.get('format_version')}, this ca2st reads {FORMAT_VERSION}; "
            "use a matching release"
        )
    claimed = payload.pop("self_sha256", None)
    if sha256_of_json(payload) != claimed:
        raise ShardDamageError(f"{where}: self_sha256 differs from the contents; restore it or convert again")
    try:
        derived = ("format", "format_version", "audio_sha256", "video_sha256")
        said = {name: value for name, value in payload.items() if name not in derived}
        spaces = checked(payload.get("label_spaces"), list[dict[str, Any]], where=f"{where}: label_spaces")
        said["label_spaces"] = [{name: value for name, value in space.items() if name != "sha256"} for space in spaces]
        manifest = checked(said, Manifest, where=where)
        if not TABLE_NAMES.fullmatch(manifest.table):
            raise DocumentError(f"{where}: table: expected {SHARDS_NAME} or shards-N.parquet, found {manifest.table!r}")
    except DocumentError as error:
        raise ManifestError(
            f"{where}: expected the fields that this ca2st knows, found others ({error}); use a matching release"
        ) from error
    if manifest.to_json() != text:
        raise ShardDamageError(
            f"{where}: white space or order changed since it was written; restore it or convert again"
        )
    return manifest


TABLE_NAMES = re.compile(r"shards(-\d{1,6})?\.parquet")
"""Of tables of shards."""
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
class ShardSet:
    """A manifest with its shards, read from a folder or a URL."""

    root: Path
    """Folder of the shards; of a remote set its folder in this machine's cache, filled when shards are first needed."""
    manifest: Manifest
    shards: tuple[ShardEntry, ...]
    origin: remote.RemoteFolder | None = None
    """Where a remote set comes from."""
    storage: remote.StorageConfig = field(default_factory=remote.StorageConfig)
    """How a remote set is kept on this machine."""

    @property
    def where(self) -> str:
        """Folder or URL, for messages."""
        return str(self.origin or self.root)


def write_shard_set(
    place: remote.Location | remote.Files,
    manifest_fields: Mapping[str, Any],
    shards: tuple[ShardEntry, ...],
    *,
    faults: FaultPoints = NO_FAULTS,
) -> Manifest:
    """Write the table of shards and then, last, ``manifest.json``.

    `manifest_fields` are Manifest's fields except `num_samples`, `num_shards` and `shards_sha256`, which follow
    from `shards`.
    """
    files = remote.files_of(place)
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(shard) for shard in shards], schema=_SHARDS_SCHEMA), sink)
    data = sink.getvalue()
    manifest = Manifest(
        **manifest_fields,
        num_samples=sum(shard.num_samples for shard in shards),
        num_shards=len(shards),
        shards_sha256=hashlib.sha256(data).hexdigest(),
    )
    files.write(manifest.table, data, faults=faults, point="shards_table")
    files.write(MANIFEST_NAME, manifest.to_json(), faults=faults, point="manifest")
    return manifest


def read_shard_set(place: str | Path | remote.RemoteFolder, *, storage: remote.StorageConfig | None = None) -> ShardSet:
    """Read and check ``manifest.json`` and ``shards.parquet``; shards themselves are not opened.

    Args:
        place: A folder, or the URL of one: s3, gs, http(s).
        storage: Where the shards of a URL are kept once needed, and how long the URL is tried.

    Raises:
        ManifestError: no manifest, not one of ours, or of a newer format.
        ShardDamageError: the manifest or the shard table is not what its hash says.
        EnvironmentFault: the URL cannot be read, or the cache not be written.
    """
    location = remote.as_location(place)
    if isinstance(location, remote.RemoteFolder):
        settings = storage or remote.StorageConfig()
        return _read_remote(
            remote.RemoteFiles(folder=location, retrier=remote.Retrier(config=settings.retry)), settings
        )
    manifest = read_manifest(location)
    path = location / manifest.table
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardDamageError(f"{path}: named by {MANIFEST_NAME} but not readable ({error.strerror})") from error
    return ShardSet(root=location, manifest=manifest, shards=_parse_table(data, manifest, where=str(path)))


def _read_remote(files: remote.RemoteFiles, storage: remote.StorageConfig) -> ShardSet:
    """Return the set behind a URL; the manifest's hash names its folder in the cache, so it is there alone."""
    where = files.folder.file(MANIFEST_NAME)
    try:
        text = files.read(MANIFEST_NAME)
    except remote.RemoteFileMissingError:
        raise ManifestError(f"{where}: no such file; is it the URL of a shard set, and is its copy complete?") from None
    manifest = parse_manifest(text, where=where)
    where = files.folder.file(manifest.table)
    try:
        table = files.read(manifest.table)
    except remote.RemoteFileMissingError:
        raise ShardDamageError(f"{where}: named by {MANIFEST_NAME} but missing; copy the set again") from None
    shards = _parse_table(table, manifest, where=where)
    root = storage.folder / manifest.fingerprint[:32]
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            f"{root}: cannot be made ({error.strerror}); set loader.cache_dir to a folder on a disk of this machine"
        ) from error
    for name, data in ((manifest.table, table), (MANIFEST_NAME, text)):
        if not (root / name).exists() or (root / name).read_bytes() != data:
            write_bytes(root / name, data)
    return ShardSet(root=root, manifest=manifest, shards=shards, origin=files.folder, storage=storage)


def _parse_table(data: bytes, manifest: Manifest, *, where: str) -> tuple[ShardEntry, ...]:
    if hashlib.sha256(data).hexdigest() != manifest.shards_sha256:
        raise ShardDamageError(f"{where}: sha256 differs from the manifest's; restore it or convert again")
    try:
        table = read_parquet(data, schema=_SHARDS_SCHEMA, num_rows=manifest.num_shards)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ShardDamageError(f"{where}: not the shard table of this manifest ({error}); convert again") from error
    if any(column.null_count for column in table.columns):
        raise ShardDamageError(f"{where}: expected a value in every place, found none in some; convert again")
    shards = tuple(ShardEntry(**row) for row in table.to_pylist())
    if (found := sum(shard.num_samples for shard in shards)) != manifest.num_samples:
        raise ShardDamageError(
            f"{where}: expected the manifest's {manifest.num_samples} samples, found {found}; convert again"
        )
    return shards
