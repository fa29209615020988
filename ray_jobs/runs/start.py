"""What a run starts from, and what is checked before it does.

Fine-tuning: how a new run begins with the weights of a trained model.

The start is read when a run begins; from its first checkpoint on the run has everything it needs in its own folder, so
the model it began with may be gone when it resumes. As long as it is there it must be the same one.

What of a recipe can be refused before a folder is made or a process is started.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from ca2st.errors import UserInputError
from ca2st.model.config import ModelKind, check_clip
from ca2st.model.network import HolisticModel
from ca2st.model.structure import EXPERTS, ExpertName
from ca2st.training.checkpoint import (
    CHECKPOINTS_NAME,
    MARKER_NAME,
    CheckpointMarker,
    list_checkpoints,
    read_checkpoint,
    read_marker,
)
from ca2st.training.errors import CheckpointDamagedError
from ca2st.training.state import MODEL_FILE
from ca2st.weights.errors import WeightsMismatchError
from ca2st.weights.hub import is_hub_name, resolve_hub_name
from ca2st.weights.model_file import ModelDescription, read_description, refuse_published_names
from ca2st.weights.tensor_files import read_tensor_file, read_tensor_metadata
from ca2st.weights.transfer import transfer_weights
from pipelines.storage.shard_sets import check_sound
from ray_jobs.config.recipe import Recipe, StartConfig
from ray_jobs.runs.data import TrainingData, open_data, sample_plan
from ray_jobs.runs.inference import RUN_DOCUMENT, SOUND_KEY, find_checkpoint, parse_sound, read_run_document
from ray_jobs.runs.model import frozen_state, load_frozen, make_model, outline_model, target_specs
from sharding.format.shard_set import AudioParameters

Classes = Mapping[str, Sequence[str]]
"""Class names of each label space."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BegunModel:
    """The model of a run before its first step, or before what it resumes is put in."""

    model: HolisticModel
    identity: Mapping[str, str] = field(default_factory=dict)
    """What it began with: ``sha256`` of a checkpoint's COMPLETE.json or of a model file; empty for no start."""
    note: Mapping[str, Any] = field(default_factory=dict)
    """For the journal: the same, its name, and which tensors were kept (how many), resized and fresh (their names)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartSource:
    """A trained model as it was found."""

    where: Path
    """Checkpoint folder or model file."""
    sha256: str
    """Of the checkpoint's COMPLETE.json, which names every byte of it, or of the file."""
    state: Mapping[str, Tensor]
    """All its tensors, by the names of its whole model."""
    description: ModelDescription
    """What it is made of."""
    classes: Classes | None
    """Class names of its targets; None where only their numbers are known."""


def begin_model(recipe: Recipe, classes: Classes, run_dir: Path) -> BegunModel:
    """The recipe's model with the weights it begins with.

    Raises:
        UserInputError: the start is not there, or does not fit; see `read_start` and `check_label_spaces`.
        WeightsMismatchError: its tensors do not fit the model.
        DataDamageError: its bytes are not those that were written.
    """
    model = make_model(recipe, {name: list(names) for name, names in classes.items()})
    if recipe.start is None:
        return BegunModel(model=model)
    path = Path(recipe.start.checkpoint)
    if not path.exists() and (own := _own_marker(run_dir)) is not None:
        load_frozen(model, own.experts, run_dir)
        return BegunModel(model=model, identity=own.start, note={**own.start, "checkpoint": None})
    return _transferred(model, read_start(path), recipe.start, classes)


def check_model(recipe: Recipe, classes: Classes, run_dir: Path) -> Mapping[str, Any]:
    """Refuse what would fail when the workers make their models, without allocating one; returns the start's note.

    Raises:
        UserInputError: as `begin_model`, or what is to be trained names nothing, or an expert's file does not fit.
    """
    model = outline_model(recipe, {name: list(names) for name, names in classes.items()})
    if recipe.start is None:
        return {}
    path = Path(recipe.start.checkpoint)
    if not path.exists() and (own := _own_marker(run_dir)) is not None:
        return {**own.start, "checkpoint": None}
    return _transferred(model, read_start(path), recipe.start, classes).note


def read_start(path: Path) -> StartSource:
    """Read a checkpoint or run folder, or a model file, and verify every byte that can be.

    Raises:
        UserInputError: neither is there, or the file holds no whole model of ours.
        DataDamageError: bytes are not those that were written.
    """
    if path.is_dir():
        return _checkpoint_source(find_checkpoint(path))
    if not path.is_file():
        raise UserInputError(
            f"start.checkpoint: expected a checkpoint folder, a run folder or a model file, found nothing at {path}; "
            "check the path"
        )
    if path.suffix != ".safetensors":
        raise UserInputError(
            "start.checkpoint: expected a checkpoint folder, a run folder or a model file that ends in .safetensors, "
            f"found {path}; give the model that `ca2st weights import` or `export` wrote"
        )
    file = read_tensor_file(path)
    description = read_description(file.metadata, where=str(path))
    if description is None:
        raise WeightsMismatchError(
            f"{path}: expected a whole model of `ca2st weights import` or `export`, found tensors alone; "
            "name the file of a single expert under [experts]"
        )
    refuse_published_names(file.tensors, description, path=path)
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return StartSource(where=path, sha256=sha256, state=file.tensors, description=description, classes=None)


def start_sound(path: Path) -> AudioParameters | None:
    """How the spectrograms were made that a model to start from was trained on; nothing else of it is read.

    None where it is not told (a file of `ca2st weights import`), the model does not hear, or nothing is at `path`.

    Raises:
        DataDamageError: what should tell it cannot be read.
    """
    if path.is_dir():
        folder = find_checkpoint(path)
        if not (folder / MARKER_NAME).exists():
            return None
        run = read_run_document((folder / f"{RUN_DOCUMENT}.json").read_bytes(), where=str(folder))
        return run.audio if "audio" in EXPERTS[run.recipe.model.kind] else None
    if not path.is_file() or path.suffix != ".safetensors":
        return None
    metadata = read_tensor_metadata(path)
    description = read_description(metadata, where=str(path))
    if description is None or "audio" not in EXPERTS[description.model.kind] or SOUND_KEY not in metadata:
        return None
    return parse_sound(metadata[SOUND_KEY], where=str(path))


def check_label_spaces(source: StartSource, classes: Classes) -> None:
    """Refuse to keep the head of a model whose classes are others.

    Raises:
        UserInputError: a label space of the same name has other classes, or none has the same name.
    """
    old: dict[str, int] = {target.name: target.num_classes for target in source.description.targets}
    shared = [name for name in classes if name in old]
    if not shared:
        raise UserInputError(
            f'start.head: "keep" needs a label space in common, found {", ".join(classes)} here and {", ".join(old)} '
            f'in {source.where}; set start.head = "new"'
        )
    for name in shared:
        names = None if source.classes is None else list(source.classes[name])
        if old[name] != len(classes[name]) or (names is not None and names != list(classes[name])):
            raise UserInputError(
                f'start.head: "keep" needs the same classes, found label space {name!r} with '
                f"{_told(list(classes[name]), names)} here and {old[name]} classes in {source.where}; "
                'set start.head = "new", or convert with one class list'
            )


def _told(here: list[str], there: list[str] | None) -> str:
    if there is None or len(here) != len(there):
        return f"{len(here)} classes"
    first = next(index for index, (new, old) in enumerate(zip(here, there, strict=True)) if new != old)
    return f"{len(here)} classes (class {first} is {here[first]!r}, there {there[first]!r})"


def _transferred(model: HolisticModel, source: StartSource, start: StartConfig, classes: Classes) -> BegunModel:
    if start.head == "keep":
        check_label_spaces(source, classes)
    report = transfer_weights(
        model,
        source.state,
        source=source.description,
        where=str(source.where),
        resize_positions=start.resize_positions,
        new_head=start.head == "new",
    )
    identity = {"sha256": source.sha256}
    note = {
        **identity,
        "checkpoint": str(source.where),
        "kept": len(report.kept),
        "resized": list(report.resized),
        "fresh": list(report.fresh),
    }
    return BegunModel(model=model, identity=identity, note=note)


def _checkpoint_source(folder: Path) -> StartSource:
    checkpoint = read_checkpoint(folder)
    run = read_run_document(checkpoint.files[f"{RUN_DOCUMENT}.json"], where=str(folder))
    recipe, classes = run.recipe, run.classes
    frozen = frozen_state(checkpoint.marker.experts, folder.parent.parent)
    return StartSource(
        where=folder,
        sha256=hashlib.sha256((folder / MARKER_NAME).read_bytes()).hexdigest(),
        state=frozen | load(checkpoint.files[MODEL_FILE]),
        description=ModelDescription(model=recipe.model, clip=recipe.clip, targets=target_specs(classes)),
        classes=classes,
    )


def _own_marker(run_dir: Path) -> CheckpointMarker | None:
    """The newest readable marker of the run's own checkpoints; which of them is sound is decided at resume."""
    for folder in list_checkpoints(run_dir / CHECKPOINTS_NAME):
        try:
            return read_marker(folder)
        except CheckpointDamagedError:
            continue
    return None


def preflight(recipe: Recipe) -> TrainingData:
    """Everything that can be refused before a folder is made or a process is started; raises as `open_data`.

    Raises:
        UserInputError: as `check_settings`, or as `sample_plan`, or the model hears and starts from one whose
            spectrograms were made otherwise.
        PlanError: fewer samples than the batch or the workers need.
    """
    check_settings(recipe)
    data = open_data(recipe)
    _check_start_sound(recipe, data)
    sample_plan(recipe, data).require_enough(world_size=recipe.launch.workers)
    return data


def _check_start_sound(recipe: Recipe, data: TrainingData) -> None:
    if recipe.start is None or "audio" not in EXPERTS[recipe.model.kind]:
        return
    where = Path(recipe.start.checkpoint)
    if (sound := start_sound(where)) is not None:
        check_sound(data.train, sound, whose=f"start.checkpoint {where}")


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
