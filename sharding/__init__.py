"""Raw videos and annotation files in, verified WebDataset shards out. Imports neither torch nor Ray."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharding.conversion import convert as convert
    from sharding.datasets import DatasetRequest as DatasetRequest
    from sharding.datasets import read_dataset as read_dataset
    from sharding.format.shard_set import LabelSpace as LabelSpace
    from sharding.format.shard_set import Manifest as Manifest
    from sharding.format.shard_set import ShardSet as ShardSet
    from sharding.format.shard_set import read_shard_set as read_shard_set
    from sharding.settings import ConversionConfig as ConversionConfig
    from sharding.source import SourceList as SourceList
    from sharding.source import SourceSample as SourceSample
    from sharding.verify import verify_shard_set as verify_shard_set

_HOMES = {
    "ConversionConfig": "sharding.settings",
    "DatasetRequest": "sharding.datasets",
    "LabelSpace": "sharding.format.shard_set",
    "Manifest": "sharding.format.shard_set",
    "ShardSet": "sharding.format.shard_set",
    "SourceList": "sharding.source",
    "SourceSample": "sharding.source",
    "convert": "sharding.conversion",
    "read_dataset": "sharding.datasets",
    "read_shard_set": "sharding.format.shard_set",
    "verify_shard_set": "sharding.verify",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name from its home when it is first asked for; nothing heavy is imported before."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
