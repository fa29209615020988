"""Recipes: one TOML file a run, read strictly into the dataclasses of the components it configures.

An unknown key, a wrong type and a value out of range are all reported at once, with file:line and the nearest
known name. What a recipe does not say has the default documented beside its field.
"""

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pydantic
from pydantic import ConfigDict, TypeAdapter

from ca2st.errors import UserInputError
from ca2st.model.config import ModelConfig
from ca2st.model.structure import ExpertName
from ca2st.spec import ClipSpec
from ca2st.training.config import OptimConfig, TrainingConfig
from ca2st.training.documents import flatten
from pipelines.draws import AugmentConfig, EvaluationViews
from pipelines.loader import LoaderConfig
from pipelines.sampling import SamplingConfig
from ray_jobs.errors import RecipeError
from ray_jobs.toml_lines import key_lines, line_of

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
    task: str = "holistic"
    """What is labelled: ``space``, ``time``, ``audio`` or all three together, ``holistic``."""
    seed: int = 0
    """Seed of the world; the splits never share a clip."""

    def __post_init__(self) -> None:
        if min(self.num_train, self.num_validation) < 1:
            raise UserInputError("num_train, num_validation: expected at least one clip each")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which shards, which labels, and how clips are drawn from them."""

    train: str | None = None
    """Folder of the training split's shards (``--data`` overrides it)."""
    validation: str | None = None
    """Folder of the validation split's shards; None: no validation."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """Where the experts' weights come from, and whether they stay as they are."""

    spatial: str | None = None
    """Safetensors file of the spatial expert (from ``ca2st weights import`` or an earlier run); None: random."""
    temporal: str | None = None
    """The same for the temporal expert."""
    audio: str | None = None
    """The same for the audio expert."""
    frozen: bool = True
    """True: only what the method adds is trained. False: everything, as when a small expert is pretrained."""

    def files(self) -> dict[ExpertName, Path]:
        """The named files by expert."""
        named: dict[ExpertName, str | None] = {"spatial": self.spatial, "temporal": self.temporal, "audio": self.audio}
        return {expert: Path(path) for expert, path in named.items() if path is not None}


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
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: TrainingConfig
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)


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
    try:
        return recipe_from_document(document)
    except pydantic.ValidationError as error:
        lines = key_lines(text)
        mistakes = [_describe(mistake, source, lines, overrides) for mistake in error.errors()]
        raise RecipeError("\n".join(mistakes)) from error


def recipe_from_document(document: Mapping[str, Any]) -> Recipe:
    """The recipe of a parsed TOML or JSON document; pydantic's ValidationError lists every mistake."""
    return _ADAPTER.validate_json(json.dumps(document))


def recipe_document(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values; `recipe_from_document` is its inverse."""
    document: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return document


_NOT_IDENTITY = (
    "name",
    "tracking.",
    "launch.",
    "data.train",
    "data.validation",
    "data.synthetic",
    "data.loader.fetch_threads",
    "data.loader.decode_threads",
    "data.loader.prefetch_steps",
    "data.loader.verify",
    "experts.spatial",
    "experts.temporal",
    "experts.audio",
    "training.checkpoint_every_steps",
    "training.keep_checkpoints",
)


def identity_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings a resumed run must share: those that change the numbers.

    Left out: paths (data and experts count by their hashes), tracking, how many processes train, threads and how
    often checkpoints are kept.
    """
    flat = flatten(recipe_document(recipe))
    return {name: value for name, value in flat.items() if not name.startswith(_NOT_IDENTITY)}


def known_recipes() -> list[str]:
    """File names of the recipes that ship with the package."""
    folder = resources.files("ray_jobs") / "recipes"
    return sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".toml"))


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


def _describe(mistake: Any, source: str, lines: Mapping[str, int], overrides: Sequence[str]) -> str:
    path = ".".join(str(part) for part in mistake["loc"])
    line = line_of(dict(lines), path)
    overridden = any(override.startswith(f"{path}=") for override in overrides)
    where = f"--set {path}" if overridden else f"{source}:{line}" if line else source
    kind = mistake["type"]
    if kind == "unexpected_keyword_argument":
        return f"{where}: {path}: unknown key{_suggestion(mistake['loc'])}"
    if kind in ("missing", "missing_argument"):
        return f"{where}: {path}: required, but not given"
    message = mistake["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{where}: {path}: {message}"
    return f"{where}: {path}: {message}, found {mistake['input']!r}"


def _suggestion(loc: Sequence[Any]) -> str:
    known = _known_keys([str(part) for part in loc[:-1]])
    near = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else f"; known are {', '.join(known)}"


def _known_keys(tables: Sequence[str]) -> list[str]:
    """Field names of the section at `tables`."""
    current: Any = Recipe
    for table in tables:
        kinds = {entry.name: entry.type for entry in fields(current)}
        current = next((kind for kind in _options(kinds.get(table)) if is_dataclass(kind)), None)
        if current is None:
            return []
    return [entry.name for entry in fields(current)]


def _options(kind: Any) -> tuple[Any, ...]:
    return getattr(kind, "__args__", (kind,))
