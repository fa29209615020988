"""Ray Train starts and restarts the workers; everything they know comes from the recipe and the run folder.

Ray keeps no checkpoint of ours: a restarted worker group resumes from the run folder, like a rerun by hand.
"""

import os
import time
from pathlib import Path
from typing import Any

from ca2st.errors import RetriesUsedUpError
from ray_jobs.config import Recipe
from ray_jobs.worker import Job, Outcome, read_outcome, run


def run_under_ray(job: Job, recipe: Recipe, address: str) -> Outcome:
    """Train with `recipe.launch.workers` Ray workers, one a GPU where there are GPUs.

    `address`: ``local`` starts a Ray on this machine for the time of the run; else a cluster to join.

    Raises:
        RetriesUsedUpError: the worker group failed more often than `recipe.launch.max_failures`.
    """
    import ray
    import torch
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    # Ray's own uv integration would build a new environment for every worker.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if address == "local":
        ray.init(include_dashboard=False, num_cpus=max(os.cpu_count() or 1, recipe.launch.workers))
    else:
        ray.init(address=address)
    try:
        trainer = TorchTrainer(
            _train_on_worker,
            train_loop_config={"recipe": job.recipe, "run_dir": job.run_dir},
            scaling_config=ScalingConfig(num_workers=recipe.launch.workers, use_gpu=torch.cuda.is_available()),
            torch_config=TorchConfig(backend="nccl" if torch.cuda.is_available() else "gloo"),
            run_config=RunConfig(
                # A name of its own: Ray would otherwise resume from its record of an earlier run of this name.
                name=f"{recipe.name}-{time.time_ns()}",
                storage_path=str(Path(job.run_dir) / "ray"),
                failure_config=FailureConfig(max_failures=recipe.launch.max_failures),
            ),
        )
        trainer.fit()
    except TrainingFailedError as error:
        raise RetriesUsedUpError(
            f"{recipe.name}: failed in every attempt ({recipe.launch.max_failures} restarts allowed): {error}; "
            f"{job.run_dir} keeps what was reached: mend the cause and rerun"
        ) from error
    finally:
        ray.shutdown()
    return read_outcome(Path(job.run_dir))


def _train_on_worker(config: dict[str, Any]) -> None:
    """A worker's whole life: Ray has set up the process group that Accelerate joins."""
    from ray import train

    from ray_jobs.environment import fault_points

    context = train.get_context()
    faults = fault_points(restart=Path(config["run_dir"]).joinpath("journal.jsonl").exists())
    outcome = run(Job(recipe=config["recipe"], run_dir=config["run_dir"]), faults=faults, own_signals=False)
    train.report({"steps": outcome.steps, "world_rank": context.get_world_rank()})
