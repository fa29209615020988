"""Before anything starts: the same code, the same data and one shared folder on every node that may train.

A node that differs would fail a run later and worse: with other numbers, or with checkpoints that nobody finds.
Nodes report facts; what they mean is decided in pure functions.
"""

import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ca2st.durable import write_bytes
from ca2st.errors import CA2STError, EnvironmentFault
from ray_jobs.cluster.every_node import Node, NodeFailure, ask_every_node, this_node

_DRIVER = "driver"
_SEEN_WITHIN_SECONDS = 5.0
"""Network storage may show another machine's new file a little later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeReport:
    """What was found on one node."""

    node: str
    """Its name."""
    problem: str = ""
    """Why it gave no report at all."""
    versions: Mapping[str, str]
    """Of Python and of the packages that can change numbers."""
    fingerprints: Mapping[str, str]
    """Of the manifests that it read, by role."""
    data_problem: str = ""
    """Why data or weights cannot be used there."""
    folder_problem: str = ""
    """Why the run folder cannot be written there."""
    sees_driver: bool = False
    """Whether it read what the driver wrote into the run folder."""
    seen_by_driver: bool = False
    """Whether the driver read what it wrote there."""


def check_nodes(recipe: Mapping[str, Any], folder: Path, nodes: Sequence[Node], *, mine: NodeReport) -> None:
    """Have each of `nodes` look at code, data and `folder`, which lies in the run folder; `mine` is the driver's look.

    Raises:
        EnvironmentFault: as `judge`.
    """
    tokens = folder / "tokens"
    token = uuid.uuid4().hex
    tokens.mkdir()
    write_bytes(tokens / _DRIVER, token.encode())
    try:
        answers = ask_every_node(look_around, dict(recipe), str(tokens), token, nodes=nodes)
        judge([mine, *(_report(node, answer, tokens, token) for node, answer in answers.items())], folder=folder)
    finally:
        shutil.rmtree(tokens, ignore_errors=True)


def look_around(recipe: Mapping[str, Any], tokens: str, token: str) -> NodeReport:
    """Runs on a node: what it has, and whether it reads and writes the run folder."""
    node = this_node()
    report = look_at_data(recipe, node=node.name)
    try:
        write_bytes(Path(tokens) / node.node_id, token.encode())
    except (OSError, EnvironmentFault) as error:
        return replace(report, folder_problem=str(error))
    return replace(report, sees_driver=sees(Path(tokens) / _DRIVER, token))


def look_at_data(recipe: Mapping[str, Any], *, node: str) -> NodeReport:
    """Versions and data as this process has them."""
    from ray_jobs import environment
    from ray_jobs.config.recipe import recipe_from_document
    from ray_jobs.runs.start import preflight

    report = NodeReport(node=node, versions=environment.versions(), fingerprints={})
    try:
        return replace(report, fingerprints=preflight(recipe_from_document(recipe)).fingerprints)
    except (CA2STError, OSError) as error:
        return replace(report, data_problem=str(error))


def sees(
    path: Path,
    token: str,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Whether `path` comes to hold `token` within some seconds."""
    deadline = clock() + _SEEN_WITHIN_SECONDS
    while True:
        try:
            if path.read_text() == token:
                return True
        except OSError:
            pass  # not there yet, or not readable: so it is not seen
        if clock() >= deadline:
            return False
        sleep(0.2)


def judge(reports: Sequence[NodeReport], *, folder: Path) -> None:
    """Refuse a cluster whose nodes differ; the first of `reports` is the driver's.

    Raises:
        EnvironmentFault: no report from a node, other versions, a run folder that is not shared or not writable, data
            that is missing or other data; the message has a line for every node.
    """
    _refuse(reports, lambda one: one.problem, "expected a report of every node", "mend the node or take it out")
    _check_versions(reports)
    _refuse(
        reports[1:],
        _folder_problem,
        f"{folder.parents[1]}: expected a run folder that every node reads and writes",
        "put it on storage that all nodes share (--out, or launch.runs_folder)",
    )
    _check_data(reports)


def _report(node: Node, answer: NodeReport | NodeFailure, tokens: Path, token: str) -> NodeReport:
    if isinstance(answer, NodeFailure):
        return NodeReport(node=node.name, problem=answer.what, versions={}, fingerprints={})
    if answer.folder_problem:
        return answer
    return replace(answer, seen_by_driver=sees(tokens / node.node_id, token))


def _refuse(reports: Sequence[NodeReport], problem: Callable[[NodeReport], str], expected: str, mend: str) -> None:
    if any(problem(report) for report in reports):
        table = "".join(f"\n  {report.node}: {problem(report) or 'as it should be'}" for report in reports)
        raise EnvironmentFault(f"{expected}; {mend}:{table}")


def _folder_problem(report: NodeReport) -> str:
    if report.folder_problem:
        return report.folder_problem
    if not report.sees_driver:
        return "does not see what the driver wrote there"
    return "" if report.seen_by_driver else "wrote there, but the driver does not see it"


def _check_versions(reports: Sequence[NodeReport]) -> None:
    names = dict.fromkeys(name for report in reports for name in report.versions)
    differing = [name for name in names if len({report.versions.get(name) for report in reports}) > 1]
    if differing:
        table = "".join(
            f"\n  {report.node}: " + ", ".join(f"{name} {report.versions.get(name, 'none')}" for name in differing)
            for report in reports
        )
        raise EnvironmentFault(
            f"versions: expected the same on all nodes, found other {', '.join(differing)}; install one environment "
            f"everywhere (`ca2st submit` brings it along):{table}"
        )


def _check_data(reports: Sequence[NodeReport]) -> None:
    _refuse(
        reports,
        lambda one: one.data_problem,
        "data: expected the recipe's shards and weights on every node",
        "put them on storage that all nodes share, or give a URL",
    )
    mine = reports[0].fingerprints
    _refuse(
        reports,
        lambda one: _other_sets(mine, one.fingerprints),
        "data: expected the same shards on every node",
        "put one copy on storage that all nodes share",
    )


def _other_sets(mine: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    other = [role for role in mine if theirs.get(role) != mine[role]]
    return ", ".join(f"{role} has another manifest than the driver's" for role in other)
