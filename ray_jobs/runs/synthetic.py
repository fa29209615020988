"""Shards of the synthetic world for recipes that name no data of their own, and for the demo."""

from dataclasses import replace
from pathlib import Path

from ca2st.checked_json import sha256_of_json
from ca2st.errors import UserInputError, check_choice
from ca2st.processes import num_cores
from ray_jobs.config.recipe import Recipe
from ray_jobs.config.sections import SyntheticData
from ray_jobs.console import progress
from ray_jobs.conversion import convert_shown
from sharding.datasets import DatasetRequest, read_dataset
from sharding.datasets.synthetic import TASKS
from sharding.settings import ConversionConfig
from sharding.synthetic.factors import label_spaces


def with_synthetic_shards(recipe: Recipe, runs_root: Path) -> Recipe:
    """The recipe with `data.train` and `data.validation` naming shards, made now if they are not there yet."""
    world = recipe.data.synthetic
    if world is None or recipe.data.train is not None:
        return recipe
    folder = runs_root / "data" / f"synthetic-{sha256_of_json(repr(world))[:12]}"
    splits = {split: make_split(world, split, folder) for split in ("train", "validation")}
    data = replace(recipe.data, train=str(splits["train"]), validation=str(splits["validation"]))
    return replace(recipe, data=data)


def synthetic_classes(recipe: Recipe) -> dict[str, list[str]] | None:
    """Class names of each target of the shards that `with_synthetic_shards` would make; None where it makes none.

    Raises:
        UserInputError: an unknown task, or a target that its world does not label.
    """
    world = recipe.data.synthetic
    if world is None or recipe.data.train is not None:
        return None
    check_choice("data.synthetic.task", world.task, TASKS)
    spaces = {space.name: list(space.classes) for space in label_spaces(world.world("train"))}
    targets = recipe.data.targets or (world.task,)
    if missing := [name for name in targets if name not in spaces]:
        raise UserInputError(
            f"data.targets: expected label spaces of the synthetic world, which are {', '.join(spaces)}; "
            f"found {', '.join(missing)}"
        )
    return {name: spaces[name] for name in targets}


def make_split(world: SyntheticData, split: str, folder: Path) -> Path:
    """Draw, sound and convert one split under `folder`; finished parts are kept, so calling again is cheap."""
    config = world.world(split, workers=num_cores())
    shards = folder / "shards" / split
    with progress(f"Drawing synthetic/{split}", config.num_samples) as update:
        source = read_dataset(
            "synthetic",
            DatasetRequest(
                media=folder / "media",
                split=split,
                task=world.task,
                synthetic=config,
                progress=lambda done, _total: update(done, ""),
            ),
        )
    convert_shown(source, shards, ConversionConfig(short_side=world.frame_size, workers=num_cores()))
    return shards
