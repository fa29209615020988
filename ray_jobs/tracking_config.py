"""``[tracking]``: where a run is followed."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where the run is followed in MLflow."""

    uri: str | None = None
    """MLflow tracking URI; None: the environment's MLFLOW_TRACKING_URI, else ``sqlite:///runs/mlflow.db``."""
    experiment: str = "ca2st"
    """MLflow experiment: runs in one experiment are compared."""
    enabled: bool = True
    """False: only the journal is written; ``ca2st track sync`` can send it later."""
