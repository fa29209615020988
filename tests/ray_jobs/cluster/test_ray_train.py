"""What the driver asks of a cluster before anything starts: decided from facts made up, without one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ca2st.errors import EnvironmentFault
from ray_jobs.cluster import node_check, ray_access
from ray_jobs.cluster.driver import check_room, most_workers, resources_of, room, with_absolute_paths
from ray_jobs.cluster.node_check import NodeFacts, check_training_nodes, look_at_data, unseen_tokens
from ray_jobs.cluster.ray_access import Node
from ray_jobs.cluster.supervision import LaunchFolder
from ray_jobs.config.recipe import ExpertsConfig, LaunchConfig, MixtureSet, StartConfig, recipe_document
from ray_jobs.config.recipe_file import load_recipe

HEAD = Node(address="10.0.0.1", node_id="a" * 56, resources={"CPU": 4.0, "memory": 1e9})
BIG = Node(address="10.0.0.2", node_id="b" * 56, resources={"CPU": 8.0, "GPU": 4.0, "accelerator_type:H100": 1.0})
SMALL = Node(address="10.0.0.3", node_id="c" * 56, resources={"CPU": 2.0, "GPU": 1.0, "accelerator_type:A100": 1.0})
NODES = [HEAD, BIG, SMALL]


# --- J3: what is asked against what is there


def test_j3_gpus_are_used_where_a_node_has_them_whatever_the_driver_has() -> None:
    assert resources_of(LaunchConfig(), NODES) == {"GPU": 1.0}
    assert resources_of(LaunchConfig(), [HEAD]) == {"CPU": 1.0}
    assert resources_of(LaunchConfig(gpus_per_worker=0), NODES) == {"CPU": 1.0}
    assert resources_of(LaunchConfig(gpus_per_worker=1, cpus_per_worker=2), [HEAD]) == {"CPU": 2, "GPU": 1.0}
    typed = resources_of(LaunchConfig(accelerator_type="H100"), [])
    assert typed == {"GPU": 1.0, "accelerator_type:H100": 0.001}


@pytest.mark.parametrize(
    ("launch", "most"),
    [
        (LaunchConfig(), 5),
        (LaunchConfig(placement="STRICT_PACK"), 4),
        (LaunchConfig(placement="STRICT_SPREAD"), 2),
        (LaunchConfig(cpus_per_worker=3.0), 2),
        (LaunchConfig(accelerator_type="A100"), 1),
        (LaunchConfig(gpus_per_worker=0, cpus_per_worker=0.1), 140),
    ],
)
def test_j3_a_worker_must_fit_on_one_node_and_all_of_them_as_they_are_to_be_placed(
    launch: LaunchConfig, most: int
) -> None:
    assert most_workers(launch, NODES) == most
    check_room(replace(launch, workers=most), NODES)
    with pytest.raises(EnvironmentFault, match=f"found room for {most}"):
        check_room(replace(launch, workers=most + 1), NODES)


def test_j3_the_refusal_shows_every_node_and_says_what_to_do() -> None:
    launch = LaunchConfig(workers=2, accelerator_type="H100", cpus_per_worker=9)
    with pytest.raises(EnvironmentFault) as refused:
        check_room(launch, NODES)
    told = str(refused.value)
    assert "room for 2 workers of 9 CPU, 1 GPU, H100 each" in told
    assert "10.0.0.2 (bbbbbbbb): 8 CPU, 4 GPU, H100; room for 0" in told
    assert all(node.address in told for node in NODES)
    assert "launch.wait_for_resources" in told


def test_j3_an_elastic_run_asks_for_its_fewest_workers_only() -> None:
    check_room(LaunchConfig(workers=9, min_workers=5), NODES)
    with pytest.raises(EnvironmentFault, match="room for 6 workers"):
        check_room(LaunchConfig(workers=9, min_workers=6), NODES)


def test_j3_a_cluster_without_nodes_is_refused() -> None:
    with pytest.raises(EnvironmentFault, match="no node"):
        check_room(LaunchConfig(), [])


def test_only_nodes_on_which_a_worker_fits_are_looked_at() -> None:
    assert [node for node in NODES if room(node, resources_of(LaunchConfig(), NODES))] == [BIG, SMALL]


def test_relative_paths_of_a_recipe_mean_the_same_in_a_worker_which_runs_elsewhere() -> None:
    settings = ["data.train=shards/train", "data.validation='s3://bucket/set'", "data.loader.cache_dir=/cache"]
    settings += ["experts.spatial='hf-hub:org/name'", "experts.audio=audio.safetensors"]
    recipe = with_absolute_paths(load_recipe("smoke", settings), Path("/home/me"))
    assert recipe.data.train == "/home/me/shards/train"
    assert recipe.data.validation == "s3://bucket/set"
    assert recipe.data.loader.cache_dir == "/cache"
    assert recipe.experts.sources() == {"spatial": "hf-hub:org/name", "audio": "/home/me/audio.safetensors"}
    sets = (MixtureSet(train="a"), MixtureSet(train="/b"))
    data = replace(recipe.data, train=None, synthetic=None, mixture=sets)
    started = replace(recipe, data=data, experts=ExpertsConfig(), start=StartConfig(checkpoint="runs/first"))
    mixed = with_absolute_paths(started, Path("/home/me"))
    assert [one.train for one in mixed.data.mixture] == ["/home/me/a", "/b"]
    assert mixed.start is not None
    assert mixed.start.checkpoint == "/home/me/runs/first"


# --- J2, J4, J5: the same code, data and folder everywhere

MINE = NodeFacts(versions={"python": "3.11", "torch": "2.9"}, data={"train": "f1"})
SHARED = {"this process": "", BIG.name: "", SMALL.name: ""}


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Have BIG find what this process finds and SMALL something else; return the refusal."""
    folder = LaunchFolder.make(tmp_path / "mine", "run")

    def check(small: NodeFacts | str, storage: dict[str, str] = SHARED) -> str:
        """`small`: what it found, or why it gave no answer."""
        answers = ({BIG: MINE}, {SMALL: small}) if isinstance(small, str) else ({BIG: MINE, SMALL: small}, {})
        monkeypatch.setattr(node_check, "look_at_data", lambda _recipe: MINE)
        monkeypatch.setattr(ray_access, "ask_every_node", lambda *_, **__: answers)
        monkeypatch.setattr(node_check, "try_storage", lambda *_: storage)
        try:
            check_training_nodes({}, folder.path, [BIG, SMALL])
        except EnvironmentFault as refusal:
            return str(refusal)
        return ""

    return check


def test_nodes_that_agree_pass(check: Callable[..., str]) -> None:
    assert check(MINE) == ""


def test_j5_other_versions_are_refused_with_what_differs(check: Callable[..., str]) -> None:
    told = check(replace(MINE, versions={"python": "3.11", "torch": "2.8"}))
    assert told.splitlines()[:2] == [
        "expected every node to have this one's code and data, and to share its run folder, found 1 that do not:",
        "  10.0.0.3 (cccccccc)  torch 2.8, here 2.9",
    ]


def test_j5_a_package_that_a_node_lacks_is_another_version(check: Callable[..., str]) -> None:
    assert "torch none, here 2.9" in check(replace(MINE, versions={"python": "3.11"}))


def test_j4_a_run_folder_that_is_not_shared_is_refused_with_the_node(check: Callable[..., str], tmp_path: Path) -> None:
    told = check(MINE, {**SHARED, SMALL.name: "does not see the file of this process"})
    assert "  10.0.0.3 (cccccccc)  does not see the file of this process\n" in told
    assert f"mount the same storage at {tmp_path}/mine on every node" in told
    assert f"  this process  does not see the file of {SMALL}" in check(
        MINE, {**SHARED, "this process": f"does not see the file of {SMALL}"}
    )


def test_j4_a_run_folder_that_cannot_be_written_is_refused_with_the_reason(check: Callable[..., str]) -> None:
    problem = "cannot write /shared: Read-only"
    assert f"  10.0.0.3 (cccccccc)  {problem}\n" in check(MINE, {**SHARED, SMALL.name: problem})


def test_j2_data_that_one_node_lacks_names_the_node(check: Callable[..., str]) -> None:
    told = check(replace(MINE, problem="/data/train: no manifest.json"))
    assert "  10.0.0.3 (cccccccc)  /data/train: no manifest.json\n" in told
    assert "10.0.0.2" not in told


def test_j2_other_data_under_the_same_path_is_refused(check: Callable[..., str]) -> None:
    assert "10.0.0.3 (cccccccc)  train: f2, here f1" in check(replace(MINE, data={"train": "f2"}))


def test_j5_a_node_that_fails_to_answer_is_named_with_its_error(check: Callable[..., str]) -> None:
    told = check("ModuleNotFoundError: No module named 'ray_jobs'")
    assert "  10.0.0.3 (cccccccc)  ModuleNotFoundError: No module named 'ray_jobs'\nsee to the node, install" in told


def test_j4_every_node_and_the_driver_read_what_the_others_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BIG shares the folder; SMALL has one of its own under the same path."""
    monkeypatch.setattr(node_check, "_SEEN_WITHIN_SECONDS", 0.0)

    def answers(
        function: Callable[..., object], argument: Any, *, nodes: list[Node], **_: object
    ) -> tuple[dict[Node, object], dict[Node, str]]:
        found: dict[Node, object] = {}
        for node in nodes:
            monkeypatch.setattr(ray_access, "this_node", lambda node=node: node)
            shared = function(argument) if node is BIG else None
            found[node] = shared if node is BIG else argument[:2] if isinstance(argument, list) else ""
        return found, {}

    monkeypatch.setattr(ray_access, "ask_every_node", answers)
    assert node_check.try_storage(str(tmp_path), [BIG, SMALL]) == {
        "this process": f"does not see the file of {SMALL}",
        BIG.name: f"does not see the file of {SMALL}",
        SMALL.name: f"does not see the file of this process, does not see the file of {BIG}",
    }
    assert list(tmp_path.iterdir()) == []


def test_j4_a_token_that_shows_up_late_is_seen_and_a_wrong_one_never(tmp_path: Path) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 1:
            (tmp_path / "late").write_text(str(tmp_path / "late"))
            (tmp_path / "never").write_text("another")

    late, never = str(tmp_path / "late"), str(tmp_path / "never")
    assert unseen_tokens([late, never], clock=lambda: now[0], sleep=sleep) == [never]


def test_j2_a_node_tells_why_it_cannot_use_the_data(tmp_path: Path) -> None:
    recipe = load_recipe("smoke", [f"data.train='{tmp_path}/nothing'"])
    facts = look_at_data(recipe_document(recipe))
    assert "nothing" in facts.problem
    assert facts.versions["torch"]
