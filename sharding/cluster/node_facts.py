"""What of a machine decides the bytes of a conversion, and whether a node is like the machine that writes the shards.

The versions of the tools, whether the media are there, and what a few clips really become: two processors may round
differently under equal versions, and two nodes may have mounted different copies of a folder.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sharding.conversion import ConversionConfig, tool_versions
from sharding.decode_child import ClipJob, EncodedClip, encode_clip
from sharding.errors import UnlikeNodeError
from sharding.source import SourceList
from sharding.workers import DecodePool

_NUM_PATHS = 16
_NUM_ENCODED = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A few clips of a conversion that every node tries first."""

    paths: tuple[Path, ...]
    """Media files, absolute, that the machine which writes the shards can see."""
    jobs: tuple[ClipJob, ...]
    """Clips that are converted on trial."""
    timeout_seconds: float
    memory_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFacts:
    """What a machine makes of a probe."""

    tool_versions: Mapping[str, str]
    file_bytes: tuple[int | None, ...]
    """Size of each of the probe's files; None: not readable there."""
    clips: tuple[str, ...]
    """Hash of each of the probe's clips, or the reason why it is a reject."""


def probe_of(source: SourceList, config: ConversionConfig) -> Probe:
    """Files spread over the list, and clips of the first and the middle one of them."""
    present = [sample for sample in source.samples if sample.path.is_file()]
    chosen = present[:: -(-len(present) // _NUM_PATHS) or 1]
    encoded = chosen[:: -(-len(chosen) // _NUM_ENCODED) or 1]
    return Probe(
        paths=tuple(sample.path.absolute() for sample in chosen),
        jobs=tuple(config.job(sample) for sample in encoded),
        timeout_seconds=config.clip_timeout_seconds,
        memory_bytes=config.clip_memory_bytes,
    )


def node_facts(probe: Probe) -> NodeFacts:
    """What this machine makes of `probe`.

    Raises:
        EnvironmentFault: a decode child cannot be started.
    """
    with DecodePool(
        encode_clip, num_workers=1, timeout_seconds=probe.timeout_seconds, memory_bytes=probe.memory_bytes
    ) as pool:
        clips = tuple(_clip_hash(clip) for clip in pool.map(probe.jobs))
    return NodeFacts(tool_versions=tool_versions(), file_bytes=tuple(map(_size, probe.paths)), clips=clips)


def refuse_unlike_nodes(here: NodeFacts, there: Mapping[str, NodeFacts], probe: Probe) -> None:
    """Raise UnlikeNodeError with a line a node for those in `there` that differ from `here`."""
    unlike = {place: what for place, facts in there.items() if (what := differences(here, facts, probe))}
    if unlike:
        width = max(map(len, unlike))
        lines = "\n".join(f"  {place:<{width}}  {'; '.join(what)}" for place, what in unlike.items())
        raise UnlikeNodeError(
            f"expected every node to convert as this machine does, found {len(unlike)} of {len(there)} that would "
            f"not:\n{lines}\nmount the media folder at the same place and install the same packages on every node, "
            "or take these nodes out of the cluster"
        )


def differences(here: NodeFacts, there: NodeFacts, probe: Probe) -> list[str]:
    """How a node differs, in words; a later difference that follows from an earlier one is left out."""
    missing = [path for path, size in zip(probe.paths, there.file_bytes, strict=True) if size is None]
    if missing:
        return [f"cannot read {missing[0]} ({len(missing)} of {len(probe.paths)} files tried)"]
    found = [
        f"{path}: {theirs} bytes, here {ours}"
        for path, ours, theirs in zip(probe.paths, here.file_bytes, there.file_bytes, strict=True)
        if ours != theirs
    ][:1]
    names = sorted(here.tool_versions.keys() | there.tool_versions.keys())
    found += [
        f"{name} {there.tool_versions.get(name)}, here {here.tool_versions.get(name)}"
        for name in names
        if there.tool_versions.get(name) != here.tool_versions.get(name)
    ]
    if found or there.clips == here.clips:
        return found
    path = next(
        job.path for job, ours, theirs in zip(probe.jobs, here.clips, there.clips, strict=True) if ours != theirs
    )
    return [f"converts {path} to other bytes under equal versions: is the processor of another type?"]


def _size(path: Path) -> int | None:
    try:
        with path.open("rb") as file:
            file.read(1)
            return file.seek(0, 2)
    except OSError:
        return None


def _clip_hash(clip: Any) -> str:
    if not isinstance(clip, EncodedClip):
        return f"{clip.reason}: {clip.what}"
    audio = None if clip.audio is None else replace(clip.audio, pcm=clip.audio.pcm[:0])
    digest = hashlib.sha256(clip.video.mp4)
    digest.update(b"" if clip.audio is None else clip.audio.pcm.tobytes())
    digest.update(repr((replace(clip.video, mp4=b""), audio, clip.source_codec, clip.duration_seconds)).encode())
    return digest.hexdigest()
