"""Shards in, ClipBatches out: a pure plan, threads that fetch and check bytes, and a decoding backend."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.augment.config import AugmentConfig as AugmentConfig
    from pipelines.config import EvaluationSetup as EvaluationSetup
    from pipelines.config import LoaderConfig as LoaderConfig
    from pipelines.config import TrainSetup as TrainSetup
    from pipelines.loader import EvaluationLoader as EvaluationLoader
    from pipelines.loader import TrainLoader as TrainLoader
    from pipelines.loader import read_batches as read_batches
    from pipelines.order.selection import OrderConfig as OrderConfig
    from pipelines.views import EvaluationViews as EvaluationViews
    from pipelines.views import SamplingConfig as SamplingConfig

_HOMES = {
    "AugmentConfig": "pipelines.augment.config",
    "EvaluationLoader": "pipelines.loader",
    "EvaluationSetup": "pipelines.config",
    "EvaluationViews": "pipelines.views",
    "LoaderConfig": "pipelines.config",
    "OrderConfig": "pipelines.order.selection",
    "SamplingConfig": "pipelines.views",
    "TrainLoader": "pipelines.loader",
    "TrainSetup": "pipelines.config",
    "read_batches": "pipelines.loader",
}

__all__ = [
    "AugmentConfig",
    "EvaluationLoader",
    "EvaluationSetup",
    "EvaluationViews",
    "LoaderConfig",
    "OrderConfig",
    "SamplingConfig",
    "TrainLoader",
    "TrainSetup",
    "read_batches",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home when it is first asked for; nothing heavy is imported before."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
