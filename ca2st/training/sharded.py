"""A model spread over the ranks: each holds its share of every weight, frozen ones too (FSDP2, ``fully_shard``).

The weights of a unit are gathered when it runs, forward and backward, and let go of after it; gradients, optimizer and
average exist as shares alone. What a checkpoint holds is whole, so it fits any number of ranks, sharded or not.

torch's `fully_shard` itself, not Accelerate's plugin: that one computes bfloat16 otherwise than autocast does, and
knows no CPUs. Group, devices and autocast stay Accelerate's.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed import get_world_size

if TYPE_CHECKING:  # importing them takes as long as torch itself: only where a model is sharded
    from torch.distributed.tensor import DTensor


def shard_model(model: nn.Module, units: Iterable[nn.Module], *, device: torch.device) -> None:
    """Spread `model` over the ranks, in place; each of `units` is gathered by itself.

    What is in no unit is gathered before the first. A unit runs through its ``forward``, and its trained parameters are
    of one type. Every rank must run the model equally often. Call it after weights are loaded, marked as trained or
    frozen, and held in their precision; the optimizer comes after it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (get_world_size(),))
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # else its own weights stay whole after a validation


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard_model` has spread it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor of which this rank may hold a share; a collective for those."""
    return tensor.full_tensor() if _is_share(tensor) else tensor


def as_held(value: Tensor, target: Tensor) -> Tensor:
    """Return a whole `value`, the same on every rank, as `target` is held: on its device, and the same share of it."""
    value = value.to(target.device)
    if not _is_share(target) or _is_share(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def put(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy `values` into `targets` of the same names; either may be whole or shares."""
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(as_held(values[name], target))


def _is_share(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Return whether it is a share of a tensor; there is none before `shard_model` has imported their class."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)
