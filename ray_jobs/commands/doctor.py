"""``ca2st doctor``."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ray_jobs.commands.options import refuse_other_examination

if TYPE_CHECKING:
    from ray_jobs.doctor.machine import Finding

_AMOUNT = re.compile(r"-?\d+(?:\.\d+)?(?= (?:of|GiB|s)\b)")
"""A number that may differ from node to node; versions and counts are none of these."""


def doctor(
    out: Annotated[Path | None, typer.Option(help="Folder that runs are written under; default: runs.")] = None,
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow store; default: as a training takes it.")] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Examine every node of this Ray cluster: auto, or host:port of its head.", metavar="ADDRESS"),
    ] = None,
    storage: Annotated[
        list[Path] | None, typer.Option(help="With --ray-address: a folder that all nodes should share; repeatable.")
    ] = None,
    accept_open_ray: Annotated[
        bool, typer.Option("--i-accept-open-ray", help="Join a cluster that asks nobody for a token.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """Try what a training needs on this machine: packages, GPU, codecs, disk, MLflow, Ray; and say how to fix it.

    With --ray-address on every node of a cluster, and between them: versions, shared storage, connections, clocks;
    what is the same on all nodes is printed once. Ends with 4 where something needed does not work; what is only slower
    without it is marked optional.

    Example: ca2st doctor, or: ca2st doctor --ray-address auto --storage /shared/runs
    """
    from ca2st.errors import EnvironmentFault
    from ray_jobs.config.sections import LaunchConfig
    from ray_jobs.console import print_json

    refuse_other_examination(
        ray_address=ray_address,
        of_machine={"--out": out, "--tracking-uri": tracking_uri},
        of_cluster={"--storage": storage, "--i-accept-open-ray": accept_open_ray},
    )
    if ray_address is None:
        findings = _examine_machine(out or Path(LaunchConfig().runs_folder), tracking_uri, show=not as_json)
    else:
        findings = _examine_cluster(ray_address, storage or [], accept_open_ray, show=not as_json)
    if as_json:
        print_json({"checks": findings})
    if broken := [_name(finding) for finding in findings if not finding.ok and finding.needed]:
        raise EnvironmentFault(f"needed and not working: {', '.join(broken)}; the fix stands with each")


def _examine_machine(out: Path, tracking_uri: str | None, *, show: bool) -> "list[Finding]":
    from ray_jobs.console import result
    from ray_jobs.doctor.examination import all_checks, examine

    findings = []
    for finding in examine(all_checks(out, tracking_uri=tracking_uri)):
        findings.append(finding)
        if show:
            result(_line(finding))
    return findings


def _examine_cluster(address: str, storage: Sequence[Path], accept_open: bool, *, show: bool) -> "list[Finding]":
    from ray_jobs.cluster.ray_access import found_access, ray_session
    from ray_jobs.console import result, say

    with ray_session(address, access=found_access(accept_open=accept_open)):
        from ray_jobs.cluster.node_check import examine_cluster

        say("asking every node; a cold one takes a minute")
        findings = examine_cluster([str(folder.absolute()) for folder in storage])
    if show:
        for finding in merged(findings):
            result(_line(finding))
    return findings


def merged(findings: "Sequence[Finding]") -> "list[Finding]":
    """Join findings that nodes share: `node` then names all of them; amounts that are ok are given as a range."""
    by_name: dict[str, list[Finding]] = {}
    for finding in findings:
        by_name.setdefault(finding.name, []).append(finding)
    num_nodes = len({finding.node for finding in findings if finding.node is not None})
    return [one for group in by_name.values() for one in _merged_group(group, num_nodes)]


def _merged_group(group: "Sequence[Finding]", num_nodes: int) -> "list[Finding]":
    by_answer: dict[tuple[bool, bool, str], list[Finding]] = {}
    for finding in group:
        what = _AMOUNT.sub("#", finding.what) if finding.ok else finding.what
        by_answer.setdefault((finding.ok, finding.needed or finding.ok, what), []).append(finding)
    return [
        one[0] if one[0].node is None else replace(one[0], what=_in_ranges(one), node=_nodes(one, num_nodes))
        for one in by_answer.values()
    ]


def _nodes(group: "Sequence[Finding]", num_nodes: int) -> str:
    if len(group) == num_nodes > 1:
        return f"all {num_nodes} nodes"
    return ", ".join(str(finding.node) for finding in group)


def _in_ranges(group: "Sequence[Finding]") -> str:
    """Return the common text, an amount that differs as ``least to most``."""
    columns = iter(list(zip(*(_AMOUNT.findall(finding.what) for finding in group), strict=True)))

    def amount(match: re.Match[str]) -> str:
        values = sorted(set(next(columns)), key=float)
        return match.group() if len(values) == 1 else f"{values[0]} to {values[-1]}"

    return _AMOUNT.sub(amount, group[0].what) if group[0].ok else group[0].what


def _name(finding: "Finding") -> str:
    return finding.name if finding.node is None else f"{finding.name} on {finding.node}"


def _line(finding: "Finding") -> str:
    mark = "ok" if finding.ok else "NOT OK" if finding.needed else "optional"
    node = f"  [{finding.node}]" if finding.node is not None else ""
    mend = f"\n{'':<25}fix: {finding.mend}" if not finding.ok else ""
    return f"{mark:<9}{finding.name:<16}{finding.what}{node}{mend}"
