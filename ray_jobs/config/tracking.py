"""``[tracking]``: where a run is followed, and what is kept of it there."""

import re
from dataclasses import dataclass

from ca2st.errors import UserInputError

_NOT_IN_MODEL_NAMES = "/:"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where the run is followed in MLflow."""

    uri: str | None = None
    """MLflow tracking URI; None: the environment's MLFLOW_TRACKING_URI, else ``sqlite:///runs/mlflow.db``."""
    experiment: str = "ca2st"
    """MLflow experiment: runs in one experiment are compared."""
    enabled: bool = True
    """False: only the journal is written; ``ca2st track sync`` can send it later."""
    register_model: bool = True
    """Register the finished model: a few kB that name its checkpoint, whose bytes stay where they are."""
    registered_model: str | None = None
    """Name under which it is registered; None: the recipe's name."""
    system_metrics_seconds: float = 10.0
    """Time between two measurements of each node's processors, memory, GPUs, disk and network; 0: none."""

    def __post_init__(self) -> None:
        if self.system_metrics_seconds < 0:
            raise UserInputError(
                f"system_metrics_seconds: expected 0 (off) or more, found {self.system_metrics_seconds}"
            )
        name = self.registered_model
        if name is not None and (not name.strip() or any(letter in name for letter in _NOT_IN_MODEL_NAMES)):
            raise UserInputError(
                f"registered_model: expected a name without / and : (MLflow refuses them), found {name!r}"
            )


def model_name(recipe_name: str, registered_model: str | None) -> str:
    """The name a model is registered under: as set, or the recipe's name with what MLflow refuses replaced."""
    if registered_model is not None:
        return registered_model
    return re.sub(f"[{_NOT_IN_MODEL_NAMES}]", "-", recipe_name).strip() or "ca2st"
