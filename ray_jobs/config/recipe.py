"""The recipe: sections checked strictly, mistakes with their lines.

Where a key stands in a TOML file: tomllib reads values but keeps no positions.

What is wrong with a recipe, told at its line, with the nearest known name.

Recipes: one TOML file a run, read strictly into the dataclasses of the components it configures.

An unknown key, a wrong type and a value out of range are all reported at once, with file:line and the nearest
known name. What a recipe does not say has the default documented beside its field.
"""

import datetime
import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import ConfigDict, TypeAdapter

from ca2st.errors import UserInputError, check_choice
from ca2st.model.config import ExpertPrecision, ModelConfig, check_expert_precision, check_trainable
from ca2st.model.structure import ExpertName
from ca2st.spec import ClipSpec
from ca2st.training.config import OptimConfig, TrainingConfig
from ca2st.training.journal import flatten
from ray_jobs.config.sections import DataConfig, LaunchConfig, TrackingConfig, beyond_limits
from ray_jobs.errors import ConflictsError, RecipeError
from ray_jobs.redaction import refuse_credentials

_TABLE = re.compile(r"^\s*(\[\[?)\s*([^\[\]]+?)\s*\]")
_KEY = re.compile(r"""^\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")


def key_lines(text: str) -> dict[str, int]:
    """Line number (from 1) of every dotted key and table header in `text`; tables of an array are numbered from 0.

    Lines inside multi-line strings may add entries that match no real key; they are never asked for.
    """
    lines: dict[str, int] = {}
    table, counts = "", Counter[str]()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _TABLE.match(line):
            table = _dotted(header[2])
            if header[1] == "[[":
                lines.setdefault(table, number)
                counts[table] += 1
                table = f"{table}.{counts[table] - 1}"
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            path = f"{table}.{_dotted(key[1])}" if table else _dotted(key[1])
            lines.setdefault(path, number)
    return lines


def _dotted(text: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in text.split("."))


def line_of(lines: dict[str, int], path: str) -> int | None:
    """Line of `path`, or of the nearest table around it; None when not even that is in the file."""
    while path:
        if path in lines:
            return lines[path]
        path = path.rpartition(".")[0]
    return None


_MOVED = {"experts.frozen": ' (now the top-level key trainable: "added" for true, "all" for false)'}


def told(
    mistake: Any,
    recipe_type: type,
    *,
    source: str,
    lines: Mapping[str, int] | None = None,
    overrides: Sequence[str] = (),
) -> list[tuple[str, str]]:
    """One of pydantic's mistakes as (key to change, ``file:line: key: what is wrong``); more where sections disagree.

    `recipe_type` is the dataclass that was read, `lines` where its keys stand in the file `source`; a key that an
    override set is told as such.
    """
    path = ".".join(str(part) for part in mistake["loc"])
    kind, told_lines = mistake["type"], list[tuple[str, str]]()
    for message in _messages(mistake):
        key, text = path, message
        if not path:  # sections at odds with each other: the recipe's own check names the key
            key, _, text = message.partition(": ")
        elif kind == "unexpected_keyword_argument":
            text = f"unknown key{_MOVED.get(path) or _suggestion(mistake['loc'], recipe_type)}"
        elif kind in ("missing", "missing_argument"):
            text = "required, but not given"
        elif kind != "value_error":
            text = f"{message}, found {mistake['input']!r}"
        blamed = blamed_key(key, text, recipe_type, overrides) if kind == "value_error" else key
        place = place_of(blamed, source=source, lines=lines, overrides=overrides)
        told_lines.append((blamed, f"{place}: {key}: {text}"))
    return told_lines


def blamed_key(path: str, message: str, recipe_type: type, overrides: Sequence[str] = ()) -> str:
    """The key that a refusal of the section `path` is about.

    It is the one that the message begins with, or one that it names and an override has set; else `path` itself.
    """
    known = _known_keys(path.split("."), recipe_type)
    first = re.split(r"[:, ]", message, maxsplit=1)[0].rpartition(".")[2]
    words = set(re.findall(r"\w+", message))
    set_here = [override.partition("=")[0] for override in overrides]
    named = [key for key in set_here if key.startswith(f"{path}.") and key.rpartition(".")[2] in words]
    if first in known and f"{path}.{first}" in set_here:
        return f"{path}.{first}"
    if named:
        return named[0]
    return f"{path}.{first}" if first in known else path


def place_of(path: str, *, source: str, lines: Mapping[str, int] | None = None, overrides: Sequence[str] = ()) -> str:
    """Where the key `path` was set: ``--set path``, ``file:line``, or the file alone where it is not in it.

    An override of a section around the key has set it too.
    """
    for override in reversed(overrides):
        key = override.partition("=")[0]
        if path == key or path.startswith(f"{key}."):
            return f"--set {key}"
    line = line_of(dict(lines or {}), path)
    return f"{source}:{line}" if line else source


def _messages(mistake: Any) -> list[str]:
    error = mistake.get("ctx", {}).get("error")
    if isinstance(error, ConflictsError):
        return list(error.messages)
    return [mistake["msg"].removeprefix("Value error, ")]


def dates_in(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Key and text of every date or time in a TOML document: values that TOML has and no setting takes."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from dates_in(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for inner in value:
            yield from dates_in(inner, path)
    elif isinstance(value, datetime.date | datetime.time):
        yield path, value.isoformat()


def _suggestion(loc: Sequence[Any], recipe_type: type) -> str:
    known = _known_keys([str(part) for part in loc[:-1]], recipe_type)
    near = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else f"; known are {', '.join(known)}"


def _known_keys(tables: Sequence[str], recipe_type: type) -> list[str]:
    """Field names of the section at `tables`."""
    current: Any = recipe_type
    for table in tables:
        if table.isdigit():  # a table of an array, whose kind was found under the array's name
            continue
        kinds = {entry.name: entry.type for entry in fields(current)}
        current = next((kind for kind in _options(kinds.get(table)) if is_dataclass(kind)), None)
        if current is None:
            return []
    return [entry.name for entry in fields(current)]


def _options(kind: Any) -> tuple[Any, ...]:
    return getattr(kind, "__args__", (kind,))


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
        check_choice("head", self.head, ("keep", "new"))


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
