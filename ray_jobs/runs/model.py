"""The model of a run: made from a recipe and its experts, begun from a trained one, and what of it is kept.

A start (fine-tuning) is read when a run begins; from its first checkpoint on the run has everything it needs in its own
folder, so the model it began with may be gone when it resumes. As long as it is there it must be the same one. What a
run does not train is kept once, by its hash, in the run's own folder.
"""

import contextlib
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
from ca2st.model.config import EXPERTS, EncoderName, TargetSpec, encoder_of
from ca2st.model.network import HolisticModel, build_model, set_trainable
from ca2st.training import checkpoint
from ca2st.training.best import best_and_last
from ca2st.training.errors import CheckpointDamagedError
from ca2st.training.metrics import main_metric
from ca2st.training.resume import tensors_to_use, trained_tensors
from ca2st.weights.hub import HubAccess, is_hub_name
from ca2st.weights.importer import ExpertStore, imported_expert, load_expert, load_expert_file
from ca2st.weights.model_file import ModelDescription, UnwrittenSizes, read_description, refuse_published_names
from ca2st.weights.positions import transfer_weights
from ca2st.weights.tensor_files import WeightsMismatchError, read_tensor_file, read_tensor_metadata, refuse_mismatch
from ray_jobs.config.recipe import Recipe
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


def begin_model(recipe: Recipe, classes: Classes, run_dir: Path, *, is_outline: bool = False) -> BegunModel:
    """Return the recipe's model with the weights it begins with.

    `is_outline`: names and shapes alone, as of `make_model`: refuse what would fail when the workers make their models.

    Raises:
        UserInputError: what is to be trained names nothing, an expert's file does not fit, or the start is not there or
            does not fit; see `read_start` and `check_label_spaces`.
        WeightsMismatchError: its tensors do not fit the model.
        DataDamageError: its bytes are not those that were written.
    """
    model, start = make_model(recipe, classes, is_outline=is_outline), recipe.start
    if start is None:
        return BegunModel(model=model)
    path = Path(start.checkpoint)
    if not path.exists() and (own := _own_marker(run_dir)) is not None:
        if not is_outline:
            load_frozen(model, own.experts, run_dir)
        return BegunModel(model=model, identity=own.start, note={**own.start, "checkpoint": None})
    source = read_start(path)
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


def read_start(path: Path) -> StartSource:
    """Read a checkpoint or run folder, or a model file, and verify every byte that can be.

    Raises:
        UserInputError: neither is there, or the file holds no whole model of ours.
        DataDamageError: bytes are not those that were written.
    """
    if path.is_dir():
        folder = find_checkpoint(path)
        kept = checkpoint.read_checkpoint(folder)
        run = read_run_document(kept.files[f"{RUN_DOCUMENT}.json"], where=str(folder))
        frozen = frozen_state(kept.marker.experts, folder.parent.parent)
        return StartSource(
            where=folder,
            sha256=hashlib.sha256((folder / checkpoint.MARKER_NAME).read_bytes()).hexdigest(),
            state=frozen | load(tensors_to_use(kept.files)),
            description=ModelDescription(
                model=run.recipe.model, clip=run.recipe.clip, targets=target_specs(run.classes)
            ),
            classes=run.classes,
        )
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
        if not (folder / checkpoint.MARKER_NAME).exists():
            return None
        run = run_document_of(folder)
        return run.audio if "audio" in EXPERTS[run.recipe.model.kind] else None
    if not path.is_file() or path.suffix != ".safetensors":
        return None
    metadata = read_tensor_metadata(path)
    description = read_description(metadata, where=str(path))
    if description is None or "audio" not in EXPERTS[description.model.kind] or SOUND_KEY not in metadata:
        return None
    return parse_json(metadata[SOUND_KEY], AudioParameters, where=f"{path}: metadata key {SOUND_KEY!r}")


def check_label_spaces(source: StartSource, classes: Classes) -> None:
    """Refuse to keep the head of a model (UserInputError) whose label spaces of one name differ, or share none."""
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


def _own_marker(run_dir: Path) -> checkpoint.CheckpointMarker | None:
    """Return the newest readable marker of the run's own checkpoints; which of them is sound is decided at resume."""
    for folder in checkpoint.list_checkpoints(run_dir / checkpoint.CHECKPOINTS_NAME):
        try:
            return checkpoint.read_marker(folder)
        except CheckpointDamagedError:
            continue
    return None


def target_specs(classes: Classes) -> tuple[TargetSpec, ...]:
    """Return what the head predicts."""
    return tuple(TargetSpec(name=name, num_classes=len(names)) for name, names in classes.items())


def make_model(recipe: Recipe, classes: Classes, *, is_outline: bool = False) -> HolisticModel:
    """Return the recipe's model, with the weights of the expert files it names and what is trained marked so.

    `is_outline`: on the meta device, names and shapes alone, refused for the same reasons; public names, which are no
    files yet, are left out.
    """
    with torch.device("meta") if is_outline else contextlib.nullcontext():
        model = build_model(recipe.model, recipe.clip, target_specs(classes), seed=recipe.training.seed)
    for name, path in recipe.experts.files().items():
        if is_outline and is_hub_name(str(path)):
            continue
        try:
            load_expert_file(model, name, path)
        except UserInputError as error:
            raise UserInputError(f"experts.{name}: {error}") from error
    set_trainable(model, recipe.trainable)
    return model


def keep_frozen(model: HolisticModel, run_dir: Path) -> dict[str, str]:
    """Put what is frozen, random weights too, into the run's store; returns each file's hash, by expert or `ADDED`.

    Call it before weights are held in another precision.
    """
    store = ExpertStore(run_dir / EXPERTS_FOLDER)
    return {part: store.put(tensors) for part, tensors in frozen_parts(model).items()}


def frozen_parts(model: HolisticModel) -> dict[str, dict[str, Tensor]]:
    """Return what a run's store keeps of a model, by expert or `ADDED`; works on the meta device too.

    An expert of which anything is frozen is kept whole.
    """
    state = model.state_dict()
    frozen = sorted(state.keys() - trained_tensors(model).keys())
    parts = {
        name: expert.state_dict()
        for name, expert in model.experts.items()
        if any(key.startswith(f"experts.{name}.") for key in frozen)
    }
    added = {name: state[name] for name in frozen if not name.startswith("experts.")}
    return parts | ({ADDED: added} if added else {})


def load_frozen(model: HolisticModel, hashes: Mapping[str, str], run_dir: Path) -> None:
    """Put back what `keep_frozen` kept into a model in which the same is marked as frozen.

    Raises:
        UserInputError: the store is not there, or keeps other weights than the model freezes.
        WeightsDamageError: a file's bytes are not those that were put.
    """
    store, parts = ExpertStore(run_dir / EXPERTS_FOLDER), frozen_parts(model)
    if parts.keys() != hashes.keys():
        raise WeightsMismatchError(
            f"{run_dir}: expected frozen weights of {', '.join(sorted(parts)) or 'nothing'}, found those of "
            f"{', '.join(sorted(hashes)) or 'nothing'}; use the model that the checkpoint names"
        )
    for part, sha256 in hashes.items():
        kept, where = store.get(sha256), str(store.path(sha256))
        if part != ADDED:
            load_expert(model, part, kept, where=where)
            continue
        own = parts[ADDED]
        problems = {
            "missing": sorted(own.keys() - kept.keys()),
            "unexpected": sorted(kept.keys() - own.keys()),
            "of another shape": sorted(
                name for name in own.keys() & kept.keys() if own[name].shape != kept[name].shape
            ),
        }
        refuse_mismatch(problems, where=where)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(kept[name])


def frozen_state(hashes: Mapping[str, str], run_dir: Path) -> dict[str, Tensor]:
    """Return what `keep_frozen` kept, under the names that the whole model has for it; raises as `load_frozen`."""
    store = ExpertStore(run_dir / EXPERTS_FOLDER)
    state: dict[str, Tensor] = {}
    for part, sha256 in hashes.items():
        prefix = "" if part == ADDED else f"experts.{part}."
        state |= {f"{prefix}{key}": tensor for key, tensor in store.get(sha256).items()}
    return state


def with_local_experts(recipe: Recipe, folder: Path, access: HubAccess) -> Recipe:
    """Return the recipe with paths in place of public names (`hf-hub:`, `open_clip:`, `timm:`), imported into `folder`.

    Which layouts are read follows from the encoder that the model has in an expert's place.

    Raises:
        UserInputError: an unknown name, or weights that do not fit the encoder.
        EnvironmentFault: the hub cannot be reached.
    """
    model = recipe.model
    own, heads = EXPERTS[model.kind], model.num_heads
    public = {name: source for name, source in recipe.experts.sources().items() if is_hub_name(source) and name in own}
    if not public:
        return recipe
    # What a public file does not tell and the recipe does.
    sizes: dict[EncoderName, UnwrittenSizes] = {
        "clip": UnwrittenSizes(num_heads=heads),
        "videomae": UnwrittenSizes(
            num_heads=heads, num_frames=model.pretrained_num_frames, crop_size=model.pretrained_crop_size
        ),
        "ast": UnwrittenSizes(num_heads=heads, mel_rows=recipe.clip.mel_rows),
    }
    local: dict[str, Any] = {}
    for expert, source in public.items():
        encoder = encoder_of(model, expert)
        own_sizes = sizes.get(encoder, UnwrittenSizes())
        path = imported_expert(folder.resolve(), source, encoder=encoder, sizes=own_sizes, access=access)
        say(f"{expert} expert: {source} is {path}")
        local[expert] = str(path)
    return replace(recipe, experts=replace(recipe.experts, **local))


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
    """Return what a checkpoint says of its run (else a DocumentError); `where` names the checkpoint."""
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
    data = checkpoint.read_checkpoint_file(folder, f"{RUN_DOCUMENT}.json")
    if data is None:
        raise UserInputError(f"{folder}: expected a checkpoint of `ca2st train`, found one without {RUN_DOCUMENT}.json")
    return read_run_document(data, where=str(folder))


def sound_metadata(audio: AudioParameters) -> dict[str, str]:
    """For the header of a model's file: how the spectrograms it was trained on were made."""
    return {SOUND_KEY: json.dumps(asdict(audio), sort_keys=True)}


def find_checkpoint(path: Path, which: str = "last") -> Path:
    """Return a checkpoint folder itself, or one of a run folder's: ``last`` (newest), ``best``, or that of a step.

    A run without such a checkpoint is a UserInputError that lists those it has.
    """
    if not (path / checkpoint.CHECKPOINTS_NAME).is_dir():
        if which != "last":
            raise UserInputError(f"--checkpoint {which}: expected a run folder to choose from, found {path}")
        return path
    found = checkpoint.list_checkpoints(path / checkpoint.CHECKPOINTS_NAME)
    if not found:
        raise UserInputError(f"{path}: a run folder without a complete checkpoint; train longer or name another")
    if which == "last":
        return found[0]
    if which == "best":
        best, _ = best_and_last(path, ranking_metric(run_document_of(found[0])))
        if best is None:
            raise UserInputError(f"--checkpoint best: {path} has no validation yet; train longer, or choose last")
        if best.checkpoint is None:
            raise UserInputError(
                f"--checkpoint best: the best validation of {path}, {best.metric} {best.value:.4f}, was at step "
                f"{best.step}, whose checkpoint is not kept (training.keep_best); choose last"
            )
        return best.checkpoint
    steps = [str(checkpoint.step_of_checkpoint(folder)) for folder in found]
    number = which.lstrip("0") or which  # 08 is 8
    if number not in steps:
        raise UserInputError(
            f"--checkpoint: expected best, last or a step of which {path} keeps the checkpoint ({', '.join(steps)}), "
            f"found {which!r}; training.keep_checkpoints and training.keep_best keep more of them"
        )
    return found[steps.index(number)]


def ranking_metric(run: RunDocument) -> str:
    """Return the validation metric by which a run's checkpoints are ranked."""
    return run.recipe.training.best_metric or main_metric(tuple(run.classes), labelling=run.labelling)
