"""What the answers of a cluster's nodes mean; pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ray_jobs.doctor.finding import Finding

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
