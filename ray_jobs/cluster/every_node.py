"""Ask every node of a Ray cluster the same thing: one task per node, bound to it, with a limit in time.

Call it inside a Ray session. `function` is a module-level function; the nodes import it from the package installed
there. A task asks for no CPU and no GPU, so it runs beside whatever a node is busy with, and sees all of its GPUs.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ca2st.errors import CA2STError
from ray_jobs.cluster.ray_access import first_line

NODE_SECONDS = 120.0
"""A cold interpreter that imports torch on a busy node takes most of a minute."""
_SHORT_ID = 8

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Node:
    """A living node of the cluster."""

    address: str
    """As the other nodes reach it."""
    node_id: str
    """Ray's hexadecimal id."""
    resources: Mapping[str, float] = field(default_factory=dict, compare=False)
    """All that Ray may give out there: ``CPU``, ``GPU``, ``memory``, ... (used or not)."""

    @property
    def name(self) -> str:
        """Address and the start of the id: one machine may run two nodes."""
        return f"{self.address} ({self.node_id[:_SHORT_ID]})"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFailure:
    """Why a node gave no answer."""

    what: str


def living_nodes() -> list[Node]:
    """Return the cluster's nodes that are alive, in the order of their addresses."""
    import ray

    alive = [one for one in ray.nodes() if one["Alive"]]  # type: ignore[no-untyped-call]  # Ray has no types there
    return sorted(
        Node(address=one["NodeManagerAddress"], node_id=one["NodeID"], resources=dict(one["Resources"]))
        for one in alive
    )


def this_node() -> Node:
    """Return the node that the calling task, worker or driver runs on."""
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray has no types there
    return Node(address=address, node_id=node_id)


def ask_every_node(
    function: Callable[..., T],
    *arguments: Any,
    timeout_seconds: float = NODE_SECONDS,
    nodes: Sequence[Node] | None = None,
) -> dict[Node, T | NodeFailure]:
    """Return what ``function(*arguments)`` returns on each of `nodes` (None: every living one), or why it gave none."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(_call)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote(
            function, *arguments
        ): node
        for node in (living_nodes() if nodes is None else nodes)
    }
    answers = gathered(asked, timeout_seconds=timeout_seconds)
    for ticket, node in asked.items():
        if isinstance(answers[node], NodeFailure):
            ray.cancel(ticket, force=True)  # nothing happens to one that ended
    return answers


def gathered(asked: Mapping[Any, Node], *, timeout_seconds: float) -> dict[Node, Any]:
    """Return the values of references by the node each was asked of; a `NodeFailure` for one that is late or failed."""
    import ray

    deadline = time.monotonic() + timeout_seconds
    answers = {}
    for ticket, node in asked.items():
        ready, _ = ray.wait([ticket], timeout=max(0.0, deadline - time.monotonic()))
        if ready:
            answers[node] = _answer(ticket)
        else:
            answers[node] = NodeFailure(what=f"no answer within {timeout_seconds:g} s")
    return answers


def _call(function: Callable[..., T], *arguments: Any) -> T:
    return function(*arguments)


def _answer(ticket: Any) -> Any:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(ticket)
    except RayTaskError as error:
        return _raised(error)
    except RayError as error:
        return NodeFailure(what=f"{type(error).__name__}: {first_line(error)}")


def _raised(error: Any) -> NodeFailure:
    cause = error.cause
    if isinstance(cause, CA2STError):
        return NodeFailure(what=str(cause))
    what = f"{type(cause).__name__}: {first_line(cause)}"
    if isinstance(cause, ImportError) or "No module named" in str(cause):
        what += " (is ca2st installed there as here?)"
    return NodeFailure(what=what)
