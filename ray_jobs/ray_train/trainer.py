"""Ray Train's trainer, set as a run asks for it."""

from typing import Any

from ray.train.torch import TorchConfig
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from ray_jobs.config.launch import LaunchConfig
from ray_jobs.ray_train.demand import Demand
from ray_jobs.ray_train.launch_folder import LaunchFolder
from ray_jobs.ray_train.lost_workers import LostWorkers
from ray_jobs.ray_train.worker_life import train_on_worker
from ray_jobs.running.worker import Job


class UncleanedTrainer(TorchTrainer):
    """For a Ray without a dashboard: Ray's cleaner of placement groups would ask it, and complain every second."""

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()
        return [callback for callback in made if not isinstance(callback, PlacementGroupCleanerCallback)]


def make_trainer(
    job: Job,
    launch: LaunchConfig,
    demand: Demand,
    folder: LaunchFolder,
    *,
    has_dashboard: bool,
    timeout_seconds: float,
) -> TorchTrainer:
    """A trainer that starts the workers of `job`; what Ray itself keeps goes into `folder`.

    `has_dashboard`: of the cluster. `timeout_seconds`: the longest that a worker waits for the others in one exchange.
    """
    make = TorchTrainer if has_dashboard else UncleanedTrainer
    return make(
        train_on_worker,  # its return value arrives as the result's
        train_loop_config={"recipe": job.recipe, "run_dir": job.run_dir, "folder": str(folder.path)},
        scaling_config=ScalingConfig(
            num_workers=(demand.min_workers, demand.max_workers) if launch.elastic else demand.max_workers,
            use_gpu=demand.gpus > 0,
            resources_per_worker=dict(demand.resources),
            placement_strategy=demand.placement,
        ),
        torch_config=TorchConfig(backend="nccl" if demand.gpus else "gloo", timeout_s=round(timeout_seconds)),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str(folder.path / "ray"),
            failure_config=FailureConfig(
                max_failures=launch.max_failures, max_preemption_failures=launch.max_preemptions
            ),
            callbacks=[LostWorkers(folder.path)],
            # Ray shows GPUs even to workers that asked for none, and all of them would train on the first.
            worker_runtime_env={} if demand.gpus else {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}},
        ),
    )
