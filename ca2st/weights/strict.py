"""Loading that never loads half: every tensor of the model is given, and every given tensor is used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ca2st.weights.errors import WeightsMismatchError

_MOST_NAMES_IN_A_MESSAGE = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """Which names were used and which were not, sorted."""

    loaded: tuple[str, ...]
    """Tensors that went into the model."""
    missing: tuple[str, ...]
    """Tensors of the model that were not given, and that the caller allowed to be missing."""
    unexpected: tuple[str, ...]
    """Given tensors that the model does not have: known names that the method never uses."""


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], *, where: str, allow_missing: Sequence[str] = ()
) -> LoadReport:
    """Copy `state` into `module`, all of it or nothing.

    Tensors are cast to the module's type. `where` names the source in messages; `allow_missing` are patterns such as
    `head.*`, each of which must match something that is missing.

    Raises:
        WeightsMismatchError: with the full list of what is missing, unexpected or of another shape.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys())
    allowed = _allowed(missing, allow_missing, where=where)
    unexpected = sorted(state.keys() - own.keys())
    reshaped = [
        f"{name} expected {list(own[name].shape)}, found {list(state[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    problems = {
        "missing": sorted(set(missing) - allowed),
        "unexpected": unexpected,
        "of another shape": reshaped,
        "not of a floating-point type": sorted(
            name for name, tensor in state.items() if not tensor.is_floating_point()
        ),
    }
    refuse_mismatch(problems, where=where)
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    return LoadReport(loaded=tuple(sorted(state)), missing=tuple(sorted(allowed)), unexpected=())


def refuse_mismatch(problems: Mapping[str, Sequence[str]], *, where: str) -> None:
    """Raise if any list of `problems` (what is wrong: names) is not empty.

    Raises:
        WeightsMismatchError: naming all kinds of problems.
    """
    told = [f"{len(names)} {what}: {_shortened(names)}" for what, names in problems.items() if names]
    if told:
        raise WeightsMismatchError(
            f"{where}: expected exactly the tensors of the model, found {'; '.join(told)}. "
            "Check that kind, sizes, clip and classes of the model are those of the file"
        )


def without_leading_ones(tensor: Tensor, num_dims: int) -> Tensor:
    """Drop leading dimensions of size one until `num_dims` are left: published tables are `[1, tokens, dim]`."""
    while tensor.ndim > num_dims and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor


def _allowed(missing: Sequence[str], patterns: Sequence[str], *, where: str) -> set[str]:
    matches = {pattern: {name for name in missing if fnmatchcase(name, pattern)} for pattern in patterns}
    idle = sorted(pattern for pattern, names in matches.items() if not names)
    if idle:
        raise WeightsMismatchError(f"{where}: allow_missing patterns match nothing that is missing: {', '.join(idle)}")
    return set().union(*matches.values())


def _shortened(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMES_IN_A_MESSAGE])
    more = len(names) - _MOST_NAMES_IN_A_MESSAGE
    return f"{shown} and {more} more" if more > 0 else shown
