"""From a recipe to the parts that train: shard sets, loaders, model. Every rank calls these with its own rank."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ca2st.errors import UserInputError
from ca2st.model.build import build_model
from ca2st.model.config import TargetSpec, check_clip
from ca2st.model.holistic import HolisticModel
from ca2st.model.parameters import set_trainable
from ca2st.model.structure import EXPERTS, ExpertName
from ca2st.weights.experts import load_expert_file
from ca2st.weights.hub_names import is_hub_name, resolve_hub_name
from pipelines.draws import EvaluationViews
from pipelines.loader import EvaluationLoader, TrainLoader
from ray_jobs.config import Recipe
from sharding.manifest import Manifest, ShardSet, read_shard_set


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """The shard sets of a run, opened and found to agree."""

    train: ShardSet
    validation: ShardSet | None
    targets: tuple[str, ...]
    """Label spaces that are learned, in the order of the batches' label columns."""

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hash of each set's manifest, by role."""
        sets = {"train": self.train, "validation": self.validation}
        return {role: shard_set.manifest.fingerprint for role, shard_set in sets.items() if shard_set is not None}

    @property
    def classes(self) -> dict[str, list[str]]:
        """Class names of each target."""
        return {name: list(self.train.manifest.label_space(name).classes) for name in self.targets}


def open_data(recipe: Recipe) -> TrainingData:
    """Read the manifests a recipe names.

    Raises:
        UserInputError: the recipe names no training shards, or the splits have other classes or audio.
        ManifestError, ShardDamageError: a set that cannot be read.
    """
    if recipe.data.train is None:
        raise UserInputError("data.train: names no shards; give --data DIR or a [data.synthetic] section")
    train = read_shard_set(Path(recipe.data.train))
    validation = read_shard_set(Path(recipe.data.validation)) if recipe.data.validation is not None else None
    targets = recipe.data.targets or train.manifest.targets
    for name in targets:
        train.manifest.label_space(name)
        if validation is not None:
            _require_same(train.manifest, validation.manifest, name)
    return TrainingData(train=train, validation=validation, targets=targets)


def preflight(recipe: Recipe) -> TrainingData:
    """Everything that can be refused before a folder is made or a process is started; raises as `open_data`.

    Raises:
        UserInputError: as `check_settings`.
    """
    check_settings(recipe)
    return open_data(recipe)


def check_settings(recipe: Recipe) -> None:
    """Refuse what the recipe alone shows to be wrong; no data is read and nothing is fetched.

    Raises:
        UserInputError: clip and model do not fit, the model has no such expert, or an expert's file is not there or its
            public name not known.
    """
    check_clip(recipe.model, recipe.clip)
    own = EXPERTS[recipe.model.kind]
    for name, source in recipe.experts.sources().items():
        if name not in own:
            raise UserInputError(
                f"experts.{name}: expected experts of {recipe.model.kind}, which are {', '.join(own)}, found {source}; "
                "remove the setting or choose another model.kind"
            )
        if is_hub_name(source):
            with _naming(name):
                resolve_hub_name(source)
        elif not Path(source).is_file():
            raise UserInputError(
                f"experts.{name}: expected a safetensors file, found none at {source}; check the path, or give a "
                "public name (hf-hub:..., open_clip:..., timm:...)"
            )


def _require_same(train: Manifest, validation: Manifest, target: str) -> None:
    if train.label_space(target).sha256 != validation.label_space(target).sha256:
        raise UserInputError(
            f"label space {target!r}: validation and training have other classes; convert both with one class list"
        )
    if train.audio.sample_rate_hz != validation.audio.sample_rate_hz:
        raise UserInputError(
            f"audio: trained at {train.audio.sample_rate_hz} Hz, validated at {validation.audio.sample_rate_hz} Hz; "
            "convert both with one --sample-rate"
        )


def target_specs(classes: Mapping[str, list[str]]) -> tuple[TargetSpec, ...]:
    """What the head predicts."""
    return tuple(TargetSpec(name=name, num_classes=len(names)) for name, names in classes.items())


def make_model(recipe: Recipe, classes: Mapping[str, list[str]]) -> HolisticModel:
    """The recipe's model, with the weights of the expert files it names and what is trained marked so."""
    model = build_model(recipe.model, recipe.clip, target_specs(classes), seed=recipe.training.seed)
    _load_experts(model, recipe.experts.files())
    set_trainable(model, recipe.trainable)
    return model


def outline_model(recipe: Recipe, classes: Mapping[str, list[str]]) -> HolisticModel:
    """The model that `make_model` would make, on the meta device: names and shapes alone, refused for the same reasons.

    Expert files are compared by names and shapes; public names, which are no files yet, are left out.
    """
    with torch.device("meta"):
        model = build_model(recipe.model, recipe.clip, target_specs(classes))
    sources = recipe.experts.sources().items()
    _load_experts(model, {name: Path(source) for name, source in sources if not is_hub_name(source)})
    set_trainable(model, recipe.trainable)
    return model


def _load_experts(model: HolisticModel, files: Mapping[ExpertName, Path]) -> None:
    for name, path in files.items():
        with _naming(name):
            load_expert_file(model, name, path)


@contextmanager
def _naming(expert: ExpertName) -> Iterator[None]:
    """Put the setting of `expert` before what its source is refused for."""
    try:
        yield
    except UserInputError as error:
        raise UserInputError(f"experts.{expert}: {error}") from error


def train_loader(recipe: Recipe, data: TrainingData, *, rank: int, world_size: int) -> TrainLoader:
    """The shuffled, augmented, resumable source of a rank."""
    return TrainLoader(
        data.train,
        recipe.clip,
        data.targets,
        sampling=recipe.data.sampling,
        augment=recipe.data.augment,
        loader=recipe.data.loader,
        seed=recipe.training.seed,
        global_batch_size=recipe.training.global_batch_size,
        rank=rank,
        world_size=world_size,
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
) -> EvaluationLoader:
    """Every sample of `shard_set` once, in `views` each; with one lane in the set's own order."""
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
    )


@contextmanager
def validation_loader(
    recipe: Recipe, data: TrainingData, *, rank: int, world_size: int
) -> Iterator[EvaluationLoader | None]:
    """The source of validation while training, or None where the recipe names none."""
    if data.validation is None:
        yield None
        return
    with evaluation_loader(
        recipe, data.validation, data.targets, views=recipe.data.views, rank=rank, world_size=world_size
    ) as loader:
        yield loader
