"""The model of a run: made from a recipe and its experts, begun from a trained one, and what of it is kept.

A start (fine-tuning) is read when a run begins; from its first checkpoint on the run has everything it needs in its own
folder, so the model it began with may be gone when it resumes. As long as it is there it must be the same one. What a
run does not train is kept once, by its hash, in the run's own folder.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from safetensors.torch import load
from torch import Tensor

from ca2st.checked_json import parse_json
from ca2st.errors import UserInputError
from ca2st.model.config import EXPERTS, EncoderName, ExpertName, TargetSpec, encoder_of
from ca2st.model.network import HolisticModel, build_model, set_trainable
from ca2st.training.best import best_and_last
from ca2st.training.checkpoint import (
    CHECKPOINTS_NAME,
    MARKER_NAME,
    CheckpointMarker,
    folders_of_steps,
    list_checkpoints,
    read_checkpoint,
    read_checkpoint_file,
    read_marker,
    step_of_checkpoint,
)
from ca2st.training.errors import CheckpointDamagedError
from ca2st.training.metrics import main_metric
from ca2st.training.resume import tensors_to_use, trained_tensors
from ca2st.weights.hub import HubAccess, is_hub_name
from ca2st.weights.importer import ExpertStore, expert_state, load_expert, load_expert_file
from ca2st.weights.model_file import ModelDescription, UnwrittenSizes, read_description, refuse_published_names
from ca2st.weights.positions import transfer_weights
from ca2st.weights.tensor_files import WeightsMismatchError, read_tensor_file, read_tensor_metadata, refuse_mismatch
from ray_jobs.config.recipe import Recipe, StartConfig
from ray_jobs.config.recipe_file import stored_recipe
from ray_jobs.console import say
from sharding.format.shard_set import AudioParameters, Labelling, VideoParameters

Classes = Mapping[str, Sequence[str]]
"""Class names of each label space."""
IMPORTED_FOLDER = "imported"
"""Beside the runs: what one run imported the next one finds."""
EXPERTS_FOLDER = "experts"
"""Folder of the store in a run's folder."""
ADDED = "added"
"""What is frozen although no expert's own: adapters, B-CA, ... of the model that a fine-tuning run began with."""
RUN_DOCUMENT = "run"
"""Name of the JSON document in a checkpoint that holds the whole recipe and the class names."""
SOUND_KEY = "ca2st_audio"
"""Metadata key of an exported model: how the spectrograms that it was trained on were made."""


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
    """Return the recipe's model with the weights it begins with.

    Raises:
        UserInputError: the start is not there, or does not fit; see `read_start` and `check_label_spaces`.
        WeightsMismatchError: its tensors do not fit the model.
        DataDamageError: its bytes are not those that were written.
    """
    return _begun(make_model(recipe, classes), recipe, classes, run_dir)


def check_model(recipe: Recipe, classes: Classes, run_dir: Path) -> BegunModel:
    """Return what `begin_model` would, as an outline: refuse what would fail when the workers make their models.

    Raises:
        UserInputError: as `begin_model`, or what is to be trained names nothing, or an expert's file does not fit.
    """
    return _begun(outline_model(recipe, classes), recipe, classes, run_dir)


def _begun(model: HolisticModel, recipe: Recipe, classes: Classes, run_dir: Path) -> BegunModel:
    if recipe.start is None:
        return BegunModel(model=model)
    path = Path(recipe.start.checkpoint)
    if not path.exists() and (own := _own_marker(run_dir)) is not None:
        if not next(model.parameters()).is_meta:
            load_frozen(model, own.experts, run_dir)
        return BegunModel(model=model, identity=own.start, note={**own.start, "checkpoint": None})
    return _transferred(model, read_start(path), recipe.start, classes)


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
    """Return how the spectrograms were made that a model to start from was trained on; nothing else of it is read.

    None where nothing says it (a file of `ca2st weights import`), the model does not hear, or nothing is at `path`.

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
        state=frozen | load(tensors_to_use(checkpoint.files)),
        description=ModelDescription(model=recipe.model, clip=recipe.clip, targets=target_specs(classes)),
        classes=classes,
    )


def _own_marker(run_dir: Path) -> CheckpointMarker | None:
    """Return the newest readable marker of the run's own checkpoints; which of them is sound is decided at resume."""
    for folder in list_checkpoints(run_dir / CHECKPOINTS_NAME):
        try:
            return read_marker(folder)
        except CheckpointDamagedError:
            continue
    return None


def target_specs(classes: Classes) -> tuple[TargetSpec, ...]:
    """Return what the head predicts."""
    return tuple(TargetSpec(name=name, num_classes=len(names)) for name, names in classes.items())


def make_model(recipe: Recipe, classes: Classes) -> HolisticModel:
    """Return the recipe's model, with the weights of the expert files it names and what is trained marked so."""
    model = build_model(recipe.model, recipe.clip, target_specs(classes), seed=recipe.training.seed)
    _load_experts(model, recipe.experts.files())
    set_trainable(model, recipe.trainable)
    return model


def outline_model(recipe: Recipe, classes: Classes) -> HolisticModel:
    """Return what `make_model` would make, on the meta device: names and shapes alone, refused for the same reasons.

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
        try:
            load_expert_file(model, name, path)
        except UserInputError as error:
            raise UserInputError(f"experts.{name}: {error}") from error


def keep_frozen(model: HolisticModel, run_dir: Path) -> dict[str, str]:
    """Put what is frozen, random weights too, into the run's store; returns each file's hash, by expert or `ADDED`.

    An expert of which anything is frozen is kept whole. Call it before weights are held in another precision.
    """
    store, frozen = ExpertStore(run_dir / EXPERTS_FOLDER), _frozen_names(model)
    hashes = {name: store.put(expert_state(model, name)) for name in model.experts if _is_part(name, frozen)}
    if added := _added(model, frozen):
        hashes[ADDED] = store.put(added)
    return hashes


def frozen_bytes(model: HolisticModel) -> int:
    """Return bytes of the tensors that `keep_frozen` keeps; works on the meta device too."""
    state, frozen = model.state_dict(), _frozen_names(model)
    whole = tuple(f"experts.{name}." for name in model.experts if _is_part(name, frozen))
    return sum(tensor.nbytes for name, tensor in state.items() if name in frozen or name.startswith(whole))


def load_frozen(model: HolisticModel, hashes: Mapping[str, str], run_dir: Path) -> None:
    """Put back what `keep_frozen` kept into a model in which the same is marked as frozen.

    Raises:
        UserInputError: the store is not there, or keeps other weights than the model freezes.
        WeightsDamageError: a file's bytes are not those that were put.
    """
    store, frozen = ExpertStore(run_dir / EXPERTS_FOLDER), _frozen_names(model)
    expected = {name for name in model.experts if _is_part(name, frozen)}
    expected |= {ADDED} if _added(model, frozen) else set()
    if expected != hashes.keys():
        raise WeightsMismatchError(
            f"{run_dir}: expected frozen weights of {', '.join(sorted(expected)) or 'nothing'}, found those of "
            f"{', '.join(sorted(hashes)) or 'nothing'}; use the model that the checkpoint names"
        )
    for name, sha256 in hashes.items():
        if name == ADDED:
            _load_added(_added(model, frozen), store.get(sha256), where=str(store.path(sha256)))
        else:
            load_expert(model, name, store.get(sha256), where=str(store.path(sha256)))


def frozen_state(hashes: Mapping[str, str], run_dir: Path) -> dict[str, Tensor]:
    """Return what `keep_frozen` kept, under the names that the whole model has for it; raises as `load_frozen`."""
    store = ExpertStore(run_dir / EXPERTS_FOLDER)
    state: dict[str, Tensor] = {}
    for name, sha256 in hashes.items():
        prefix = "" if name == ADDED else f"experts.{name}."
        state |= {f"{prefix}{key}": tensor for key, tensor in store.get(sha256).items()}
    return state


def _frozen_names(model: HolisticModel) -> set[str]:
    return model.state_dict().keys() - trained_tensors(model).keys()


def _is_part(expert: str, frozen: set[str]) -> bool:
    return any(name.startswith(f"experts.{expert}.") for name in frozen)


def _added(model: HolisticModel, frozen: set[str]) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: state[name] for name in sorted(frozen) if not name.startswith("experts.")}


def _load_added(own: Mapping[str, Tensor], kept: Mapping[str, Tensor], *, where: str) -> None:
    problems = {
        "missing": sorted(own.keys() - kept.keys()),
        "unexpected": sorted(kept.keys() - own.keys()),
        "of another shape": sorted(name for name in own.keys() & kept.keys() if own[name].shape != kept[name].shape),
    }
    refuse_mismatch(problems, where=where)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(kept[name])


def with_local_experts(recipe: Recipe, folder: Path, access: HubAccess) -> Recipe:
    """Return the recipe with paths in place of public names (`hf-hub:`, `open_clip:`, `timm:`), imported into `folder`.

    Which layouts are read follows from the encoder that the model has in an expert's place.

    Raises:
        UserInputError: an unknown name, or weights that do not fit the encoder.
        EnvironmentFault: the hub cannot be reached.
    """
    own = EXPERTS[recipe.model.kind]
    public = {name: source for name, source in recipe.experts.sources().items() if is_hub_name(source) and name in own}
    if not public:
        return recipe
    from ca2st.weights.importer import imported_expert

    local: dict[str, Any] = {}
    for expert, source in public.items():
        encoder = encoder_of(recipe.model, expert)
        sizes = _unwritten_sizes(recipe, encoder)
        path = imported_expert(folder.resolve(), source, encoder=encoder, sizes=sizes, access=access)
        say(f"{expert} expert: {source} is {path}")
        local[expert] = str(path)
    return replace(recipe, experts=replace(recipe.experts, **local))


def _unwritten_sizes(recipe: Recipe, encoder: EncoderName) -> UnwrittenSizes:
    """Return what a public file does not tell and the recipe does."""
    model, num_heads = recipe.model, recipe.model.num_heads
    if encoder == "clip":
        return UnwrittenSizes(num_heads=num_heads)
    if encoder == "videomae":
        frames, crop = model.pretrained_num_frames, model.pretrained_crop_size
        return UnwrittenSizes(num_heads=num_heads, num_frames=frames, crop_size=crop)
    if encoder == "ast":
        return UnwrittenSizes(num_heads=num_heads, mel_rows=recipe.clip.mel_rows)
    return UnwrittenSizes()


class _StoredDocument(TypedDict):
    recipe: dict[str, Any]
    classes: dict[str, list[str]]
    audio: AudioParameters
    video: VideoParameters
    labelling: NotRequired[Labelling]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDocument:
    """Contents of the document `RUN_DOCUMENT`."""

    recipe: Recipe
    classes: dict[str, list[str]]
    """Class names of each target."""
    audio: AudioParameters
    """How the spectrograms of the training shards were made, of a mixture's first set."""
    video: VideoParameters
    """How their videos were encoded."""
    labelling: Labelling = "one"
    """How many labels a sample has: ``one``, for a softmax over the classes, or ``several``, for a sigmoid of each."""


def read_run_document(data: bytes, *, where: str) -> RunDocument:
    """Return what a checkpoint says of its run; `where` names the checkpoint.

    Raises:
        DocumentError: it is no such document.
    """
    document = parse_json(data, _StoredDocument, where=f"{where}/{RUN_DOCUMENT}.json")
    return RunDocument(
        recipe=stored_recipe(document["recipe"], where=where),
        classes=document["classes"],
        audio=document["audio"],
        video=document["video"],
        labelling=document.get("labelling", "one"),
    )


def run_document_of(folder: Path) -> RunDocument:
    """Return the document of a checkpoint; nothing else of it is read.

    Raises:
        UserInputError: `folder` is no checkpoint, or keeps no such document.
        DataDamageError: it is not what was written.
    """
    data = read_checkpoint_file(folder, f"{RUN_DOCUMENT}.json")
    if data is None:
        raise UserInputError(f"{folder}: expected a checkpoint of `ca2st train`, found one without {RUN_DOCUMENT}.json")
    return read_run_document(data, where=str(folder))


def sound_metadata(audio: AudioParameters) -> dict[str, str]:
    """For the header of a model's file: how the spectrograms it was trained on were made."""
    return {SOUND_KEY: json.dumps(asdict(audio), sort_keys=True)}


def parse_sound(text: str, *, where: str) -> AudioParameters:
    """Return what `sound_metadata` wrote.

    Raises:
        DocumentError: it is something else.
    """
    return parse_json(text, AudioParameters, where=f"{where}: metadata key {SOUND_KEY!r}")


def find_checkpoint(path: Path, which: str = "last") -> Path:
    """Return a checkpoint folder itself, or one of a run folder's: ``last`` (newest), ``best``, or that of a step.

    Raises:
        UserInputError: `path` is neither, or the run has no such checkpoint; lists those it has.
    """
    if not (path / CHECKPOINTS_NAME).is_dir():
        if which != "last":
            raise UserInputError(f"--checkpoint {which}: expected a run folder to choose from, found {path}")
        return path
    found = list_checkpoints(path / CHECKPOINTS_NAME)
    if not found:
        raise UserInputError(f"{path}: a run folder without a complete checkpoint; train longer or name another")
    if which == "last":
        return found[0]
    if which == "best":
        return _best_checkpoint(path, found[0])
    of_step = folders_of_steps(found, [int(which)]) if which.isdecimal() else []
    if not of_step:
        kept = ", ".join(str(step_of_checkpoint(folder)) for folder in found)
        raise UserInputError(
            f"--checkpoint: expected best, last or a step of which {path} keeps the checkpoint ({kept}), "
            f"found {which!r}; training.keep_checkpoints and training.keep_best keep more of them"
        )
    return of_step[0]


def ranking_metric(run: RunDocument) -> str:
    """Return the validation metric by which a run's checkpoints are ranked."""
    return run.recipe.training.best_metric or main_metric(tuple(run.classes), labelling=run.labelling)


def _best_checkpoint(run_dir: Path, newest: Path) -> Path:
    best, _ = best_and_last(run_dir, ranking_metric(run_document_of(newest)))
    if best is None:
        raise UserInputError(f"--checkpoint best: {run_dir} has no validation yet; train longer, or choose last")
    if best.checkpoint is None:
        raise UserInputError(
            f"--checkpoint best: the best validation of {run_dir}, {best.metric} {best.value:.4f}, was at step "
            f"{best.step}, whose checkpoint is not kept (training.keep_best); choose last"
        )
    return best.checkpoint
