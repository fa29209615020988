"""Ask every node of a cluster what works there, and what works between them. Call it inside a Ray session."""

import time
import uuid
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from ray_jobs.doctor import cluster_findings as judged
from ray_jobs.doctor.finding import Finding
from ray_jobs.doctor.libraries import installed_versions
from ray_jobs.doctor.node_examination import Door, examine_node, remove_token, unseen_tokens, write_token
from ray_jobs.environment import RECORDED_PACKAGES
from ray_jobs.every_node import Node, NodeFailure, ask_every_node, gathered, living_nodes
from ray_jobs.ray_probe import who_listens

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
    findings += judged.judge_versions(here, {node.name: one.versions for node, one in reports.items()})
    findings += judged.judge_gpus(
        {node.name: int(node.resources.get("GPU", 0)) for node in reports},
        {node.name: report.num_gpus for node, report in reports.items()},
    )
    answering = list(reports)
    for folder in storage:
        findings += judged.judge_storage(folder, _storage(folder, answering))
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


def _storage(folder: str, nodes: Sequence[Node]) -> dict[str, judged.StorageLook]:
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
        node.name: judged.StorageLook(
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
        *judged.judge_reach({node.name: out_of_reach for node, out_of_reach in closed.items()}),
        *judged.judge_clocks(clocks),
        *_silence(silent | lost),
    ]


def _clocks(doors: Mapping[Node, Any]) -> dict[str, judged.ClockReading]:
    """Each node's clock, asked one after the other: an answer that waits for another one's would look late."""
    readings = {}
    for node, door in doors.items():
        before = time.time()
        answer = gathered({door.seconds.remote(): node}, timeout_seconds=_ANSWER_SECONDS)[node]
        after = time.time()
        if not isinstance(answer, NodeFailure):
            ahead = answer - (before + after) / 2
            readings[node.name] = judged.ClockReading(ahead_seconds=ahead, error_seconds=(after - before) / 2)
    return readings
