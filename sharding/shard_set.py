"""A shard set: the table of its shards, and how a set is written, then read from a folder or a URL."""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ca2st.durable import NO_FAULTS, FaultPoints, write_bytes
from ca2st.errors import EnvironmentFault
from sharding.errors import ManifestError, ShardDamageError
from sharding.location import RemoteFolder, as_location
from sharding.manifest import MANIFEST_NAME, Manifest, parse_manifest, read_manifest
from sharding.parquet import read_parquet
from sharding.remote import RemoteFileMissingError, RemoteFiles
from sharding.retry import Retrier
from sharding.storage import StorageConfig

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
    origin: RemoteFolder | None = None
    """Where a remote set comes from."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """How a remote set is kept on this machine."""

    @property
    def where(self) -> str:
        """Folder or URL, for messages."""
        return str(self.origin or self.root)


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


def read_shard_set(place: str | Path | RemoteFolder, *, storage: StorageConfig | None = None) -> ShardSet:
    """Read and check ``manifest.json`` and ``shards.parquet``; shards themselves are not opened.

    Args:
        place: A folder, or the URL of one: s3, gs, http(s).
        storage: Where the shards of a URL are kept once needed, and how long the URL is tried.

    Raises:
        ManifestError: no manifest, not one of ours, or of a newer format.
        ShardDamageError: the manifest or the shard table is not what its hash says.
        EnvironmentFault: the URL cannot be read, or the cache not be written.
    """
    location = as_location(place)
    if isinstance(location, RemoteFolder):
        settings = storage or StorageConfig()
        return _read_remote(RemoteFiles(folder=location, retrier=Retrier(config=settings.retry)), settings)
    manifest = read_manifest(location)
    path = location / SHARDS_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardDamageError(f"{path}: named by {MANIFEST_NAME} but not readable ({error.strerror})") from error
    return ShardSet(root=location, manifest=manifest, shards=_parse_table(data, manifest, where=str(path)))


def _read_remote(files: RemoteFiles, storage: StorageConfig) -> ShardSet:
    """The set behind a URL; its folder in the cache is named by the manifest's hash, so no other set is ever in it."""
    where = files.folder.file(MANIFEST_NAME)
    try:
        text = files.read(MANIFEST_NAME)
    except RemoteFileMissingError:
        raise ManifestError(f"{where}: no such file; is it the URL of a shard set, and is its copy complete?") from None
    manifest = parse_manifest(text, where=where)
    where = files.folder.file(SHARDS_NAME)
    try:
        table = files.read(SHARDS_NAME)
    except RemoteFileMissingError:
        raise ShardDamageError(f"{where}: named by {MANIFEST_NAME} but missing; copy the set again") from None
    shards = _parse_table(table, manifest, where=where)
    root = storage.folder / manifest.fingerprint[:32]
    _keep(root, {SHARDS_NAME: table, MANIFEST_NAME: text})
    return ShardSet(root=root, manifest=manifest, shards=shards, origin=files.folder, storage=storage)


def _keep(root: Path, files: Mapping[str, bytes]) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            f"{root}: cannot be made ({error.strerror}); set loader.cache_dir to a folder on a disk of this machine"
        ) from error
    for name, data in files.items():
        if not (root / name).exists() or (root / name).read_bytes() != data:
            write_bytes(root / name, data)


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
