"""The shard sets that a recipe names, opened and compared, and which of their samples a training reads."""

from dataclasses import dataclass

from ca2st.errors import UserInputError
from ca2st.model.structure import EXPERTS
from pipelines.preflight import check_manifest, check_sound, require_sound
from pipelines.sample_plan import SamplePlan, training_plan
from pipelines.shard_sets import check_agreement
from ray_jobs.config.recipe import Recipe
from sharding.manifest import Manifest
from sharding.shard_set import ShardSet, read_shard_set


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
        """The first training set; the others have the same classes of every target and the same sample rate."""
        return self.train_sets[0]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hash of each set's manifest, by role."""
        sets: dict[str, ShardSet | None] = {"train": self.train, "validation": self.validation}
        sets |= {f"train_{number}": one for number, one in enumerate(self.train_sets[1:], start=2)}
        return {role: shard_set.manifest.fingerprint for role, shard_set in sets.items() if shard_set is not None}

    @property
    def datasets(self) -> dict[str, str]:
        """Name of the dataset, by role; those of a mixture joined."""
        names = {"train": " + ".join(dict.fromkeys(one.manifest.dataset for one in self.train_sets))}
        return names if self.validation is None else names | {"validation": self.validation.manifest.dataset}

    @property
    def classes(self) -> dict[str, list[str]]:
        """Class names of each target."""
        return {name: list(self.train.manifest.label_space(name).classes) for name in self.targets}


def open_data(recipe: Recipe) -> TrainingData:
    """Read the manifests a recipe names.

    Raises:
        UserInputError: the recipe names no training shards, the splits have other classes or audio, or
            the model hears and a set is without sound.
        ManifestError, ShardDamageError: a set that cannot be read.
    """
    folders = [recipe.data.train] if recipe.data.train is not None else [one.train for one in recipe.data.mixture]
    storage = recipe.data.loader.storage
    train_sets = tuple(read_shard_set(folder, storage=storage) for folder in folders)
    if not train_sets:
        raise UserInputError("data.train: names no shards; give --data DIR or a [data.synthetic] section")
    train = train_sets[0]
    place = recipe.data.validation
    validation = read_shard_set(place, storage=storage) if place is not None else None
    targets = recipe.data.targets or train.manifest.targets
    for name in targets:
        train.manifest.label_space(name)
        if validation is not None:
            _require_same_classes(train.manifest, validation.manifest, name)
    check_agreement(train_sets, targets)
    data = TrainingData(train_sets=train_sets, validation=validation, targets=targets)
    _check_sounds(recipe, data)
    return data


def _require_same_classes(train: Manifest, validation: Manifest, target: str) -> None:
    if train.label_space(target).sha256 != validation.label_space(target).sha256:
        raise UserInputError(
            f"label space {target!r}: validation and training have other classes; convert both with one class list"
        )


def _check_sounds(recipe: Recipe, data: TrainingData) -> None:
    """Refuse spectrograms of another width, and what a model that hears cannot hear or would hear otherwise."""
    sets = [*data.train_sets, *([] if data.validation is None else [data.validation])]
    for shard_set in sets:
        check_manifest(shard_set, recipe.clip)
    if "audio" not in EXPERTS[recipe.model.kind]:
        return
    for shard_set in sets:
        require_sound(shard_set, whose=f"model.kind {recipe.model.kind!r}")
        check_sound(shard_set, data.train.manifest.audio, whose=data.train.where)


def sample_plan(recipe: Recipe, data: TrainingData) -> SamplePlan:
    """Which samples a training on `data` reads, and in how many steps; raises as `training_plan`."""
    return training_plan(
        data.train_sets,
        data.targets,
        recipe.data.order(),
        seed=recipe.training.seed,
        global_batch_size=recipe.training.global_batch_size,
        num_lanes=recipe.data.loader.num_lanes,
        shuffle_block=recipe.data.loader.shuffle_block,
    )
