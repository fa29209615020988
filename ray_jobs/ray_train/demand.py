"""What a run asks of a cluster against what the cluster has: impossible demands are refused, not waited for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ca2st.errors import EnvironmentFault
from ray_jobs.config.launch import LaunchConfig, Placement
from ray_jobs.every_node import Node

_SHARE_OF_TYPE = 0.001
"""Of the resource ``accelerator_type:...``, which is there once a node; what Ray itself asks of it."""
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What a run asks for."""

    min_workers: int
    """The run cannot go on with fewer."""
    max_workers: int
    resources: Mapping[str, float]
    """Of one worker, by Ray's names; never empty."""
    placement: Placement

    @property
    def gpus(self) -> int:
        """GPUs of a worker, 0 or 1."""
        return int(self.resources.get("GPU", 0))


def demand_of(launch: LaunchConfig, nodes: Sequence[Node]) -> Demand:
    """What `launch` asks for; where it leaves the device open, the cluster's `nodes` decide, not this machine."""
    wanted = launch.accelerator_type is not None or any(node.resources.get("GPU", 0) >= 1 for node in nodes)
    gpus = int(wanted) if launch.gpus_per_worker is None else int(launch.gpus_per_worker)
    cpus = launch.cpus_per_worker if launch.cpus_per_worker is not None else float(gpus == 0)
    resources = {"CPU": cpus, "GPU": float(gpus)}
    if launch.accelerator_type is not None:
        resources[f"accelerator_type:{launch.accelerator_type}"] = _SHARE_OF_TYPE
    return Demand(
        min_workers=launch.workers if launch.min_workers is None else launch.min_workers,
        max_workers=launch.workers,
        resources={name: amount for name, amount in resources.items() if amount > 0},
        placement=launch.placement,
    )


def room(node: Node, demand: Demand) -> int:
    """How many workers fit on `node` when nothing else runs there."""
    return min(int(node.resources.get(name, 0) / amount + _ROUNDING) for name, amount in demand.resources.items())


def hosts(demand: Demand, nodes: Sequence[Node]) -> list[Node]:
    """The nodes on which a worker fits."""
    return [node for node in nodes if room(node, demand) > 0]


def most_workers(demand: Demand, nodes: Sequence[Node]) -> int:
    """How many workers the cluster can hold, as `demand.placement` wants them placed."""
    rooms = [room(node, demand) for node in nodes]
    if demand.placement == "STRICT_PACK":
        return max(rooms, default=0)
    if demand.placement == "STRICT_SPREAD":
        return sum(1 for places in rooms if places > 0)
    return sum(rooms)


def check_demand(demand: Demand, nodes: Sequence[Node]) -> None:
    """Refuse what the cluster can never give.

    Raises:
        EnvironmentFault: fewer workers fit than the run needs; what each node has is listed.
    """
    found = most_workers(demand, nodes)
    if found >= demand.min_workers:
        return
    each = _told(demand.resources)
    table = "".join(f"\n  {node}: {_told(_known(node, demand))}; room for {room(node, demand)}" for node in nodes)
    raise EnvironmentFault(
        f"launch: expected a cluster with room for {demand.min_workers} workers of {each} each (placement "
        f"{demand.placement}), found room for {found}; ask for less (launch.workers, launch.cpus_per_worker, "
        "launch.gpus_per_worker, launch.placement), add nodes, or set launch.wait_for_resources = true to wait for "
        f"them:{table or ' no node'}"
    )


def _known(node: Node, demand: Demand) -> dict[str, float]:
    return {name: node.resources.get(name, 0) for name in dict.fromkeys(["CPU", "GPU", *demand.resources])}


def _told(resources: Mapping[str, float]) -> str:
    return ", ".join(
        name.removeprefix("accelerator_type:")
        if name.startswith("accelerator_type:") and amount
        else f"{amount:g} {name}"
        for name, amount in resources.items()
    )
