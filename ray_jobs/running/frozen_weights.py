"""What a run does not train is kept once, by its hash, in the run's own folder: no other folder is needed later."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ca2st.model.holistic import HolisticModel
from ca2st.training.state import trained_tensors
from ca2st.weights.errors import WeightsMismatchError
from ca2st.weights.experts import expert_state, load_expert
from ca2st.weights.store import ExpertStore
from ca2st.weights.strict import refuse_mismatch

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
