"""From a recipe to the parts that train: shard sets, loaders, model. Every rank calls these with its own rank."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ca2st.errors import UserInputError
from ca2st.model.build import build_model
from ca2st.model.config import ModelKind, TargetSpec, check_clip
from ca2st.model.holistic import HolisticModel
from ca2st.model.parameters import set_trainable
from ca2st.model.structure import EXPERTS, ExpertName
from ca2st.weights.experts import load_expert_file
from ca2st.weights.hub_names import is_hub_name, resolve_hub_name
from pipelines.draws import EvaluationViews
from pipelines.loader import EvaluationLoader, TrainLoader
from pipelines.quarantine import FOLDER_NAME as QUARANTINE_FOLDER
from pipelines.sample_plan import SamplePlan, training_plan
from pipelines.shard_sets import check_agreement
from ray_jobs.config.recipe import Recipe
from sharding.manifest import Manifest, ShardSet, read_shard_set


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
        UserInputError: the recipe names no training shards, or the splits have other classes or audio.
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
            _require_same(train.manifest, validation.manifest, name)
    check_agreement(train_sets, targets)
    return TrainingData(train_sets=train_sets, validation=validation, targets=targets)


def preflight(recipe: Recipe) -> TrainingData:
    """Everything that can be refused before a folder is made or a process is started; raises as `open_data`.

    Raises:
        UserInputError: as `check_settings`, or as `sample_plan`.
        PlanError: fewer samples than the batch or the workers need.
    """
    check_settings(recipe)
    data = open_data(recipe)
    sample_plan(recipe, data).require_enough(world_size=recipe.launch.workers)
    return data


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


def check_settings(recipe: Recipe) -> None:
    """Refuse what the recipe alone shows to be wrong; no data is read and nothing is fetched.

    Raises:
        UserInputError: a line for each of these: clip and model do not fit, pairs are mixed by what the model does not
            read, it has no such expert, or an expert's file is not there or its public name not known.
    """
    problems = list(_setting_problems(recipe))
    if problems:
        raise UserInputError("\n".join(problems))


def _setting_problems(recipe: Recipe) -> Iterator[str]:
    own = EXPERTS[recipe.model.kind]
    mixing = recipe.data.augment.mixing
    try:
        check_clip(recipe.model, recipe.clip)
    except UserInputError as error:
        yield f"clip.{error}"
    if mixing.probability > 0 and mixing.spectrogram == "cutmix" and "audio" not in own:
        yield (
            f"data.augment.mixing.spectrogram: expected 'mixup' for {recipe.model.kind}, which does not hear, found "
            "'cutmix'; the labels would follow a box that the model never sees"
        )
    if mixing.probability > 0 and mixing.switch_probability > 0 and own == ("audio",):
        yield (
            "data.augment.mixing.switch_probability: expected 0 for audio, which does not see, found "
            f"{mixing.switch_probability}; the labels would follow a box that the model never sees"
        )
    for name, source in recipe.experts.sources().items():
        if (problem := _source_problem(name, source, kind=recipe.model.kind)) is not None:
            yield problem


def _source_problem(name: ExpertName, source: str, *, kind: ModelKind) -> str | None:
    """What is wrong with the file or public name of an expert, or None."""
    own = EXPERTS[kind]
    if name not in own:
        return (
            f"experts.{name}: expected experts of {kind}, which are {', '.join(own)}, found {source}; "
            "remove the setting or choose another model.kind"
        )
    if is_hub_name(source):
        try:
            resolve_hub_name(source)
        except UserInputError as error:
            return f"experts.{name}: {error}"
    elif not Path(source).is_file():
        return (
            f"experts.{name}: expected a safetensors file, found none at {source}; check the path, or give a "
            "public name (hf-hub:..., open_clip:..., timm:...)"
        )
    return None


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
    """Every sample of `shard_set` once, in `views` each; with one lane in the set's own order. `device` as there."""
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
