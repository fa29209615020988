"""Start a training here: in this process, in several processes of this machine, or under Ray.

Whatever the way, the workers run the same function (`ray_jobs.worker.run`), the run folder is the only owner of
checkpoints, and calling `launch` again with the same recipe resumes.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ca2st.durable import FaultPoints, write_bytes
from ca2st.errors import UserInputError
from ca2st.training.documents import differences, flatten
from ray_jobs import environment
from ray_jobs.config import Recipe, identity_settings, recipe_document, stored_recipe
from ray_jobs.console import say, show_log
from ray_jobs.errors import WorkerFailedError
from ray_jobs.mlflow_tracker import TrackingState, open_tracking, unsent_bytes
from ray_jobs.public_experts import IMPORTED_FOLDER, with_local_experts
from ray_jobs.start import check_model
from ray_jobs.wiring import TrainingData, preflight
from ray_jobs.worker import Job, Outcome, read_outcome, run

RECIPE_NAME = "recipe.json"
_FOLLOWER_GRACE_SECONDS = 45.0
"""Long enough to make the tables of a new SQLite store on a busy machine: half made, they stay useless."""


def launch(recipe: Recipe, run_dir: Path, *, faults: FaultPoints, ray_address: str | None = None) -> Outcome:
    """Train `recipe` in `run_dir`, resuming what is there.

    `ray_address`: None trains without Ray; ``local`` starts a Ray of its own; anything else is a cluster's address.

    Raises:
        UserInputError: the folder holds a run of another recipe (the message lists what differs), or what is to be
            trained or to start from does not fit the model; nothing is written then.
        WorkerFailedError: a worker process failed, with its exit code.
    """
    data = preflight(recipe)
    recipe = with_local_experts(recipe, run_dir.parent / IMPORTED_FOLDER, environment.hub_access())
    check_model(recipe, data.classes, run_dir)
    _claim(recipe, run_dir)
    job = Job(recipe=recipe_document(recipe), run_dir=str(run_dir.resolve()))
    with _followed(recipe, run_dir, data):
        if ray_address is not None:
            from ray_jobs.ray_train import run_under_ray

            return run_under_ray(job, recipe, ray_address)
        if recipe.launch.workers == 1:
            return run(job, faults=faults)
        return _run_processes(job, recipe.launch.workers, faults)


def _claim(recipe: Recipe, run_dir: Path) -> None:
    """Write the recipe into a new run folder, or refuse a folder of another recipe."""
    path = run_dir / RECIPE_NAME
    if path.exists():
        kept = identity_settings(stored_recipe(json.loads(path.read_text()), where=str(run_dir)))
        if changed := differences(kept, identity_settings(recipe)):
            listed = "\n  ".join(changed)
            raise UserInputError(
                f"{run_dir}: holds a run of another recipe; choose another --out or undo the change:\n  {listed}"
            )
    run_dir.mkdir(parents=True, exist_ok=True)
    write_bytes(path, (json.dumps(recipe_document(recipe), indent=1) + "\n").encode())


def _run_processes(job: Job, num_workers: int, faults: FaultPoints) -> Outcome:
    """Train in `num_workers` processes of this machine that talk over the loopback interface."""
    from torch.multiprocessing.spawn import ProcessExitedException, spawn

    context = spawn(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        _worker_process,
        args=(job, num_workers, _free_port(), faults),
        nprocs=num_workers,
        join=False,
    )
    with _signals_to(context.pids()):
        try:
            while not context.join():
                pass
        except ProcessExitedException as error:
            code = error.exit_code if error.exit_code >= 0 else 128 - error.exit_code
            raise WorkerFailedError(f"worker of rank {error.error_index} ended with exit code {code}", code) from error
    return read_outcome(Path(job.run_dir))


def _worker_process(rank: int, job: Job, world_size: int, port: int, faults: FaultPoints) -> None:
    from ca2st.errors import CA2STError

    die_with_parent()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if rank == 0:
        show_log()
    try:
        run(job, faults=faults)
    except CA2STError as error:
        say(f"error (rank {rank}): {error}")
        sys.exit(error.exit_code)


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies: no orphan goes on training."""
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _signals_to(pids: list[int]) -> Iterator[None]:
    """Pass SIGINT and SIGTERM on to the workers, which checkpoint and end; this process waits for them."""

    def forward(number: int, _frame: object) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):  # ended already
                os.kill(pid, number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _followed(recipe: Recipe, run_dir: Path, data: TrainingData) -> Iterator[None]:
    """Have a process of its own send the journal to MLflow while the block runs."""
    if not recipe.tracking.enabled:
        yield
        return
    open_tracking(run_dir, _tracking_state(recipe, run_dir, data))
    with (run_dir / "follower.log").open("ab") as log:
        follower = subprocess.Popen(
            [sys.executable, "-m", "ray_jobs.follower", str(run_dir.resolve()), str(os.getpid())],
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
