"""The examination of a cluster's nodes.

What runs on each node of a cluster that is examined; what it means is judged in `ray_jobs.doctor.cluster`.

Heavy imports are inside the functions: Ray's processes on the nodes import this module.

What the answers of a cluster's nodes mean; pure.

Ask every node of a cluster what works there, and what works between them. Call it inside a Ray session.
"""

import contextlib
import re
import socket
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from ca2st.durable import write_bytes
from ca2st.errors import EnvironmentFault
from ray_jobs.cluster.every_node import Node, NodeFailure, ask_every_node, gathered, living_nodes
from ray_jobs.cluster.ray_access import who_listens
from ray_jobs.doctor.machine import Finding, installed_versions
from ray_jobs.environment import RECORDED_PACKAGES

_REACH_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeReport:
    """What a node says of itself."""

    findings: tuple[Finding, ...]
    versions: Mapping[str, str]
    """Of Python and the packages that were asked for, as far as they are installed."""
    num_gpus: int
    """CUDA devices that torch sees; 0 where it cannot be imported."""


def examine_node(packages: Sequence[str]) -> NodeReport:
    """Try all that a training needs of the machine this is called on; what is missing there is a finding.

    `packages`: whose versions are asked.
    """
    from ray_jobs.cluster.every_node import this_node
    from ray_jobs.doctor.examination import examine, machine_checks
    from ray_jobs.doctor.machine import check_folder, installed_versions

    node = this_node().name
    folder = partial(check_folder, "disk temporary", Path(tempfile.gettempdir()))
    findings = examine({**machine_checks(), "disk temporary": folder})
    return NodeReport(
        findings=tuple(replace(finding, node=node) for finding in findings),
        versions=installed_versions(packages),
        num_gpus=_num_gpus(),
    )


def _num_gpus() -> int:
    try:
        import torch

        return torch.cuda.device_count()
    except Exception:  # noqa: BLE001 - a broken torch may raise anything; its own check tells what
        return 0


def write_token(folder: str, token: str) -> str:
    """Write this node's file into `folder`; why it cannot, or an empty string."""
    from ray_jobs.cluster.every_node import this_node

    if not Path(folder).is_dir():
        return "no such folder"
    try:
        write_bytes(_token_file(folder, token, this_node().node_id), token.encode())
    except (OSError, EnvironmentFault) as error:
        return str(error)
    return ""


def unseen_tokens(folder: str, token: str, node_ids: Sequence[str]) -> list[str]:
    """Those of `node_ids` whose files cannot be read here within some seconds."""
    from ray_jobs.cluster.node_check import sees

    return [node_id for node_id in node_ids if not sees(_token_file(folder, token, node_id), token)]


def remove_token(folder: str, token: str) -> None:
    """Remove this node's file, if it is there."""
    from ray_jobs.cluster.every_node import this_node

    with contextlib.suppress(OSError):
        _token_file(folder, token, this_node().node_id).unlink()


def _token_file(folder: str, token: str, node_id: str) -> Path:
    return Path(folder) / f".ca2st-doctor-{token}-{node_id}"


class Door:
    """A port that is open on a node as long as this lives, and the node's clock."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def open(self) -> tuple[str, int]:
        """Listen on a free port of the address that the cluster knows this node by."""
        from ray_jobs.cluster.every_node import this_node

        self._socket = socket.create_server((this_node().address, 0))
        address, port = self._socket.getsockname()
        return address, port

    def seconds(self) -> float:
        """Seconds since 1970 by this node's clock."""
        return time.time()

    def out_of_reach(self, doors: Mapping[str, tuple[str, int]]) -> dict[str, str]:
        """Those of `doors`, by node, that cannot be entered from here, and why."""
        found = {}
        for node, door in doors.items():
            try:
                socket.create_connection(door, timeout=_REACH_SECONDS).close()
            except OSError as error:
                found[node] = f"{door[0]}:{door[1]} {error.strerror or error}"
        return found


_MOST_OFF_SECONDS = 1.0
_HARMFUL_OFF_SECONDS = 60.0
_AMOUNT = re.compile(r"-?\d+(?:\.\d+)?(?= (?:of|GiB|s)\b)")
"""A number that may differ from node to node; versions and counts are none of these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClockReading:
    """A node's clock against this machine's."""

    ahead_seconds: float
    error_seconds: float
    """Half of the time the question took."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageLook:
    """What a node made of a folder that all should share."""

    problem: str = ""
    """Why it cannot write there."""
    unseen: tuple[str, ...] = ()
    """Nodes whose files it does not see."""


def judge_versions(here: Mapping[str, str], there: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Every node has this machine's versions of what can change numbers."""
    findings = []
    for node, versions in there.items():
        wrong = [
            f"{name} {versions.get(name, 'none')}, here {here.get(name, 'none')}"
            for name in sorted(here.keys() | versions.keys())
            if versions.get(name) != here.get(name)
        ]
        findings.append(
            Finding(
                name="versions",
                ok=not wrong,
                what="; ".join(wrong) or f"{len(here)} packages as here",
                mend="install one environment on all nodes: requirements.lock, or one container image",
                node=node,
            )
        )
    return findings


def judge_gpus(given: Mapping[str, int], seen: Mapping[str, int]) -> list[Finding]:
    """Ray gives out as many GPUs of a node as torch finds there; fewer may be what the user wants."""
    return [
        Finding(
            name="gpus for ray",
            ok=given[node] == num_seen,
            what=f"Ray gives out {given[node]}, torch sees {num_seen}",
            mend="restart the node with `ray start --num-gpus`, or mend its driver",
            needed=given[node] > num_seen,
            node=node,
        )
        for node, num_seen in seen.items()
    ]


def judge_clocks(readings: Mapping[str, ClockReading]) -> list[Finding]:
    """Clocks agree: curves and logs are ordered by them, and certificates and tokens have hours."""
    return [
        Finding(
            name="clock",
            ok=abs(reading.ahead_seconds) - reading.error_seconds <= _MOST_OFF_SECONDS,
            what=f"{reading.ahead_seconds:.3f} s ahead of here, known to {reading.error_seconds:.3f} s",
            mend="let chrony or another NTP client keep the node's clock",
            needed=abs(reading.ahead_seconds) > _HARMFUL_OFF_SECONDS,
            node=node,
        )
        for node, reading in readings.items()
    ]


def judge_storage(folder: str, looks: Mapping[str, StorageLook]) -> list[Finding]:
    """Every node writes into the folder and reads what the others wrote."""
    findings = []
    for node, look in looks.items():
        what = look.problem or ", ".join(f"does not see the file of {other}" for other in look.unseen)
        findings.append(
            Finding(
                name=f"storage {folder}",
                ok=not what,
                what=what or f"written, and read what all {len(looks)} wrote",
                mend="mount the same storage there on every node, writable by this user",
                node=node,
            )
        )
    return findings


def judge_reach(out_of_reach: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Every node opens connections to every node, on ports that no rule was made for."""
    return [
        Finding(
            name="network",
            ok=not closed,
            what="; ".join(f"cannot reach {other} at {why}" for other, why in closed.items())
            or f"reaches all {len(out_of_reach)} on a free port",
            mend="open all ports between the nodes, to them alone: torch's process groups choose free ones",
            node=node,
        )
        for node, closed in out_of_reach.items()
    ]


def merged(findings: Sequence[Finding]) -> list[Finding]:
    """Findings that nodes share as one: `node` then names all of them; amounts that are ok are given as a range."""
    by_name: dict[str, list[Finding]] = {}
    for finding in findings:
        by_name.setdefault(finding.name, []).append(finding)
    num_nodes = len({finding.node for finding in findings if finding.node is not None})
    return [one for group in by_name.values() for one in _merged_group(group, num_nodes)]


def _merged_group(group: Sequence[Finding], num_nodes: int) -> list[Finding]:
    by_answer: dict[tuple[bool, bool, str], list[Finding]] = {}
    for finding in group:
        what = _AMOUNT.sub("#", finding.what) if finding.ok else finding.what
        by_answer.setdefault((finding.ok, finding.needed or finding.ok, what), []).append(finding)
    return [
        one[0] if one[0].node is None else replace(one[0], what=_in_ranges(one), node=_nodes(one, num_nodes))
        for one in by_answer.values()
    ]


def _nodes(group: Sequence[Finding], num_nodes: int) -> str:
    if len(group) == num_nodes > 1:
        return f"all {num_nodes} nodes"
    return ", ".join(str(finding.node) for finding in group)


def _in_ranges(group: Sequence[Finding]) -> str:
    """The common text, an amount that differs as ``least to most``."""
    columns = iter(list(zip(*(_AMOUNT.findall(finding.what) for finding in group), strict=True)))

    def amount(match: re.Match[str]) -> str:
        values = sorted(set(next(columns)), key=float)
        return match.group() if len(values) == 1 else f"{values[0]} to {values[-1]}"

    return _AMOUNT.sub(amount, group[0].what) if group[0].ok else group[0].what


_EXAMINATION_SECONDS = 300.0  # imports torch and DALI on a cold node, and tries every codec
_ANSWER_SECONDS = 60.0
_GIB = 2**30


def examine_cluster(storage: Sequence[str] = ()) -> list[Finding]:
    """Every finding of the cluster that this process has joined: of the whole, and of each node by its name.

    `storage`: absolute paths of folders that all nodes should share.
    """
    nodes = living_nodes()
    findings = _whole(nodes)
    answers = ask_every_node(examine_node, RECORDED_PACKAGES, nodes=nodes, timeout_seconds=_EXAMINATION_SECONDS)
    reports, silent = _split(answers)
    findings += _silence(silent)
    findings += [finding for report in reports.values() for finding in report.findings]
    here = installed_versions(RECORDED_PACKAGES)
    findings += judge_versions(here, {node.name: one.versions for node, one in reports.items()})
    findings += judge_gpus(
        {node.name: int(node.resources.get("GPU", 0)) for node in reports},
        {node.name: report.num_gpus for node, report in reports.items()},
    )
    answering = list(reports)
    for folder in storage:
        findings += judge_storage(folder, _storage(folder, answering))
    return findings + _between(answering)


def _whole(nodes: Sequence[Node]) -> list[Finding]:
    import ray

    free = ray.available_resources()  # type: ignore[no-untyped-call]  # Ray has no types there
    total = {name: sum(node.resources.get(name, 0) for node in nodes) for name in ("CPU", "GPU", "memory")}
    what = (
        f"Ray {metadata.version('ray')}, {len(nodes)} node{'s' if len(nodes) > 1 else ''}: "
        f"{total['CPU']:g} CPUs ({free.get('CPU', 0):g} free), {total['GPU']:g} GPUs ({free.get('GPU', 0):g} free), "
        f"{total['memory'] / _GIB:.0f} GiB memory"
    )
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    is_closed = who_listens(host.strip("[]"), int(port), token="") != "open cluster"
    return [
        Finding(name="ray cluster", ok=True, what=what),
        Finding(
            name="ray token",
            ok=is_closed,
            what="the cluster asks for one" if is_closed else "open: everybody who reaches the cluster runs code there",
            mend="start every node with RAY_AUTH_MODE=token and one token",
            needed=False,
        ),
    ]


def _split(answers: Mapping[Node, Any]) -> tuple[dict[Node, Any], dict[Node, NodeFailure]]:
    silent = {node: answer for node, answer in answers.items() if isinstance(answer, NodeFailure)}
    return {node: answer for node, answer in answers.items() if node not in silent}, silent


def _silence(silent: Mapping[Node, NodeFailure]) -> list[Finding]:
    mend = "see to the node, install ca2st there as here, or take it out of the cluster"
    return [
        Finding(name="answer", ok=False, what=failure.what, mend=mend, node=node.name)
        for node, failure in silent.items()
    ]


def _storage(folder: str, nodes: Sequence[Node]) -> dict[str, StorageLook]:
    """Each node writes a file into `folder`, then looks for those of all that could."""
    token = uuid.uuid4().hex
    asked: dict[str, Any] = {"nodes": nodes, "timeout_seconds": _ANSWER_SECONDS}
    try:
        problems = {
            node: _words(answer) for node, answer in ask_every_node(write_token, folder, token, **asked).items()
        }
        names = {node.node_id: node.name for node, problem in problems.items() if not problem}
        seen = ask_every_node(unseen_tokens, folder, token, list(names), **asked)
    finally:
        ask_every_node(remove_token, folder, token, **asked)
    return {
        node.name: StorageLook(
            problem=problems[node] or (answer.what if isinstance(answer, NodeFailure) else ""),
            unseen=() if isinstance(answer, NodeFailure) else tuple(names[node_id] for node_id in answer),
        )
        for node, answer in seen.items()
    }


def _words(answer: str | NodeFailure) -> str:
    return answer.what if isinstance(answer, NodeFailure) else answer


def _between(nodes: Sequence[Node]) -> list[Finding]:
    """Connections and clocks, by an actor on every node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actor = ray.remote(num_cpus=0, max_restarts=0)(Door)
    doors: dict[Node, Any] = {
        node: actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote()
        for node in nodes
    }
    try:
        opened = {doors[node].open.remote(): node for node in nodes}
        places, silent = _split(gathered(opened, timeout_seconds=_ANSWER_SECONDS))
        by_name = {node.name: place for node, place in places.items()}
        clocks = _clocks({node: doors[node] for node in places})
        asked = {doors[node].out_of_reach.remote(by_name): node for node in places}
        closed, lost = _split(gathered(asked, timeout_seconds=_ANSWER_SECONDS + 5 * len(places)))
    finally:
        for door in doors.values():
            ray.kill(door)
    return [
        *judge_reach({node.name: out_of_reach for node, out_of_reach in closed.items()}),
        *judge_clocks(clocks),
        *_silence(silent | lost),
    ]


def _clocks(doors: Mapping[Node, Any]) -> dict[str, ClockReading]:
    """Each node's clock, asked one after the other: an answer that waits for another one's would look late."""
    readings = {}
    for node, door in doors.items():
        before = time.time()
        answer = gathered({door.seconds.remote(): node}, timeout_seconds=_ANSWER_SECONDS)[node]
        after = time.time()
        if not isinstance(answer, NodeFailure):
            ahead = answer - (before + after) / 2
            readings[node.name] = ClockReading(ahead_seconds=ahead, error_seconds=(after - before) / 2)
    return readings
