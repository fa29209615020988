"""``ca2st doctor --ray-address``: what the answers of several nodes mean, and how they are told."""

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ca2st import __version__
from ca2st.errors import EnvironmentFault, UserInputError
from ray_jobs.cli import app
from ray_jobs.cluster import node_check, ray_access
from ray_jobs.cluster.node_check import (
    Door,
    NodeFacts,
    judge_clocks,
    judge_gpus,
    judge_reach,
    judge_storage,
    judge_versions,
    remove_token,
    unseen_tokens,
    write_token,
)
from ray_jobs.cluster.ray_access import Node
from ray_jobs.commands.machine import merged
from ray_jobs.doctor import Finding

A, B, C = "10.0.0.1 (aa)", "10.0.0.2 (bb)", "10.0.0.3 (cc)"


def told(findings: list[Finding]) -> list[tuple[str, bool, str, str | None]]:
    return [(one.name, one.ok, one.what, one.node) for one in findings]


def of_memory(node: str, gib: float, *, ok: bool = True) -> Finding:
    return Finding(name="memory", ok=ok, what=f"{gib} GiB usable", node=node)


def test_what_all_nodes_share_is_told_once_with_amounts_as_a_range() -> None:
    codec = Finding(name="video h264", ok=True, what="libx264 and back: 0.8 of 255 off on average")
    findings = [replace(codec, node=node) for node in (A, B, C)]
    findings += [of_memory(A, 30.5), of_memory(B, 128.0), of_memory(C, 30.5)]
    assert told(merged(findings)) == [
        ("video h264", True, codec.what, "all 3 nodes"),
        ("memory", True, "30.5 to 128.0 GiB usable", "all 3 nodes"),
    ]


def test_a_node_that_differs_or_fails_has_a_line_of_its_own() -> None:
    findings = [of_memory(A, 30.5), of_memory(B, 2.0, ok=False), of_memory(C, 30.5)]
    findings += [
        Finding(name="dali cpu", ok=True, what=f"DALI 2.{minor}", node=node) for minor, node in ((4, A), (3, B))
    ]
    findings += [Finding(name="ray cluster", ok=True, what="3 nodes")]
    assert told(merged(findings)) == [
        ("memory", True, "30.5 GiB usable", f"{A}, {C}"),
        ("memory", False, "2.0 GiB usable", B),
        ("dali cpu", True, "DALI 2.4", A),
        ("dali cpu", True, "DALI 2.3", B),
        ("ray cluster", True, "3 nodes", None),
    ]


def test_j5_a_node_with_other_versions_is_told_with_both() -> None:
    here = {"torch": "2.11.0", "ray": "2.60.0"}
    findings = judge_versions(here, {A: NodeFacts(versions=here), B: NodeFacts(versions={"torch": "2.10.0"})})
    assert told(findings) == [
        ("versions", True, "2 packages as here", A),
        ("versions", False, "ray none, here 2.60.0; torch 2.10.0, here 2.11.0", B),
    ]


def test_gpus_that_ray_gives_out_but_torch_does_not_see_are_told() -> None:
    nodes = [Node(address="10.0.0.1", node_id=f"{n}" * 56, resources={"GPU": gpus}) for n, gpus in enumerate((8, 8, 4))]
    findings = judge_gpus(dict(zip(nodes, (8, 0, 8), strict=True)))
    assert [(one.ok, one.needed, one.what) for one in findings] == [
        (True, False, "Ray gives out 8, torch sees 8"),
        (False, True, "Ray gives out 8, torch sees 0"),
        (False, False, "Ray gives out 4, torch sees 8"),
    ]


def test_a_clock_is_judged_by_what_is_certain_and_needed_only_when_far_off() -> None:
    readings = {A: (1.5, 0.6), B: (-1.5, 0.1), C: (7200.0, 0.1)}
    assert [(one.ok, one.needed) for one in judge_clocks(readings)] == [(True, False), (False, False), (False, True)]


def test_j4_storage_that_is_not_shared_names_both_nodes() -> None:
    problems = {A: "", B: f"does not see the file of {A}", C: "no such folder"}
    assert told(judge_storage("/runs", problems)) == [
        ("storage /runs", True, "written, and read what all others wrote", A),
        ("storage /runs", False, f"does not see the file of {A}", B),
        ("storage /runs", False, "no such folder", C),
    ]


def test_a_closed_way_between_two_nodes_is_told() -> None:
    findings = judge_reach({A: {}, B: {A: "10.0.0.1:4711 timed out"}})
    assert told(findings) == [
        ("network", True, "reaches all 2 on a free port", A),
        ("network", False, f"cannot reach {A} at 10.0.0.1:4711 timed out", B),
    ]


def test_a_door_can_be_entered_until_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_access, "this_node", lambda: Node(address="127.0.0.1", node_id="aa"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = free.getsockname()[1]
    door = Door()
    doors = {A: door.open(), B: ("127.0.0.1", nobody)}
    assert door.out_of_reach(doors) == {B: f"127.0.0.1:{nobody} Connection refused"}
    assert door._socket is not None
    door._socket.close()


def test_tokens_are_written_seen_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_check, "_SEEN_WITHIN_SECONDS", 0.0)
    prefix = f"{tmp_path}/t-"
    for node_id in ("aa", "bb"):
        monkeypatch.setattr(
            "ray_jobs.cluster.ray_access.this_node", lambda node_id=node_id: Node(address="x", node_id=node_id)
        )
        assert write_token(prefix) == ""
    assert unseen_tokens([f"{prefix}aa", f"{prefix}bb", f"{prefix}cc"]) == [f"{prefix}cc"]
    remove_token(prefix)
    assert unseen_tokens([f"{prefix}aa", f"{prefix}bb"]) == [f"{prefix}bb"]
    assert write_token(f"{tmp_path}/none/t-") == "no such folder"
    assert "/proc/" in write_token("/proc/t-")


def test_the_command_tells_the_cluster_and_ends_with_4_naming_check_and_node(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    @contextlib.contextmanager
    def session(address: str, **_: object) -> Iterator[None]:
        asked.append(address)
        yield

    def examine(storage: list[str]) -> list[Finding]:
        asked.extend(storage)
        return [of_memory(A, 30.5), of_memory(B, 2.0, ok=False)]

    monkeypatch.setattr("ray_jobs.cluster.ray_access.ray_session", session)
    monkeypatch.setattr(node_check, "examine_cluster", examine)
    done = CliRunner().invoke(app, ["doctor", "--ray-address", "head:6379", "--storage", "/runs", "--json"])
    assert asked == ["head:6379", "/runs"]
    assert [(one["name"], one["ok"], one["node"]) for one in json.loads(done.stdout.splitlines()[-1])["checks"]] == [
        ("memory", True, A),
        ("memory", False, B),
    ]
    assert isinstance(done.exception, EnvironmentFault)
    shown = CliRunner().invoke(app, ["doctor", "--ray-address", "head:6379"])
    assert f"NOT OK   memory          2.0 GiB usable  [{B}]" in shown.stdout
    assert f"memory on {B}" in str(shown.exception)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--storage", "/runs"], "--storage: expected --ray-address beside it"),
        (["--i-accept-open-ray"], "--i-accept-open-ray: expected --ray-address beside it"),
        (["--ray-address", "auto", "--out", "runs"], "--out: expected no --ray-address beside it"),
        (["--ray-address", "auto", "--tracking-uri", "runs"], "--tracking-uri: expected no --ray-address beside it"),
    ],
)
def test_options_of_the_other_examination_are_refused(options: list[str], told: str) -> None:
    done = CliRunner().invoke(app, ["doctor", *options])
    assert isinstance(done.exception, UserInputError)
    assert str(done.exception).startswith(told)


def test_a_node_examines_itself_and_signs_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ray_jobs.cluster.ray_access.this_node", lambda: Node(address="10.0.0.1", node_id="aabbccddeeff")
    )
    one = Finding(name="memory", ok=True, what="1 GiB usable")
    monkeypatch.setattr(node_check, "machine_checks", lambda: {"memory": lambda: one})
    report = node_check.examine_machine()
    assert [(found.name, found.node) for found in report.findings] == [
        ("memory", "10.0.0.1 (aabbccdd)"),
        ("disk temporary", "10.0.0.1 (aabbccdd)"),
    ]
    assert report.versions["ca2st"] == __version__


def test_a_node_without_some_packages_still_tells_everything_else() -> None:
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('torch', 'av', 'packaging'))\n"
        "from ray_jobs.cluster import ray_access, node_check\n"
        "ray_access.this_node = lambda: ray_access.Node(address='x', node_id='aabbccddeeff')\n"
        "report = node_check.examine_machine()\n"
        "findings = (f'{one.name}: {one.ok}' for one in report.findings)\n"
        "print(report.num_gpus, report.versions['ca2st'], *findings, sep=';')\n"
        "print(*(one.what for one in report.findings if one.name in ('torch', 'audio aac')), sep='|')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts, why = done.stdout.splitlines()
    num_gpus, version, *findings = facts.split(";")
    assert (num_gpus, version) == ("0", __version__)
    assert {"packages: False", "torch: False", "video h264: False", "audio aac: False"} < set(findings)
    assert {"memory: True", "open files: True", "disk temporary: True"} < set(findings)
    assert [one.partition(" halted")[0] for one in why.split("|")] == [
        "ModuleNotFoundError: import of torch",
        "ModuleNotFoundError: import of av",
    ]
