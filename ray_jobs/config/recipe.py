"""Recipes: one TOML file a run, read strictly into the dataclasses of the components it configures.

An unknown key, a wrong type and a value out of range are all reported at once, with file:line and the nearest
known name. What a recipe does not say has the default documented beside its field.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import ConfigDict, TypeAdapter

from ca2st.errors import UserInputError
from ca2st.model.choices import ExpertPrecision, check_expert_precision, check_trainable
from ca2st.model.config import ModelConfig
from ca2st.model.structure import ExpertName
from ca2st.spec import ClipSpec
from ca2st.training.config import OptimConfig, TrainingConfig
from ca2st.training.documents import flatten
from ray_jobs.config.data import DataConfig
from ray_jobs.config.launch import LaunchConfig
from ray_jobs.config.limits import beyond_limits
from ray_jobs.config.mistakes import told
from ray_jobs.config.tracking import TrackingConfig
from ray_jobs.errors import ConflictsError, RecipeError
from ray_jobs.redaction import refuse_credentials

_STRICT = ConfigDict(extra="forbid", strict=True)


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
        """What sections ask of each other; every message begins with the key to change."""
        if problems := list(_conflicts(self)):
            raise ConflictsError(problems)


def _conflicts(recipe: Recipe) -> Iterator[str]:
    training, augment = recipe.training, recipe.data.augment
    checks: list[Callable[[], None]] = [
        lambda: refuse_credentials(asdict(recipe)),
        lambda: check_trainable(recipe.trainable),
        lambda: check_expert_precision(recipe.experts.precision, training=training.precision),
        lambda: augment.mixing.check_even("training.global_batch_size", training.global_batch_size),
        lambda: augment.mixing.check_even("training.per_device_batch_size", training.per_device_batch_size),
        lambda: augment.spectrogram.check_rows("data.augment.spectrogram.roll_rows", recipe.clip.mel_rows),
    ]
    for check in checks:
        try:
            check()
        except UserInputError as error:
            yield str(error)
    if recipe.start is not None and (sources := recipe.experts.sources()):
        yield (
            f"start.checkpoint: brings its own experts, found files for {', '.join(sources)} under [experts] too; "
            "remove one of the two"
        )
    if recipe.trainable == "head" and recipe.optim.layer_decay != 1:
        yield (
            f"optim.layer_decay: expected 1 where only the head is trained, found {recipe.optim.layer_decay}; "
            "no layer is there to be slowed down"
        )
    if recipe.optim.warmup_epochs > training.epochs:
        yield (
            f"optim.warmup_epochs: expected at most training.epochs = {training.epochs}, found "
            f"{recipe.optim.warmup_epochs}; shorten the warm-up or train longer"
        )
    yield from beyond_limits(flatten(asdict(recipe)))


_ADAPTER = TypeAdapter(Recipe)


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
        mistakes = "\n  ".join(line for mistake in error.errors() for _, line in told(mistake, Recipe, source=where))
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
    "training.collective_timeout_seconds",
)


def identity_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings a resumed run must share: those that change the numbers.

    Left out: paths (data, experts and the checkpoint to start from count by their hashes, a mixture's weights by the
    loader's record), tracking, how many processes train, threads, how often checkpoints are kept, and what saves memory
    or time at equal numbers up to rounding.
    """
    flat = flatten(recipe_document(recipe))
    return {name: value for name, value in flat.items() if not name.startswith(_NOT_IDENTITY)}
