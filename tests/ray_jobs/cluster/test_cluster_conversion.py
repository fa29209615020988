"""``ca2st shard build --ray``: what is refused before anything is started."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ca2st.errors import UserInputError
from ray_jobs.cli import app
from ray_jobs.cluster.conversion import workers_on
from ray_jobs.cluster.ray_access import Node
from sharding import cluster
from support.media import make_clip


def node(number: int, num_cpus: float) -> Node:
    return Node(address=f"10.0.0.{number}", node_id=f"{number}" * 56, resources={"CPU": num_cpus})


def test_a_cluster_without_a_token_is_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("running", "waving"):
        (tmp_path / "media" / name).mkdir(parents=True)
        make_clip(tmp_path / "media" / name / "a.mp4", seconds=0.1, size=(32, 32))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    command = ["shard", "build", "--dataset", "folder", "--audio", "none", "--media", str(tmp_path / "media")]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out"), "--ray", "127.0.0.1:1"])
    assert isinstance(done.exception, UserInputError)
    assert "expected a cluster's token, found no token" in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_one_worker_per_cpu_is_started_unless_fewer_are_asked_for() -> None:
    nodes = [node(1, 16.0), node(2, 3.5)]
    assert workers_on(nodes, None) == 19
    assert workers_on(nodes, 4) == 4


def test_j3_more_workers_than_cpus_are_refused_with_the_sizes_of_the_nodes() -> None:
    with pytest.raises(UserInputError, match=r"--workers 20: .*19 CPUs \(10.0.0.1 \(11111111\): 16, .*: 3.5\); ask"):
        workers_on([node(1, 16.0), node(2, 3.5)], 20)


def test_a_cluster_without_cpus_is_refused() -> None:
    with pytest.raises(UserInputError, match="expected a node with CPUs"):
        workers_on([], None)


def test_the_first_try_of_a_worker_imports_what_it_needs_to_make_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node without our packages is so named at once, and not as a shard that loses its workers."""
    tried: list[object] = []

    class Remote:
        def __init__(self, function: object) -> None:
            tried.append(function)

        def remote(self) -> None:
            pass

    monkeypatch.setattr("ray.remote", lambda **_: Remote)
    monkeypatch.setattr("ray.get", lambda _ticket, **_: None)
    cluster._wait_for_room()
    assert all(getattr(cluster, function.__name__, None) is function for function in tried)  # type: ignore[attr-defined]
    assert len(tried) == 1
