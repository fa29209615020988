"""The loaders of a recipe; every rank makes its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pipelines.draws import EvaluationViews
from pipelines.loader import EvaluationLoader, TrainLoader
from pipelines.quarantine import FOLDER_NAME as QUARANTINE_FOLDER
from ray_jobs.config.recipe import Recipe
from ray_jobs.running.training_data import TrainingData
from sharding.shard_set import ShardSet


def train_loader(
    recipe: Recipe,
    data: TrainingData,
    *,
    rank: int,
    world_size: int,
    run_dir: Path | None = None,
    device: torch.device | None = None,
) -> TrainLoader:
    """The shuffled, augmented, resumable source of a rank; damaged samples are kept in `run_dir` where it is given.

    `device`: the rank's own, which decodes for itself where it can.
    """
    return TrainLoader(
        data.train_sets,
        recipe.clip,
        data.targets,
        sampling=recipe.data.sampling,
        augment=recipe.data.augment,
        loader=recipe.data.loader,
        seed=recipe.training.seed,
        global_batch_size=recipe.training.global_batch_size,
        order=recipe.data.order(),
        quarantine_folder=None if run_dir is None else run_dir / QUARANTINE_FOLDER,
        rank=rank,
        world_size=world_size,
        device=device,
    )


def evaluation_loader(
    recipe: Recipe,
    shard_set: ShardSet,
    targets: tuple[str, ...],
    *,
    views: EvaluationViews,
    num_lanes: int | None = None,
    rank: int,
    world_size: int,
    device: torch.device | None = None,
) -> EvaluationLoader:
    """Every sample of `shard_set` once, in `views` each; with one lane in the set's own order.

    `device`: as for `train_loader`.
    """
    return EvaluationLoader(
        shard_set,
        recipe.clip,
        targets,
        sampling=recipe.data.sampling,
        views=views,
        loader=recipe.data.loader,
        global_batch_size=recipe.training.per_device_batch_size * world_size,
        num_lanes=num_lanes,
        rank=rank,
        world_size=world_size,
        device=device,
    )


@contextmanager
def validation_loader(
    recipe: Recipe, data: TrainingData, *, rank: int, world_size: int, device: torch.device | None = None
) -> Iterator[EvaluationLoader | None]:
    """The source of validation while training, or None where the recipe names none."""
    if data.validation is None:
        yield None
        return
    with evaluation_loader(
        recipe,
        data.validation,
        data.targets,
        views=recipe.data.views,
        rank=rank,
        world_size=world_size,
        device=device,
    ) as loader:
        yield loader
