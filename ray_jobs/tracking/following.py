"""A process of its own follows a training while it lasts, and is told what the run is called."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ca2st.training.documents import flatten
from ray_jobs import environment
from ray_jobs.config import Recipe, recipe_document
from ray_jobs.console import say
from ray_jobs.tracking.tracker import TrackingState, open_tracking, unsent_bytes
from ray_jobs.wiring import TrainingData

_FOLLOWER_GRACE_SECONDS = 45.0
"""Long enough to make the tables of a new SQLite store on a busy machine: half made, they stay useless."""


@contextmanager
def followed(recipe: Recipe, run_dir: Path, data: TrainingData) -> Iterator[None]:
    """Have a process of its own send the journal to MLflow while the block runs."""
    if not recipe.tracking.enabled:
        yield
        return
    open_tracking(run_dir, _tracking_state(recipe, run_dir, data))
    with (run_dir / "follower.log").open("ab") as log:
        follower = subprocess.Popen(
            [sys.executable, "-m", "ray_jobs.tracking.follower", str(run_dir.resolve()), str(os.getpid())],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        yield
    finally:
        _finish_following(run_dir, follower)


def _finish_following(run_dir: Path, follower: "subprocess.Popen[bytes]") -> None:
    """Give the follower a few seconds for the rest; what is left then waits for ``ca2st track sync``."""
    follower.terminate()
    try:
        follower.wait(_FOLLOWER_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        follower.kill()
        follower.wait()
    if num_bytes := unsent_bytes(run_dir):
        say(f"warning: MLflow lacks {num_bytes} bytes of the journal; send them by `ca2st track sync {run_dir}`")


def _tracking_state(recipe: Recipe, run_dir: Path, data: TrainingData) -> TrackingState:
    document: dict[str, Any] = recipe_document(recipe)
    tags = {"ca2st.run_dir": str(run_dir), "ca2st.name": recipe.name, **environment.git_state(Path.cwd())}
    tags |= {f"version.{name}": version for name, version in environment.versions().items()}
    tags |= environment.hardware()
    tags |= {f"data.{role}.fingerprint": fingerprint for role, fingerprint in data.fingerprints.items()}
    tags |= {f"data.{role}.dataset": name for role, name in data.datasets.items()}
    return TrackingState(
        uri=recipe.tracking.uri or environment.default_tracking_uri(run_dir.parent),
        experiment=recipe.tracking.experiment,
        run_name=recipe.name,
        params={name: str(value) for name, value in flatten(document).items() if value is not None},
        tags=tags,
    )
