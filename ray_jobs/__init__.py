"""The composition root: recipes, command line, launching, tracking."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_jobs.config.recipe import Recipe as Recipe
    from ray_jobs.runs.inference import TrainedModel as TrainedModel
    from ray_jobs.runs.inference import load_trained as load_trained
    from ray_jobs.runs.prediction import predict_videos as predict_videos

_HOMES = {
    "Recipe": "ray_jobs.config.recipe",
    "TrainedModel": "ray_jobs.runs.inference",
    "load_trained": "ray_jobs.runs.inference",
    "predict_videos": "ray_jobs.runs.prediction",
}

__all__ = [
    "Recipe",
    "TrainedModel",
    "load_trained",
    "predict_videos",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home when it is first asked for; nothing heavy is imported before."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
