"""Conversion workers as Ray actors: the one module here that knows Ray, and only inside its functions.

An actor holds one decode child, so that the limits, the timeout and the crash handling of `sharding.workers` stay as
they are. The caller opens the Ray session, and has looked at the nodes in `vetted`.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from sharding.cluster.node_facts import NodeFacts, Probe, node_facts, refuse_unlike_nodes
from sharding.cluster.pool import ClusterPool, Lost
from sharding.conversion import ConversionConfig
from sharding.decode_child import ClipJob, EncodedClip, encode_clip
from sharding.errors import UnlikeNodeError
from sharding.workers import DecodePool


def ray_pool(
    config: ConversionConfig,
    *,
    probe: Probe,
    here: NodeFacts,
    vetted: Collection[str],
    encode: Callable[[ClipJob], EncodedClip] = encode_clip,
) -> ClusterPool:
    """A pool of `config.workers` actors, spread over the nodes of the cluster that this process has joined.

    Args:
        config: Limits of a clip, and the number of actors; each takes one CPU.
        probe: What an actor on a node outside `vetted` tries before it takes part.
        here: What this machine made of `probe`.
        vetted: Ids of nodes that were compared already.
        encode: What the decode children run; a module-level function.
    """
    cluster = RayCluster(encode, config, probe=probe, here=here, vetted=vetted)
    return ClusterPool(cluster, num_workers=config.workers, timeout_seconds=config.clip_timeout_seconds)


class RayCluster:
    """A `sharding.cluster.pool.Cluster` of Ray actors; a ticket is an object reference."""

    def __init__(
        self,
        encode: Callable[[ClipJob], EncodedClip],
        config: ConversionConfig,
        *,
        probe: Probe,
        here: NodeFacts,
        vetted: Collection[str],
    ) -> None:
        import ray

        self._actor: Any = ray.remote(
            num_cpus=1,
            max_restarts=0,  # the pool starts another one, anywhere
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )(_DecodeWorker)
        self._limits = (encode, config.clip_timeout_seconds, config.clip_memory_bytes)
        self._question = (ray.put((probe, here)), frozenset(vetted))

    def start(self) -> tuple[Any, Any]:
        """As the protocol says."""
        actor = self._actor.remote(*self._limits)
        return actor, actor.introduce.remote(*self._question)

    def give(self, worker: Any, job: Any) -> Any:
        """As the protocol says."""
        return worker.run.remote(job)

    def wait(self, tickets: Sequence[Any], timeout_seconds: float) -> Sequence[Any]:
        """As the protocol says."""
        import ray

        timeout = None if timeout_seconds == math.inf else timeout_seconds
        ready, rest = ray.wait(list(tickets), timeout=timeout)
        if ready and rest:
            ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        return ready

    def take(self, ticket: Any) -> Any:
        """As the protocol says."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            return _in_own_memory(ray.get(ticket))
        except RayTaskError as error:
            if isinstance(error.cause, UnlikeNodeError):
                raise error.cause from None
            return Lost(f"{type(error.cause).__name__}: {_first_line(error.cause)}")
        except RayError as error:
            return Lost(f"{type(error).__name__}: {_ends(error)}")

    def end(self, worker: Any) -> None:
        """As the protocol says."""
        import ray

        ray.kill(worker)


class _DecodeWorker:
    """What runs in an actor's process."""

    def __init__(self, encode: Callable[[ClipJob], EncodedClip], timeout_seconds: float, memory_bytes: int) -> None:
        self._pool = DecodePool(encode, num_workers=1, timeout_seconds=timeout_seconds, memory_bytes=memory_bytes)

    def introduce(self, compared: tuple[Probe, NodeFacts], vetted: Collection[str]) -> str:
        """The node's name; a node that joined later is compared now."""
        import ray

        node_id = ray.get_runtime_context().get_node_id()
        address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray has no types there
        place = f"{address} ({node_id[:8]})"
        if node_id not in vetted:
            probe, here = compared
            refuse_unlike_nodes(here, {place: node_facts(probe)}, probe)
        return place

    def run(self, job: Any) -> Any:
        """The job's clip, or its `Rejected`."""
        (result,) = self._pool.map([job])
        return result


def _in_own_memory(answer: Any) -> Any:
    """Sound that can be written to, as torch wants it, and that does not keep Ray's shared memory in use."""
    if isinstance(answer, EncodedClip) and answer.audio is not None:
        return replace(answer, audio=replace(answer.audio, pcm=answer.audio.pcm.copy()))
    return answer


def _ends(error: BaseException) -> str:
    """First and last line: what happened to the actor, and the cause where Ray tells one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ... ".join(dict.fromkeys((lines[0], lines[-1]))) if lines else "no message"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
