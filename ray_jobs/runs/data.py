"""The data of a run: the shard sets that a recipe names, opened and compared, their loaders, a synthetic world."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ca2st.checked_json import sha256_of_json
from ca2st.errors import UserInputError, check_choice
from ca2st.model.config import EXPERTS
from ca2st.processes import num_cores
from pipelines.config import EvaluationSetup, TrainSetup
from pipelines.loader import EvaluationLoader
from pipelines.quarantine import FOLDER_NAME as QUARANTINE_FOLDER
from pipelines.storage.shard_sets import check_agreement, check_manifest, check_sound, require_labels, require_sound
from pipelines.views import EvaluationViews
from ray_jobs.config.recipe import Recipe, SyntheticData
from ray_jobs.console import progress
from sharding.format.shard_set import Labelling, ShardSet, classes_that_differ, read_shard_set
from sharding.synthetic.factors import TASKS, label_spaces


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """The shard sets of a run, opened and found to agree."""

    train_sets: tuple[ShardSet, ...]
    """One, or those of a mixture."""
    validation: ShardSet | None
    targets: tuple[str, ...]
    """Label spaces that are learned, in the order of the batches' label columns."""

    @property
    def train(self) -> ShardSet:
        """Return the first training set; the others have the same classes of every target and the same sample rate."""
        return self.train_sets[0]

    @property
    def sets(self) -> tuple[ShardSet, ...]:
        """Return all of them."""
        return self.train_sets if self.validation is None else (*self.train_sets, self.validation)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Return the hash of each set's manifest, by role."""
        sets: dict[str, ShardSet | None] = {"train": self.train, "validation": self.validation}
        sets |= {f"train_{number}": one for number, one in enumerate(self.train_sets[1:], start=2)}
        return {role: shard_set.manifest.fingerprint for role, shard_set in sets.items() if shard_set is not None}

    @property
    def datasets(self) -> dict[str, str]:
        """Return the name of the dataset, by role; those of a mixture joined."""
        names = {"train": " + ".join(dict.fromkeys(one.manifest.dataset for one in self.train_sets))}
        return names if self.validation is None else names | {"validation": self.validation.manifest.dataset}

    @property
    def labelling(self) -> Labelling:
        """Return how many labels a sample has: ``one`` of each target, or ``several``."""
        return self.train.manifest.labelling

    @property
    def classes(self) -> dict[str, list[str]]:
        """Return the class names of each target."""
        return {name: list(self.train.manifest.label_space(name).classes) for name in self.targets}


def open_data(recipe: Recipe) -> TrainingData:
    """Read the manifests a recipe names.

    Raises:
        UserInputError: it names none, splits have other classes or audio, or one has no sound for a model that hears.
        ManifestError, ShardDamageError: a set that cannot be read.
    """
    folders = [recipe.data.train] if recipe.data.train is not None else [one.train for one in recipe.data.mixture]
    storage = recipe.data.loader.storage
    train_sets = tuple(read_shard_set(folder, storage=storage) for folder in folders)
    if not train_sets:
        raise UserInputError("data.train: names no shards; give --data DIR or a [data.synthetic] section")
    train, place, kind = train_sets[0], recipe.data.validation, recipe.model.kind
    validation = read_shard_set(place, storage=storage) if place is not None else None
    targets = recipe.data.targets or train.manifest.targets
    data = TrainingData(train_sets=train_sets, validation=validation, targets=targets)
    for shard_set in data.sets:
        what = "validation" if shard_set is validation else "training"
        require_labels(shard_set, what=what, labelling=train.manifest.labelling)
    for name in targets:
        ours = train.manifest.label_space(name).classes
        theirs = ours if validation is None else validation.manifest.label_space(name).classes
        if ours != theirs:
            differing = classes_that_differ(ours, theirs, where=("in training", "in validation"))
            raise UserInputError(
                f"label space {name!r}: validation has {len(theirs)} classes that are not the {len(ours)} of training: "
                f"{differing}; convert both with one class list (--classes)"
            )
    check_agreement(train_sets, targets)
    for shard_set in data.sets:
        check_manifest(shard_set, recipe.clip)
        if "audio" in EXPERTS[kind]:
            require_sound(shard_set, whose=f"model.kind {kind!r}")
            check_sound(shard_set, train.manifest.audio, whose=train.where)
    return data


def train_setup(
    recipe: Recipe,
    data: TrainingData,
    *,
    rank: int = 0,
    world_size: int = 1,
    run_dir: Path | None = None,
    device: torch.device | None = None,
) -> TrainSetup:
    """Return what the shuffled, augmented, resumable `TrainLoader` of a rank needs, and the plan of all ranks.

    `run_dir` keeps the names of damaged samples. `device`: the rank's own, which decodes for itself where it can.
    """
    return TrainSetup(
        shard_sets=data.train_sets,
        clip=recipe.clip,
        targets=data.targets,
        sampling=recipe.data.sampling,
        augment=recipe.data.augment,
        loader=recipe.data.loader,
        seed=recipe.training.seed,
        global_batch_size=recipe.training.global_batch_size,
        order=recipe.data.order(),
        rank=rank,
        world_size=world_size,
        device=device,
        quarantine_folder=None if run_dir is None else run_dir / QUARANTINE_FOLDER,
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
    """Return every sample of `shard_set` once, in `views` each; with one lane in the set's own order.

    `device`: as for `train_setup`.
    """
    setup = EvaluationSetup(
        shard_set=shard_set,
        clip=recipe.clip,
        targets=targets,
        sampling=recipe.data.sampling,
        views=views,
        loader=recipe.data.loader,
        global_batch_size=recipe.training.per_device_batch_size * world_size,
        num_lanes=num_lanes,
        rank=rank,
        world_size=world_size,
        device=device,
    )
    return EvaluationLoader(setup)


def with_synthetic_shards(recipe: Recipe, runs_root: Path) -> Recipe:
    """Return the recipe with `data.train` and `data.validation` naming shards, made now if they are not there yet."""
    world = recipe.data.synthetic
    if world is None or recipe.data.train is not None:
        return recipe
    folder = runs_root / "data" / f"synthetic-{sha256_of_json(repr(world))[:12]}"
    splits = {split: make_split(world, split, folder) for split in ("train", "validation")}
    data = replace(recipe.data, train=str(splits["train"]), validation=str(splits["validation"]))
    return replace(recipe, data=data)


def synthetic_classes(recipe: Recipe) -> dict[str, list[str]] | None:
    """Return the classes of each target of the shards that `with_synthetic_shards` would make, or None.

    An unknown task, or a target that its world does not label, is a UserInputError.
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
    from ray_jobs.console import convert_shown
    from sharding.datasets import DatasetRequest, read_dataset
    from sharding.settings import ConversionConfig

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
