"""One question to every node: which nodes there are, and what is said of those that do not answer."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from ca2st.errors import UserInputError
from ray_jobs.cluster import ray_access
from ray_jobs.cluster.ray_access import living_nodes


def entry(address: str, node_id: str, *, alive: bool = True) -> dict[str, Any]:
    return {"NodeManagerAddress": address, "NodeID": node_id, "Alive": alive, "Resources": {"CPU": 4.0}}


def test_the_dead_are_left_out_and_two_nodes_of_one_machine_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [entry("10.0.0.2", "cc" * 28), entry("10.0.0.1", "bb" * 28), entry("10.0.0.1", "aa" * 28)]
    table.append(entry("10.0.0.3", "dd" * 28, alive=False))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(nodes=lambda: table))
    nodes = living_nodes()
    assert [node.name for node in nodes] == ["10.0.0.1 (aaaaaaaa)", "10.0.0.1 (bbbbbbbb)", "10.0.0.2 (cccccccc)"]
    assert nodes[0].resources == {"CPU": 4.0}


@pytest.mark.parametrize(
    ("cause", "what"),
    [
        (UserInputError("media: no such folder"), "media: no such folder"),
        (ValueError("first\nsecond"), "ValueError: first"),
        (
            ModuleNotFoundError("No module named 'sharding'"),
            "ModuleNotFoundError: No module named 'sharding' (is ca2st installed there as here?)",
        ),
    ],
)
def test_what_was_raised_on_a_node_is_told_in_a_line(cause: Exception, what: str) -> None:
    assert ray_access._raised(cause) == what
