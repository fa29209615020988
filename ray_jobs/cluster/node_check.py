"""One examination of a cluster's nodes: facts are gathered on every node, and judged in pure functions.

The doctor prints the findings. A training and a conversion refuse a cluster whose nodes differ, before anything
starts: they would fail later and worse, with other numbers, or with checkpoints that nobody finds.

Call it inside a Ray session. Ray's processes on the nodes import this module: what is heavy is imported in functions.
"""

import contextlib
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from ca2st.durable import write_bytes
from ca2st.errors import CA2STError, EnvironmentFault
from ray_jobs.cluster import ray_access
from ray_jobs.doctor import Finding, check_folder, examine, machine_checks
from ray_jobs.environment import versions

_EXAMINATION_SECONDS = 300.0  # imports torch and DALI on a cold node, and tries every codec
_ANSWER_SECONDS = 60.0
_REACH_SECONDS = 5.0
_SEEN_WITHIN_SECONDS = 5.0  # network storage may show another machine's new file a little later
_MOST_OFF_SECONDS = 1.0
_HARMFUL_OFF_SECONDS = 60.0
_GIB = 2**30
_HERE = "this process"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFacts:
    """What was found on one node; what was not asked is empty."""

    versions: Mapping[str, str]
    """Of Python and of the packages that can change the numbers or the bytes, as far as they are installed."""
    data: Mapping[str, str] = field(default_factory=dict)
    """Fingerprint of each shard set by role, or size of each media file by path; without what cannot be read."""
    problem: str = ""
    """Why shard sets or weights cannot be used there."""
    clips: tuple[str, ...] = ()
    """Hash of each clip that was converted on trial, or the reason why it is a reject."""
    findings: tuple[Finding, ...] = ()
    """Of the machine, for the doctor."""
    num_gpus: int = 0
    """CUDA devices that torch sees; 0 where it cannot be imported."""


# Who asks.


def examine_cluster(storage: Sequence[str] = ()) -> list[Finding]:
    """Return every finding of the cluster that this process has joined: of the whole, and of each node by its name.

    `storage`: absolute paths of folders that all nodes should share.
    """
    nodes = ray_access.living_nodes()
    found, silent = ray_access.ask_every_node(examine_machine, nodes=nodes, timeout_seconds=_EXAMINATION_SECONDS)
    findings = _whole(nodes) + judge_silence(silent) + [one for facts in found.values() for one in facts.findings]
    findings += judge_versions(versions(), by_name(found))
    findings += judge_gpus({node: facts.num_gpus for node, facts in found.items()})
    for folder in storage:
        findings += judge_storage(folder, try_storage(folder, list(found)))
    return findings + _between(list(found))


def check_training_nodes(recipe: Mapping[str, Any], folder: Path, nodes: Sequence[ray_access.Node]) -> None:
    """Compare code, data and run folder of `nodes` with this process's; `folder` lies in the run folder.

    Raises:
        EnvironmentFault: a node gives no answer, has other versions or other data, or does not share the folder.
    """
    here = look_at_data(recipe)
    found, silent = ray_access.ask_every_node(look_at_data, dict(recipe), nodes=nodes)
    refuse(
        judge_silence(silent)
        + judge_versions(here.versions, by_name(found))
        + judge_storage(str(folder.parents[1]), try_storage(str(folder), list(found)))
        + judge_data(here, {_HERE: here, **by_name(found)}),
        "every node to have this one's code and data, and to share its run folder",
    )


# What runs on a node.


def examine_machine() -> NodeFacts:
    """Try all that a training needs of the machine this is called on; what is missing there is a finding."""
    node = ray_access.this_node().name
    folder = partial(check_folder, Path(tempfile.gettempdir()))
    findings = examine({**machine_checks(), "disk temporary": folder})
    try:
        import torch

        num_gpus = torch.cuda.device_count()
    except Exception:  # noqa: BLE001 - a broken torch may raise anything; its own check says what
        num_gpus = 0
    return NodeFacts(
        versions=versions(), findings=tuple(replace(finding, node=node) for finding in findings), num_gpus=num_gpus
    )


def look_at_data(recipe: Mapping[str, Any]) -> NodeFacts:
    """Return versions and data as this process has them."""
    from ray_jobs.config.recipe import recipe_from_document
    from ray_jobs.runs.worker import preflight

    facts = NodeFacts(versions=versions())
    try:
        return replace(facts, data=preflight(recipe_from_document(recipe)).fingerprints)
    except (CA2STError, OSError) as error:
        return replace(facts, problem=str(error))


# What the facts mean.


def judge_silence(silent: Mapping[ray_access.Node, str]) -> list[Finding]:
    """Judge nodes that gave no answer."""
    fix = "see to the node, install ca2st there as here, or take it out of the cluster"
    return [finding("answer", node.name, why, fix=fix) for node, why in silent.items()]


def judge_versions(here: Mapping[str, str], there: Mapping[str, NodeFacts]) -> list[Finding]:
    """Judge whether every node has this machine's versions of what can change numbers."""
    findings = []
    for node, facts in there.items():
        pairs = {
            name: (facts.versions.get(name, "none"), here.get(name, "none"))
            for name in sorted(here.keys() | facts.versions.keys())
        }
        wrong = [f"{name} {theirs}, here {ours}" for name, (theirs, ours) in pairs.items() if theirs != ours]
        fix = "install one environment on all nodes: requirements.lock, or one container image"
        findings.append(finding("versions", node, "; ".join(wrong), fine=f"{len(here)} packages as here", fix=fix))
    return findings


def judge_data(here: NodeFacts, there: Mapping[str, NodeFacts]) -> list[Finding]:
    """Judge whether every node reads this machine's shard sets or media files; name the first that differs."""
    findings = []
    for node, facts in there.items():
        missing = [name for name in here.data if name not in facts.data]
        other = [name for name, what in here.data.items() if facts.data.get(name, what) != what]
        wrong = facts.problem
        if missing and not wrong:
            wrong = f"cannot read {missing[0]} ({len(missing)} of {len(here.data)} tried)"
        elif other and not wrong:
            wrong = f"{other[0]}: {facts.data[other[0]]}, here {here.data[other[0]]}"
        fix = "put one copy on storage that all nodes mount at the same place, or give a URL"
        findings.append(finding("data", node, wrong, fix=fix))
    return findings


def judge_gpus(seen: Mapping[ray_access.Node, int]) -> list[Finding]:
    """Judge whether Ray gives out the GPUs that torch finds on a node; fewer may be what the user wants."""
    return [
        Finding(
            name="gpus for ray",
            ok=(given := int(node.resources.get("GPU", 0))) == num_seen,
            what=f"Ray gives out {given}, torch sees {num_seen}",
            fix="restart the node with `ray start --num-gpus`, or fix its driver",
            needed=given > num_seen,
            node=node.name,
        )
        for node, num_seen in seen.items()
    ]


def judge_clocks(readings: Mapping[str, tuple[float, float]]) -> list[Finding]:
    """Judge whether clocks agree: curves and logs are ordered by them, and certificates and tokens have hours.

    `readings`: the seconds that each node is ahead of here, and the error of that.
    """
    return [
        Finding(
            name="clock",
            ok=abs(ahead) - error <= _MOST_OFF_SECONDS,
            what=f"{ahead:.3f} s ahead of here, known to {error:.3f} s",
            fix="let chrony or another NTP client keep the node's clock",
            needed=abs(ahead) > _HARMFUL_OFF_SECONDS,
            node=node,
        )
        for node, (ahead, error) in readings.items()
    ]


def judge_storage(folder: str, problems: Mapping[str, str]) -> list[Finding]:
    """Judge whether every node writes into the folder and reads what others wrote; of this process only failures."""
    fix = f"mount the same storage at {folder} on every node, writable by this user"
    return [
        finding(f"storage {folder}", node, problem, fine="written, and read what all others wrote", fix=fix)
        for node, problem in problems.items()
        if problem or node != _HERE
    ]


def judge_reach(out_of_reach: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Judge whether every node opens connections to every node, on ports that no rule was made for."""
    fine = f"reaches all {len(out_of_reach)} on a free port"
    fix = "open all ports between the nodes, to them alone: torch's process groups choose free ones"
    return [
        finding(
            "network",
            node,
            "; ".join(f"cannot reach {other} at {why}" for other, why in closed.items()),
            fine=fine,
            fix=fix,
        )
        for node, closed in out_of_reach.items()
    ]


def finding(name: str, node: str, wrong: str, *, fix: str, fine: str = "as here") -> Finding:
    """Return what was found on a node: `wrong`, or where that is empty what is `fine`."""
    return Finding(name=name, ok=not wrong, what=wrong or fine, fix=fix, node=node)


def refuse(findings: Sequence[Finding], expected: str, *, error: type[EnvironmentFault] = EnvironmentFault) -> None:
    """Raise `error` with a line per node for what is not ok in `findings`."""
    wrong = [one for one in findings if not one.ok]
    if not wrong:
        return
    by_node: dict[str, list[str]] = {}
    for one in wrong:
        by_node.setdefault(str(one.node), []).append(one.what)
    width = max(map(len, by_node))
    lines = "".join(f"\n  {node:<{width}}  {'; '.join(what)}" for node, what in by_node.items())
    fixes = "".join(f"\n{fix}" for fix in dict.fromkeys(one.fix for one in wrong))
    raise error(f"expected {expected}, found {len(by_node)} that do not:{lines}{fixes}")


# Between the nodes.


def try_storage(folder: str, nodes: Sequence[ray_access.Node]) -> dict[str, str]:
    """Have each of `nodes`, and this process, write a file into `folder` and look for those of all that could.

    Returns by node what is wrong with the folder there; empty where nothing is.
    """
    prefix = str(Path(folder) / f".ca2st-{uuid.uuid4().hex}-")
    ask = partial(ray_access.ask_every_node, nodes=nodes, timeout_seconds=_ANSWER_SECONDS)
    owners = {f"{prefix}here": _HERE} | {f"{prefix}{node.node_id}": node.name for node in nodes}
    try:
        told, silent = ask(write_token, prefix)
        problems = {_HERE: write_token(prefix, "here"), **by_name(told), **by_name(silent)}
        written = [place for place, owner in owners.items() if not problems[owner]]
        missed, silent = ask(unseen_tokens, written)
        unseen = {_HERE: unseen_tokens(written), **by_name(missed)}
    finally:
        ask(remove_token, prefix)
        remove_token(prefix, "here")
    later = {
        owner: ", ".join(f"does not see the file of {owners[place]}" for place in places)
        for owner, places in unseen.items()
    } | by_name(silent)
    return {owner: problem or later[owner] for owner, problem in problems.items()}


def write_token(prefix: str, name: str = "") -> str:
    """Write a file that names itself, by default for this node; return why that cannot be, or an empty string."""
    place = f"{prefix}{name or ray_access.this_node().node_id}"
    if not Path(place).parent.is_dir():
        return "no such folder"
    try:
        write_bytes(Path(place), place.encode())
    except (OSError, EnvironmentFault) as error:
        return str(error)
    return ""


def unseen_tokens(
    places: Sequence[str],
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[str]:
    """Return those of `places` that cannot be read here within some seconds."""
    deadline, unseen = clock() + _SEEN_WITHIN_SECONDS, list(places)
    while True:
        unseen = [place for place in unseen if not _is_seen(Path(place))]
        if not unseen or clock() >= deadline:
            return unseen
        sleep(0.2)


def remove_token(prefix: str, name: str = "") -> None:
    """Remove the file of `write_token`, if it is there."""
    with contextlib.suppress(OSError):
        Path(f"{prefix}{name or ray_access.this_node().node_id}").unlink()


def _is_seen(place: Path) -> bool:
    try:
        return place.read_text() == str(place)
    except OSError:  # not there yet, or not readable
        return False


class Door:
    """A port that is open on a node as long as this lives, and the node's clock."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def open(self) -> tuple[str, int]:
        """Listen on a free port of the address that the cluster knows this node by."""
        self._socket = socket.create_server((ray_access.this_node().address, 0))
        address, port = self._socket.getsockname()
        return address, port

    def seconds(self) -> float:
        """Return the seconds since 1970 by this node's clock."""
        return time.time()

    def out_of_reach(self, doors: Mapping[str, tuple[str, int]]) -> dict[str, str]:
        """Return those of `doors`, by node, that cannot be entered from here, and why."""
        found = {}
        for node, door in doors.items():
            try:
                socket.create_connection(door, timeout=_REACH_SECONDS).close()
            except OSError as error:
                found[node] = f"{door[0]}:{door[1]} {error.strerror or error}"
        return found


def _between(nodes: Sequence[ray_access.Node]) -> list[Finding]:
    """Judge connections and clocks, by an actor on every node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actor = ray.remote(num_cpus=0, max_restarts=0)(Door)
    doors: dict[ray_access.Node, Any] = {
        node: actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote()
        for node in nodes
    }
    try:
        opened = {doors[node].open.remote(): node for node in nodes}
        places, silent = ray_access.gathered(opened, timeout_seconds=_ANSWER_SECONDS)
        clocks = _clocks({node: doors[node] for node in places})
        asked = {doors[node].out_of_reach.remote(by_name(places)): node for node in places}
        closed, lost = ray_access.gathered(asked, timeout_seconds=_ANSWER_SECONDS + _REACH_SECONDS * len(places))
    finally:
        for door in doors.values():
            ray.kill(door)
    return [*judge_reach(by_name(closed)), *judge_clocks(clocks), *judge_silence(silent | lost)]


def _clocks(doors: Mapping[ray_access.Node, Any]) -> dict[str, tuple[float, float]]:
    """Ask each node's clock, one after the other: an answer that waits for another one's would look late."""
    readings = {}
    for node, door in doors.items():
        before = time.time()
        told, _ = ray_access.gathered({door.seconds.remote(): node}, timeout_seconds=_ANSWER_SECONDS)
        after = time.time()
        if node in told:
            readings[node.name] = (told[node] - (before + after) / 2, (after - before) / 2)
    return readings


def _whole(nodes: Sequence[ray_access.Node]) -> list[Finding]:
    """Say how large the cluster is, and whether it asks for a token."""
    import ray

    free = ray.available_resources()  # type: ignore[no-untyped-call]  # Ray has no types there
    total = {name: sum(node.resources.get(name, 0) for node in nodes) for name in ("CPU", "GPU", "memory")}
    what = (
        f"Ray {metadata.version('ray')}, {len(nodes)} node{'s' if len(nodes) > 1 else ''}: "
        f"{total['CPU']:g} CPUs ({free.get('CPU', 0):g} free), {total['GPU']:g} GPUs ({free.get('GPU', 0):g} free), "
        f"{total['memory'] / _GIB:.0f} GiB memory"
    )
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    is_closed = ray_access.who_listens(host.strip("[]"), int(port), token="") != "open cluster"
    return [
        Finding(name="ray cluster", ok=True, what=what),
        Finding(
            name="ray token",
            ok=is_closed,
            what="the cluster asks for one" if is_closed else "open: everybody who reaches the cluster runs code there",
            fix="start every node with RAY_AUTH_MODE=token and one token",
            needed=False,
        ),
    ]


def by_name(found: Mapping[ray_access.Node, T]) -> dict[str, T]:
    """Return what was found by the names of the nodes."""
    return {node.name: what for node, what in found.items()}
