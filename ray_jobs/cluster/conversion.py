"""A conversion by tasks on a Ray cluster, its nodes compared with this machine first.

A few clips are converted on every node: two processors may round differently under equal versions, and two nodes may
have mounted different copies of a folder.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ca2st.durable import NO_FAULTS, FaultPoints
from ca2st.errors import UserInputError
from ray_jobs.cluster import node_check
from ray_jobs.cluster.ray_access import LOCAL, Node, RayAccess, ask_every_node, living_nodes, ray_session, this_node
from ray_jobs.console import convert_shown, say
from ray_jobs.doctor import Finding
from sharding.cluster import RayShards
from sharding.conversion import ConversionReport
from sharding.errors import UnlikeNodeError
from sharding.media.encode import ClipJob, EncodedClip, encode_clip
from sharding.settings import ConversionConfig, tool_versions
from sharding.shard_task import ShardPool, ShardSetup
from sharding.source import SourceList
from sharding.workers import DecodePool, Rejected

_COLD_SECONDS = 120.0  # a cold interpreter on a busy node, beside the limits of the clips
_NUM_PATHS = 16
_NUM_ENCODED = 2


def convert_on_cluster(
    source: SourceList,
    out: str | Path,
    config: ConversionConfig,
    *,
    address: str,
    access: RayAccess,
    num_workers: int | None,
    faults: FaultPoints = NO_FAULTS,
) -> ConversionReport:
    """Run `convert_shown`, the shards made by Ray tasks on the nodes, to the same bytes.

    The nodes need the media and a folder `out` under the same paths, or it is a URL. `address`: as of `ray_session`.
    `num_workers`: shards that are made at a time, one CPU each; None: all CPUs of the cluster.

    Raises:
        UserInputError: more workers than the cluster has CPUs, or no token.
        UnlikeNodeError: a node does not see the media or `out`, or would write other bytes.
        EnvironmentFault: no cluster answers, or its workers are lost again and again.
    """

    @contextmanager
    def pool(setup: ShardSetup, _num_tasks: int) -> Iterator[ShardPool]:
        with (
            ray_session(address, access=access, num_cpus=num_workers if address == LOCAL else None),
            joined_pool(source, num_workers, setup) as joined,
        ):
            yield joined

    return convert_shown(source, out, config, faults=faults, pool=pool)


@contextmanager
def joined_pool(source: SourceList, num_workers: int | None, setup: ShardSetup) -> Iterator[ShardPool]:
    """Open the pool of a joined cluster, once its nodes were compared with this machine; raises as the conversion."""
    nodes = [node for node in living_nodes() if node.resources.get("CPU", 0) >= 1]
    num_workers = workers_on(nodes, num_workers)
    probe = probe_of(source, setup.config)
    say(f"{num_workers} workers on {len(nodes)} nodes, each of which tries {len(probe.jobs)} clips first")
    if isinstance(setup.out, Path):
        shared = node_check.judge_storage(str(setup.out), node_check.try_storage(str(setup.out), nodes))
        node_check.refuse(shared, "every node to write into the folder of --out", error=UnlikeNodeError)
    here = try_clips(probe)
    seconds = _COLD_SECONDS + len(probe.jobs) * probe.timeout_seconds
    found, silent = ask_every_node(try_clips, probe, nodes=nodes, timeout_seconds=seconds)
    refuse_other_clips(probe, here, node_check.by_name(found), node_check.judge_silence(silent))
    vet, vetted = partial(check_this_node, probe, here), [node.node_id for node in nodes]
    with RayShards(setup, num_workers=num_workers, vet=vet, vetted=vetted) as pool:
        yield pool


def workers_on(nodes: Sequence[Node], asked: int | None) -> int:
    """Return how many conversion workers to start: as asked for (a UserInputError beyond the CPUs), or one per CPU."""
    num_cpus = sum(int(node.resources["CPU"]) for node in nodes)
    if num_cpus == 0:
        raise UserInputError("expected a node with CPUs in the cluster, found none; start one with `ray start`")
    if asked is not None and asked > num_cpus:
        sizes = ", ".join(f"{node.name}: {node.resources['CPU']:g}" for node in nodes)
        raise UserInputError(
            f"--workers {asked}: expected at most the cluster's {num_cpus} CPUs ({sizes}); ask for fewer, or add nodes"
        )
    return asked or num_cpus


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A few clips of a conversion that every node tries first."""

    paths: tuple[Path, ...]
    """Media files, absolute, that the machine which runs the conversion can see."""
    jobs: tuple[ClipJob, ...]
    """Clips that are converted on trial."""
    timeout_seconds: float
    memory_bytes: int


def probe_of(source: SourceList, config: ConversionConfig) -> Probe:
    """Return files spread over the list, and clips of the first and the middle one of them."""
    present = [sample for sample in source.samples if sample.path.is_file()]
    chosen = present[:: -(-len(present) // _NUM_PATHS) or 1]
    encoded = chosen[:: -(-len(chosen) // _NUM_ENCODED) or 1]
    return Probe(
        paths=tuple(sample.path.absolute() for sample in chosen),
        jobs=tuple(config.job(sample) for sample in encoded),
        timeout_seconds=config.clip_timeout_seconds,
        memory_bytes=config.clip_memory_bytes,
    )


def try_clips(probe: Probe) -> node_check.NodeFacts:
    """Return what the machine this is called on makes of `probe`."""
    with DecodePool(
        encode_clip, num_workers=1, timeout_seconds=probe.timeout_seconds, memory_bytes=probe.memory_bytes
    ) as pool:
        clips = tuple(_hash_of(clip) for clip in pool.map(probe.jobs))
    sizes = {path: _size_of(path) for path in probe.paths}
    data = {str(path): f"{size} bytes" for path, size in sizes.items() if size is not None}
    return node_check.NodeFacts(versions=tool_versions(), data=data, clips=clips)


def check_this_node(probe: Probe, here: node_check.NodeFacts) -> None:
    """As `refuse_other_clips`, of the node this is called on, which joined later; `here`: who runs the conversion."""
    refuse_other_clips(probe, here, {this_node().name: try_clips(probe)})


def refuse_other_clips(
    probe: Probe, here: node_check.NodeFacts, there: Mapping[str, node_check.NodeFacts], silence: Sequence[Finding] = ()
) -> None:
    """Refuse nodes that do not make the same of a probe as this machine.

    Raises:
        UnlikeNodeError: a node gave no answer (`silence`), does not see the media, or would write other bytes.
    """
    expected = "every node to convert as this machine does"
    findings = [*silence, *node_check.judge_data(here, there), *node_check.judge_versions(here.versions, there)]
    node_check.refuse(findings, expected, error=UnlikeNodeError)
    fix = "is the processor of another type? take the node out of the cluster"
    for node, facts in there.items():
        for job, ours, theirs in zip(probe.jobs, here.clips, facts.clips, strict=True):
            wrong = f"converts {job.path} to other bytes under equal versions" if ours != theirs else ""
            findings.append(node_check.finding("clips", node, wrong, fix=fix))
    node_check.refuse(findings, expected, error=UnlikeNodeError)


def _size_of(path: Path) -> int | None:
    """Return the size of a file; None where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.read(1)
            return file.seek(0, 2)
    except OSError:
        return None


def _hash_of(clip: EncodedClip | Rejected) -> str:
    """Return the hash of a converted clip, or the reason why it is a reject."""
    if not isinstance(clip, EncodedClip):
        return f"{clip.reason}: {clip.what}"
    audio = None if clip.audio is None else replace(clip.audio, pcm=clip.audio.pcm[:0])
    digest = hashlib.sha256(clip.video.mp4)
    digest.update(b"" if clip.audio is None else clip.audio.pcm.tobytes())
    digest.update(repr((replace(clip.video, mp4=b""), audio, clip.source_codec, clip.duration_seconds)).encode())
    return digest.hexdigest()
