"""The model of a run: from recipe and experts.

Experts that a recipe names by their public names become files of this machine before anything is started.

What a run does not train is kept once, by its hash, in the run's own folder: no other folder is needed later.

The model of a recipe, with its experts' weights: made, or only outlined.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ca2st.errors import UserInputError
from ca2st.model.config import EncoderName, TargetSpec
from ca2st.model.network import HolisticModel
from ca2st.model.parameters import build_model, set_trainable
from ca2st.model.structure import EXPERTS, ExpertName, encoder_of
from ca2st.training.state import trained_tensors
from ca2st.weights.errors import WeightsMismatchError
from ca2st.weights.expert_files import ExpertStore, expert_state, load_expert, load_expert_file
from ca2st.weights.hub import HubAccess, is_hub_name
from ca2st.weights.importer import ImportedExperts
from ca2st.weights.sizes import UnwrittenSizes
from ca2st.weights.tensor_files import refuse_mismatch
from ray_jobs.config.recipe import Recipe
from ray_jobs.console import say

IMPORTED_FOLDER = "imported"
"""Beside the runs: what one run imported the next one finds."""


def with_local_experts(recipe: Recipe, folder: Path, access: HubAccess) -> Recipe:
    """The recipe with paths in place of public names (`hf-hub:`, `open_clip:`, `timm:`), imported into `folder`.

    Which layouts are read follows from the encoder that the model has in an expert's place.

    Raises:
        UserInputError: an unknown name, or weights that do not fit the encoder.
        EnvironmentFault: the hub cannot be reached.
    """
    store = ImportedExperts(folder.resolve())
    local: dict[str, Any] = {}
    for expert, source in recipe.experts.sources().items():
        if is_hub_name(source) and expert in EXPERTS[recipe.model.kind]:
            encoder = encoder_of(recipe.model, expert)
            path = store.get(source, encoder, _SIZES[encoder](recipe), access)
            say(f"{expert} expert: {source} is {path}")
            local[expert] = str(path)
    return replace(recipe, experts=replace(recipe.experts, **local)) if local else recipe


_SIZES: dict[EncoderName, Callable[[Recipe], UnwrittenSizes]] = {
    "clip": lambda recipe: UnwrittenSizes(num_heads=recipe.model.num_heads),
    "videomae": lambda recipe: UnwrittenSizes(
        num_heads=recipe.model.num_heads,
        num_frames=recipe.model.pretrained_num_frames,
        crop_size=recipe.model.pretrained_crop_size,
    ),
    "ast": lambda recipe: UnwrittenSizes(num_heads=recipe.model.num_heads, mel_rows=recipe.clip.mel_rows),
    "resnet50": lambda _: UnwrittenSizes(),
}
"""What a public file does not tell and the recipe does."""


EXPERTS_FOLDER = "experts"
"""Folder of the store in a run's folder."""
ADDED = "added"
"""What is frozen although no expert's own: adapters, B-CA, ... of the model that a fine-tuning run began with."""


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
    """Bytes of the tensors that `keep_frozen` keeps; works on the meta device too."""
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
    """What `keep_frozen` kept, under the names that the whole model has for it; raises as `load_frozen`."""
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
