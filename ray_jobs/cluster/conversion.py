"""A conversion by the workers of a Ray cluster, its nodes compared with this machine first."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ca2st.durable import NO_FAULTS, FaultPoints
from ca2st.errors import UserInputError
from ray_jobs.cluster.ray_access import LOCAL, RayAccess, ray_session
from ray_jobs.console import say
from sharding.conversion import ConversionReport
from sharding.media.decode_child import ClipJob, EncodedClip, encode_clip
from sharding.settings import ConversionConfig
from sharding.source import SourceList
from sharding.workers import ClipPool

if TYPE_CHECKING:
    from ray_jobs.cluster.every_node import Node
from ray_jobs.conversion import convert_shown

_LEAST_PREFLIGHT_SECONDS = 120.0  # a cold interpreter on a busy node


def convert_on_cluster(
    source: SourceList,
    out: Path,
    config: ConversionConfig,
    *,
    address: str,
    access: RayAccess,
    num_workers: int | None,
    faults: FaultPoints = NO_FAULTS,
) -> ConversionReport:
    """As `convert_shown`, the clips converted by Ray actors; this process writes the shards, to the same bytes.

    The nodes need the media under the same paths, and nothing else of this machine's folders.

    Args:
        source: The samples.
        out: A folder of this machine.
        config: Parameters; `workers` is replaced by `num_workers`.
        address: ``local`` (a Ray of this machine alone), ``auto`` or ``host:port``.
        access: The cluster's token, or the word that it needs none.
        num_workers: Actors, one CPU each; None: all CPUs of the cluster.
        faults: Fault points (tests).

    Raises:
        UserInputError: more workers than the cluster has CPUs, or no token.
        UnlikeNodeError: a node does not see the media, or would write other bytes.
        EnvironmentFault: no cluster answers, or its workers are lost again and again.
    """
    pool = partial(_pool_on_cluster, source, config, address=address, access=access, num_workers=num_workers)
    return convert_shown(source, out, config, faults=faults, pool=pool)


@contextmanager
def _pool_on_cluster(
    source: SourceList, config: ConversionConfig, *, address: str, access: RayAccess, num_workers: int | None
) -> Iterator[ClipPool]:
    num_cpus = num_workers if address == LOCAL else None
    with ray_session(address, access=access, num_cpus=num_cpus), joined_pool(source, config, num_workers) as pool:
        yield pool


@contextmanager
def joined_pool(
    source: SourceList,
    config: ConversionConfig,
    num_workers: int | None,
    *,
    encode: Callable[[ClipJob], EncodedClip] = encode_clip,
) -> Iterator[ClipPool]:
    """The pool of a cluster that is joined already, once its nodes were compared with this machine.

    `encode` is what the decode children run, a module-level function. Raises as `convert_on_cluster` does.
    """
    from ray_jobs.cluster.every_node import living_nodes, on_every_node
    from sharding.cluster import node_facts, probe_of, ray_pool, refuse_unlike_nodes

    nodes = [node for node in living_nodes() if node.resources.get("CPU", 0) >= 1]
    config = replace(config, workers=workers_on(nodes, num_workers))
    probe = probe_of(source, config)
    say(f"{config.workers} workers on {len(nodes)} nodes, each of which tries {len(probe.jobs)} clips first")
    seconds = _LEAST_PREFLIGHT_SECONDS + len(probe.jobs) * config.clip_timeout_seconds
    here = node_facts(probe)
    there = on_every_node(node_facts, probe, nodes=nodes, timeout_seconds=seconds)
    refuse_unlike_nodes(here, {node.name: facts for node, facts in there.items()}, probe)
    vetted = [node.node_id for node in nodes]
    with ray_pool(config, probe=probe, here=here, vetted=vetted, encode=encode) as pool:
        yield pool


def workers_on(nodes: "list[Node]", asked: int | None) -> int:
    """How many conversion workers to start: as asked for, or one a CPU.

    Raises:
        UserInputError: the nodes have no CPU, or fewer than asked for.
    """
    num_cpus = sum(int(node.resources["CPU"]) for node in nodes)
    if num_cpus == 0:
        raise UserInputError("expected a node with CPUs in the cluster, found none; start one with `ray start`")
    if asked is not None and asked > num_cpus:
        sizes = ", ".join(f"{node.name}: {node.resources['CPU']:g}" for node in nodes)
        raise UserInputError(
            f"--workers {asked}: expected at most the cluster's {num_cpus} CPUs ({sizes}); ask for fewer, or add nodes"
        )
    return asked or num_cpus
