"""What a checkpoint holds of model and optimizer, and how it comes back: exactly, and all or nothing.

Only trained parameters and the buffers beside them are kept; what is frozen lives once in the run's ``experts/``.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from ca2st.checked_json import canonical_json
from ca2st.errors import listed
from ca2st.training.errors import CheckpointMismatchError
from ca2st.training.journal import differences

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
OPTIMIZER_SCALARS_FILE = "optimizer.json"
_LINE = "\n  "


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedState:
    """State read back from a checkpoint, checked against model and optimizer, not yet put in place."""

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Tensor]]
    """State of each parameter by its name: ``exp_avg``, ``exp_avg_sq``, ``step``."""


def collect_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    """Files that hold the trained state: two of tensors, one of the optimizer's scalars and settings."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, parameter in _optimized(model, optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.ndim > 0:
                tensors[f"{key}/{name}"] = _portable(value)
            else:
                scalars.setdefault(name, {})[key] = float(value)
    return {
        MODEL_FILE: save({name: _portable(tensor) for name, tensor in trained_tensors(model).items()}),
        OPTIMIZER_FILE: save(tensors),
        OPTIMIZER_SCALARS_FILE: canonical_json({"state": scalars, "groups": _group_settings(optimizer)}),
    }


def read_state(model: nn.Module, optimizer: torch.optim.Optimizer, *, files: Mapping[str, bytes]) -> TrainedState:
    """Parse a checkpoint's tensors and check every name, shape and type before anything is changed.

    Raises:
        CheckpointMismatchError: they do not fit; lists what is missing, unexpected or of another shape.
    """
    tensors = read_model_tensors(model, data=files[MODEL_FILE])
    expected = dict(_optimized(model, optimizer))
    states: dict[str, dict[str, Tensor]] = {}
    problems = []
    for label, tensor in load(files[OPTIMIZER_FILE]).items():
        key, _, name = label.partition("/")
        states.setdefault(name, {})[key] = tensor
        if name in expected and tensor.shape != expected[name].shape:
            problems.append(_shape_problem(label, expected[name], tensor))
    document = json.loads(files[OPTIMIZER_SCALARS_FILE])
    groups = json.loads(canonical_json({"groups": _group_settings(optimizer)}))
    problems += [f"optimizer {change}" for change in differences({"groups": document["groups"]}, groups)]
    for name, scalars in document["state"].items():
        states.setdefault(name, {}).update({key: torch.tensor(value) for key, value in scalars.items()})
    problems += [f"{name}: optimizer state of a parameter that is not trained" for name in states.keys() - expected]
    _refuse(sorted(problems))
    return TrainedState(model=tensors, optimizer=states)


def put_state(model: nn.Module, optimizer: torch.optim.Optimizer, *, state: TrainedState) -> None:
    """Swap `state` in; nothing in here can fail half-way for data's sake, `read_state` has checked it."""
    put_model_tensors(model, tensors=state.model)
    optimizer.state.clear()
    for name, parameter in _optimized(model, optimizer):
        if name in state.optimizer:
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if value.ndim > 0 else value.clone()
                for key, value in state.optimizer[name].items()
            }


def read_model_tensors(model: nn.Module, *, data: bytes) -> dict[str, Tensor]:
    """Parse ``model.safetensors`` of a checkpoint and check it against the model's trained tensors.

    Raises:
        CheckpointMismatchError: as `read_state`.
    """
    tensors, expected = load(data), trained_tensors(model)
    problems = [f"{name}: missing from the checkpoint" for name in expected.keys() - tensors.keys()]
    problems += [f"{name}: in the checkpoint, not trained here" for name in tensors.keys() - expected.keys()]
    problems += [
        _shape_problem(name, expected[name], tensors[name])
        for name in expected.keys() & tensors.keys()
        if tensors[name].shape != expected[name].shape or tensors[name].dtype != expected[name].dtype
    ]
    _refuse(sorted(problems))
    return tensors


def put_model_tensors(model: nn.Module, *, tensors: Mapping[str, Tensor]) -> None:
    """Copy checked tensors into the model's trained parameters and buffers."""
    with torch.no_grad():
        for name, target in trained_tensors(model).items():
            target.copy_(tensors[name])


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters, and the persistent buffers of modules that train, by name.

    A buffer belongs to the nearest enclosing module that has parameters; it is kept when any of those is trained
    (running statistics of a trained BatchNorm), left out when all are frozen (they come with the expert).
    """
    tensors: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    modules = dict(model.named_modules())
    persistent = model.state_dict(keep_vars=True).keys()
    buffers = {
        name: buffer
        for name, buffer in model.named_buffers()
        if name in persistent and _is_trained(modules, name.rpartition(".")[0])
    }
    return tensors | buffers


def _is_trained(modules: Mapping[str, nn.Module], owner: str) -> bool:
    while True:
        flags = [parameter.requires_grad for parameter in modules[owner].parameters()]
        if flags or not owner:
            return any(flags)
        owner = owner.rpartition(".")[0]


def _optimized(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names[parameter], parameter


def _group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Settings of each group but its rate, which is the schedule's."""
    return [
        {key: value for key, value in group.items() if key not in ("params", "lr")} for group in optimizer.param_groups
    ]


def _portable(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _shape_problem(name: str, expected: Tensor, found: Tensor) -> str:
    return f"{name}: expected {_describe(expected)}, found {_describe(found)}"


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _refuse(problems: list[str]) -> None:
    if problems:
        raise CheckpointMismatchError(
            f"checkpoint and model differ in {len(problems)} places:\n  "
            f"{listed(problems, most=20, separator=_LINE)}\nuse the model that the checkpoint names"
        )
