"""What a run has in MLflow beside its numbers: inputs, artefacts, the registered model; each fails alone."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ray_jobs.redaction import redacted
from ray_jobs.tracking.run_record import Say

if TYPE_CHECKING:
    from mlflow import MlflowClient

AT_BEGIN = ("inputs",)
"""Sent with the journal's first line."""
AT_END = ("artefacts", "registered_model")
"""Sent when the training is done."""


def send_extra(name: str, *, client: "MlflowClient", run_id: str, run_dir: Path, say: Say) -> bool:
    """Send the extra `name`; returns whether it was sent, after telling why not."""
    try:
        EXTRAS[name](client, run_id, run_dir)
    except Exception as error:  # noqa: BLE001  # whatever it is, it must not cost the run its metrics
        say(f"{name}: not sent ({type(error).__name__}: {redacted(str(error))}); `ca2st track sync` tries again")
        return False
    return True


def _inputs(client: "MlflowClient", run_id: str, run_dir: Path) -> None:
    from ray_jobs.tracking.inputs import log_inputs

    log_inputs(client, run_id, run_dir)


def _artefacts(client: "MlflowClient", run_id: str, run_dir: Path) -> None:
    from ray_jobs.tracking.artefacts import log_artefacts

    log_artefacts(client, run_id, run_dir)


def _registered_model(client: "MlflowClient", run_id: str, run_dir: Path) -> None:
    from ray_jobs.tracking.registered_model import register

    register(client, run_id, run_dir)


EXTRAS: dict[str, Callable[["MlflowClient", str, Path], None]] = {
    "inputs": _inputs,
    "artefacts": _artefacts,
    "registered_model": _registered_model,
}
