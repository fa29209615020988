"""Recipes: one TOML file a run, read strictly into the dataclasses of the components it configures.

An unknown key, a wrong type and a value out of range are all reported at once, with file:line and the nearest
known name. What a recipe does not say has the default documented beside its field.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import ConfigDict, TypeAdapter

from ca2st.errors import UserInputError
from ca2st.model.config import ModelConfig
from ca2st.model.parameters import check_trainable
from ca2st.model.precision import ExpertPrecision, check_expert_precision
from ca2st.model.presets import find_preset
from ca2st.model.structure import ExpertName
from ca2st.spec import ClipSpec
from ca2st.training.config import OptimConfig, TrainingConfig
from ca2st.training.documents import flatten
from pipelines.augment.config import AugmentConfig
from pipelines.balance import BalanceConfig
from pipelines.draws import EvaluationViews
from pipelines.loader import LoaderConfig
from pipelines.sample_plan import OrderConfig, TrainRemainder
from pipelines.sampling import SamplingConfig
from pipelines.selection import SelectionConfig
from ray_jobs.errors import RecipeError
from ray_jobs.recipe_mistakes import dates_in, place_of, told
from ray_jobs.toml_lines import key_lines
from sharding.location import as_location
from sharding.synthetic.config import SyntheticConfig

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticData:
    """A small audio-visual world made by our own code, so that a recipe runs without any download."""

    num_train: int = 512
    """Clips of the training split."""
    num_validation: int = 128
    """Clips of the validation split."""
    frame_size: int = 64
    """Height and width of its frames in pixels."""
    frames_per_second: int = 16
    """Frame rate of its videos."""
    min_frames: int = 16
    """Frames of its shortest clip; all clips of ``binding`` have this many."""
    max_frames: int = 21
    """Frames of its longest clip."""
    task: str = "holistic"
    """What is labelled: ``space``, ``time``, ``audio`` or all three together, ``holistic``; or, in scenes of several
    objects, ``binding``: which of them keeps time with the sound."""
    difficulty: str = "easy"
    """``easy``, ``medium`` or ``hard``; sharding/synthetic/README.md says what each means."""
    seed: int = 0
    """Seed of the world; the splits never share a clip."""

    def __post_init__(self) -> None:
        if min(self.num_train, self.num_validation) < 1:
            raise UserInputError("num_train, num_validation: expected at least one clip each")
        self.world("train")

    def world(self, split: str, *, workers: int = 1) -> SyntheticConfig:
        """The settings of one split for those who make it.

        Raises:
            UserInputError: a value out of range.
        """
        return SyntheticConfig(
            num_samples=self.num_train if split == "train" else self.num_validation,
            frame_size=self.frame_size,
            frames_per_second=self.frames_per_second,
            min_frames=self.min_frames,
            max_frames=self.max_frames,
            difficulty=self.difficulty,
            binding=self.task == "binding",
            seed=self.seed,
            workers=workers,
        )


def check_place(name: str, place: str) -> None:
    """Refuse a URL that is not read, or that carries a secret; `name` is the setting.

    Raises:
        UserInputError: as `as_location`; the message holds no secret.
    """
    try:
        as_location(place)
    except UserInputError as error:
        raise UserInputError(f"{name}: {error}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureSet:
    """One of several shard sets that are trained on together: a ``[[data.mixture]]`` section."""

    train: str
    """Folder or URL of its shards. Every set must have the same classes for each target, in the same order."""
    weight: float | None = None
    """Its share of the samples, in parts of the sum of all weights; given for every set or for none. None: every sample
    of every set once an epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which shards, which labels, and how clips are drawn from them."""

    train: str | None = None
    """Folder or URL (s3, gs, http) of the training split's shards (``--data`` overrides it)."""
    mixture: tuple[MixtureSet, ...] = ()
    """Several shard sets in place of `train`."""
    select: SelectionConfig = field(default_factory=SelectionConfig)
    """Train on a part of the samples; validation stays whole."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Read rare classes more often in training; with weights, inside each set."""
    repeats: int = 1
    """Readings of each sample in a training batch, each with random views of its own: repeated augmentation. An epoch
    has as many times the steps; 1 is none. Source: Hoffer et al., "Augment your batch" (CVPR 2020)."""
    epoch_samples: int | None = None
    """Samples of an epoch before `repeats`; None: one pass, that is all sets' samples together."""
    remainder: TrainRemainder = "drop"
    """The end of an epoch that fills no whole batch: ``drop`` leaves it out, other samples each epoch; ``wrap`` fills
    the batch with the beginning of one more pass, so that all are read, even where they are fewer than a batch."""
    validation: str | None = None
    """Folder or URL of the validation split's shards; None: no validation."""
    synthetic: SyntheticData | None = None
    """Make this world's shards first, where `train` names none."""
    targets: tuple[str, ...] | None = None
    """Label spaces to learn, by name; None: the manifest's own targets."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Which frames of a clip."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random views in training."""
    views: EvaluationViews = field(default_factory=EvaluationViews)
    """Views a sample in validation while training."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """Order, threads, backend."""

    def __post_init__(self) -> None:
        for name, place in (("train", self.train), ("validation", self.validation)):
            if place is not None:
                check_place(name, place)
        for entry in self.mixture:
            check_place("mixture", entry.train)
        if self.mixture and (self.train is not None or self.synthetic is not None):
            other = "train" if self.train is not None else "synthetic"
            raise UserInputError(f"mixture: expected no data.{other} beside it; remove one of the two")
        weighted = [entry.train for entry in self.mixture if entry.weight is not None]
        if weighted and len(weighted) < len(self.mixture):
            bare = next(entry.train for entry in self.mixture if entry.weight is None)
            raise UserInputError(f"mixture: expected a weight for every set or for none, found none for {bare}")
        self.order()

    def order(self) -> OrderConfig:
        """What decides which samples a training reads, beside the sets themselves."""
        weights = tuple(entry.weight for entry in self.mixture if entry.weight is not None)
        return OrderConfig(
            weights=weights or None,
            selection=self.select,
            balance=self.balance,
            repeats=self.repeats,
            epoch_samples=self.epoch_samples,
            remainder=self.remainder,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """Where the experts' weights come from, and how those that stay as they are are held."""

    spatial: str | None = None
    """Safetensors file of the spatial expert (from ``ca2st weights import`` or an earlier run), or a public name that
    is fetched and imported when a run starts: ``hf-hub:ORG/NAME[@REVISION]``, ``open_clip:MODEL/TAG``, ``timm:NAME``;
    None: random."""
    temporal: str | None = None
    """The same for the temporal expert."""
    audio: str | None = None
    """The same for the audio expert."""
    precision: ExpertPrecision = "auto"
    """Type in which frozen weights of the experts are held: ``fp32``; ``bf16``, half the memory and the same numbers
    under ``training.precision = "bf16"``, which it needs; ``auto``: bf16 on a GPU that trains in it, else fp32."""

    def sources(self) -> dict[ExpertName, str]:
        """What is named, by expert: files and public names as they are written."""
        named: dict[ExpertName, str | None] = {"spatial": self.spatial, "temporal": self.temporal, "audio": self.audio}
        return {expert: source for expert, source in named.items() if source is not None}

    def files(self) -> dict[ExpertName, Path]:
        """The named files by expert, once public names have become files."""
        return {expert: Path(source) for expert, source in self.sources().items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class StartConfig:
    """Fine-tuning: a new run, with its own folder and schedule, that begins with the weights of a trained model."""

    checkpoint: str
    """A checkpoint folder, a run folder (its newest checkpoint), or a model file of ``ca2st weights import`` or
    ``export``. Only read when the run begins: what stays frozen is kept in the new run's folder."""
    head: Literal["keep", "new"] = "keep"
    """``keep``: label spaces of the same name must have the same classes, and keep their classifiers; others get new
    ones. ``new``: the whole head, last adapters included, is drawn anew."""
    resize_positions: bool = False
    """True: position tables of another number of frames, crop or spectrogram length are interpolated, not refused."""

    def __post_init__(self) -> None:
        if self.head not in ("keep", "new"):
            raise UserInputError(f"head: expected one of keep, new, found {self.head!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where the run is followed in MLflow."""

    uri: str | None = None
    """MLflow tracking URI; None: the environment's MLFLOW_TRACKING_URI, else ``sqlite:///runs/mlflow.db``."""
    experiment: str = "ca2st"
    """MLflow experiment: runs in one experiment are compared."""
    enabled: bool = True
    """False: only the journal is written; ``ca2st track sync`` can send it later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """How many processes train, and how Ray restarts them."""

    workers: int = 1
    """Training processes; one a GPU where there are GPUs."""
    threads_per_worker: int | None = None
    """Torch threads of a worker on a CPU; None: the machine's cores shared evenly. Losses are bit-equal only at
    the same number."""
    max_failures: int = 3
    """Restarts of the worker group by Ray before it gives up."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserInputError(f"workers: expected at least 1, found {self.workers}")


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class Recipe:
    """Everything that decides a training run."""

    name: str
    """Name of the run: its folder under ``runs/`` and its name in MLflow."""
    model: ModelConfig
    clip: ClipSpec
    data: DataConfig = field(default_factory=DataConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    start: StartConfig | None = None
    """Begin with the weights of a trained model; None: with the experts' files and a random rest."""
    trainable: str | tuple[str, ...] = "added"
    """What is trained: ``added`` (what the method adds to the frozen experts, as published), ``head``, ``adapters``
    (the layers' adapters and the head), ``all``, or patterns of parameter names, each of which must match."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: TrainingConfig
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        """What sections ask of each other; a message begins with the key to change."""
        check_trainable(self.trainable)
        check_expert_precision(self.experts.precision, training=self.training.precision)
        sources = self.experts.sources()
        if self.start is not None and sources:
            raise UserInputError(
                f"start.checkpoint: brings its own experts, found files for {', '.join(sources)} under [experts] too; "
                "remove one of the two"
            )
        if self.trainable == "head" and self.optim.layer_decay != 1:
            raise UserInputError(
                f"optim.layer_decay: expected 1 where only the head is trained, found {self.optim.layer_decay}; "
                "no layer is there to be slowed down"
            )
        for name in ("global_batch_size", "per_device_batch_size"):
            self.data.augment.mixing.check_even(f"training.{name}", getattr(self.training, name))
        if self.optim.warmup_epochs > self.training.epochs:
            raise UserInputError(
                f"optim.warmup_epochs: expected at most training.epochs = {self.training.epochs}, found "
                f"{self.optim.warmup_epochs}; shorten the warm-up or train longer"
            )


_ADAPTER = TypeAdapter(Recipe)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or one that ships with the package by its name, with ``a.b=value`` overrides.

    Raises:
        UserInputError: no such recipe.
        RecipeError: every mistake in it, with file:line.
    """
    text, source = _read(name_or_path)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{source}: not valid TOML: {error}") from error
    for override in overrides:
        _apply_override(document, override)
    lines = key_lines(text)
    if dates := list(dates_in(document)):
        raise RecipeError(
            "\n".join(
                f"{place_of(key, source=source, lines=lines, overrides=overrides)}: {key}: expected no date or time, "
                f'found {found}; write text in quotes: "{found}"'
                for key, found in dates
            )
        )
    try:
        _expand_preset(document)
    except UserInputError as error:
        where = place_of("model.preset", source=source, lines=lines, overrides=overrides)
        raise RecipeError(f"{where}: model.{error}") from error
    try:
        return recipe_from_document(document)
    except pydantic.ValidationError as error:
        mistakes = [
            told(mistake, Recipe, source=source, lines=lines, overrides=overrides) for mistake in error.errors()
        ]
        raise RecipeError("\n".join(mistakes)) from error


def recipe_from_document(document: Mapping[str, Any]) -> Recipe:
    """The recipe of a parsed TOML or JSON document; pydantic's ValidationError lists every mistake."""
    return _ADAPTER.validate_json(json.dumps(document))


def stored_recipe(document: Mapping[str, Any], *, where: str) -> Recipe:
    """The recipe that a run folder or checkpoint (`where`) keeps.

    Raises:
        RecipeError: it was written by a version whose recipes had other settings.
    """
    try:
        return recipe_from_document(document)
    except pydantic.ValidationError as error:
        mistakes = "\n  ".join(told(mistake, Recipe, source=where) for mistake in error.errors())
        raise RecipeError(
            f"{where}: its recipe is none of this version of ca2st; use the version that wrote it:\n  {mistakes}"
        ) from error


def recipe_document(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values; `recipe_from_document` is its inverse."""
    document: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return document


_NOT_IDENTITY = (
    "name",
    "tracking.",
    "launch.",
    "data.train",
    "data.mixture",
    "data.validation",
    "data.synthetic",
    "data.loader.fetch_threads",
    "data.loader.decode_threads",
    "data.loader.prefetch_steps",
    "data.loader.stall_timeout_seconds",
    "data.loader.verify",
    "data.loader.cache_",
    "data.loader.retry",
    "data.loader.on_error",
    "data.loader.quarantine_",
    "experts.spatial",
    "experts.temporal",
    "experts.audio",
    "experts.precision",
    "start.checkpoint",
    "training.checkpoint_every_steps",
    "training.keep_checkpoints",
    "training.activation_checkpointing",
    "training.compile",
)


def identity_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings a resumed run must share: those that change the numbers.

    Left out: paths (data, experts and the checkpoint to start from count by their hashes, a mixture's weights by the
    loader's record), tracking, how many processes train, threads, how often checkpoints are kept, and what saves memory
    or time at equal numbers up to rounding.
    """
    flat = flatten(recipe_document(recipe))
    return {name: value for name, value in flat.items() if not name.startswith(_NOT_IDENTITY)}


def known_recipes() -> list[str]:
    """File names of the recipes that ship with the package."""
    folder = resources.files("ray_jobs") / "recipes"
    return sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".toml"))


def _expand_preset(document: dict[str, Any]) -> None:
    """Put the settings of `[model] preset` below those that the recipe gives itself."""
    model = document.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return
    own = {key: value for key, value in model.items() if key != "preset"}
    document["model"] = _below(json.loads(json.dumps(asdict(find_preset(str(model["preset"])).config))), own)


def _below(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` over `base`, table by table."""
    merged = dict(base)
    for key, value in own.items():
        inner = merged.get(key)
        merged[key] = _below(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _read(name_or_path: str) -> tuple[str, str]:
    path = Path(name_or_path)
    if path.is_file():
        return path.read_text(encoding="utf-8"), str(path)
    name = name_or_path if name_or_path.endswith(".toml") else f"{name_or_path}.toml"
    known = known_recipes()
    if name in known:
        return (resources.files("ray_jobs") / "recipes" / name).read_text(encoding="utf-8"), name
    raise UserInputError(
        f"recipe {name_or_path}: no such file, nor a recipe of the package; those are {', '.join(known)}"
    )


def _apply_override(document: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set: expected section.key=value, found {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *tables, key = path.split(".")
    for table in tables:
        inner = document.setdefault(table, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {override}: {table} is a value, not a section")
        document = inner
    document[key] = value
