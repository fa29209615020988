"""What the driver asks of a cluster before anything starts: decided from facts made up, without one."""

from dataclasses import replace
from pathlib import Path

import pytest

from ca2st.errors import EnvironmentFault
from ray_jobs.cluster import node_check
from ray_jobs.cluster.driver import check_demand, demand_of, hosts, most_workers
from ray_jobs.cluster.every_node import Node, NodeFailure
from ray_jobs.cluster.node_check import NodeReport, judge, sees
from ray_jobs.cluster.supervision import LaunchFolder
from ray_jobs.cluster.worker_life import with_absolute_paths
from ray_jobs.config.recipe import ExpertsConfig, StartConfig, recipe_document
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.config.sections import LaunchConfig, MixtureSet

HEAD = Node(address="10.0.0.1", node_id="a" * 56, resources={"CPU": 4.0, "memory": 1e9})
BIG = Node(address="10.0.0.2", node_id="b" * 56, resources={"CPU": 8.0, "GPU": 4.0, "accelerator_type:H100": 1.0})
SMALL = Node(address="10.0.0.3", node_id="c" * 56, resources={"CPU": 2.0, "GPU": 1.0, "accelerator_type:A100": 1.0})
NODES = [HEAD, BIG, SMALL]


# --- J3: what is asked against what is there


def test_j3_gpus_are_used_where_a_node_has_them_whatever_the_driver_has() -> None:
    assert demand_of(LaunchConfig(), NODES).resources == {"GPU": 1.0}
    assert demand_of(LaunchConfig(), [HEAD]).resources == {"CPU": 1.0}
    assert demand_of(LaunchConfig(gpus_per_worker=0), NODES).resources == {"CPU": 1.0}
    assert demand_of(LaunchConfig(gpus_per_worker=1, cpus_per_worker=2), [HEAD]).resources == {"CPU": 2, "GPU": 1.0}
    typed = demand_of(LaunchConfig(accelerator_type="H100"), [])
    assert typed.resources == {"GPU": 1.0, "accelerator_type:H100": 0.001}
    assert typed.gpus == 1


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
    assert most_workers(demand_of(launch, NODES), NODES) == most
    check_demand(demand_of(replace(launch, workers=most), NODES), NODES)
    with pytest.raises(EnvironmentFault, match=f"found room for {most}"):
        check_demand(demand_of(replace(launch, workers=most + 1), NODES), NODES)


def test_j3_the_refusal_shows_every_node_and_says_what_to_do() -> None:
    launch = LaunchConfig(workers=2, accelerator_type="H100", cpus_per_worker=9)
    with pytest.raises(EnvironmentFault) as refused:
        check_demand(demand_of(launch, NODES), NODES)
    told = str(refused.value)
    assert "room for 2 workers of 9 CPU, 1 GPU, H100 each" in told
    assert "10.0.0.2 (bbbbbbbb): 8 CPU, 4 GPU, H100; room for 0" in told
    assert all(node.address in told for node in NODES)
    assert "launch.wait_for_resources" in told


def test_j3_an_elastic_run_asks_for_its_fewest_workers_only() -> None:
    check_demand(demand_of(LaunchConfig(workers=9, min_workers=5), NODES), NODES)
    with pytest.raises(EnvironmentFault, match="room for 6 workers"):
        check_demand(demand_of(LaunchConfig(workers=9, min_workers=6), NODES), NODES)


def test_j3_a_cluster_without_nodes_is_refused() -> None:
    with pytest.raises(EnvironmentFault, match="no node"):
        check_demand(demand_of(LaunchConfig(), []), [])


def test_only_nodes_on_which_a_worker_fits_are_looked_at() -> None:
    assert hosts(demand_of(LaunchConfig(), NODES), NODES) == [BIG, SMALL]


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

MINE = NodeReport(node="driver", versions={"python": "3.11", "torch": "2.9"}, fingerprints={"train": "f1"})
OTHER = replace(MINE, node="b", sees_driver=True, seen_by_driver=True)
FOLDER = Path("/shared/runs/mine/launches/one")


def refusal(*reports: NodeReport) -> str:
    with pytest.raises(EnvironmentFault) as refused:
        judge(reports, folder=FOLDER)
    return str(refused.value)


def test_nodes_that_agree_pass() -> None:
    judge([MINE, OTHER, replace(OTHER, node="c")], folder=FOLDER)


def test_j5_other_versions_are_refused_with_the_table_of_what_differs() -> None:
    told = refusal(MINE, OTHER, replace(OTHER, node="c", versions={"python": "3.11", "torch": "2.8"}))
    assert "found other torch" in told
    assert "b: torch 2.9\n  c: torch 2.8" in told
    assert "python" not in told


def test_j5_a_package_that_a_node_lacks_is_another_version() -> None:
    assert "b: torch none" in refusal(MINE, replace(OTHER, versions={"python": "3.11"}))


def test_j4_a_run_folder_that_is_not_shared_is_refused_with_the_node() -> None:
    told = refusal(MINE, OTHER, replace(OTHER, node="c", sees_driver=False))
    assert told.startswith("/shared/runs/mine: expected a run folder that every node reads and writes")
    assert "b: as it should be\n  c: does not see what the driver wrote" in told
    assert "the driver does not see it" in refusal(MINE, replace(OTHER, seen_by_driver=False))


def test_j4_a_run_folder_that_cannot_be_written_is_refused_with_the_reason() -> None:
    assert "b: cannot write /shared: Read-only" in refusal(
        MINE, replace(OTHER, folder_problem="cannot write /shared: Read-only")
    )


def test_j2_data_that_one_node_lacks_names_the_node() -> None:
    told = refusal(MINE, OTHER, replace(OTHER, node="c", data_problem="/data/train: no manifest.json"))
    assert "c: /data/train: no manifest.json" in told
    assert "b: as it should be" in told


def test_j2_other_data_under_the_same_path_is_refused() -> None:
    assert "c: train has another manifest than the driver's" in refusal(
        MINE, OTHER, replace(OTHER, node="c", fingerprints={"train": "f2"})
    )


def test_j5_a_node_without_a_report_is_refused_first() -> None:
    silent = NodeReport(node="c", problem="No module named 'ca2st'", versions={}, fingerprints={})
    assert "expected a report of every node" in refusal(MINE, OTHER, silent)


def test_j4_every_node_reads_the_drivers_token_and_the_driver_reads_every_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = LaunchFolder.make(tmp_path, "run")
    asked: list[Node] = []
    monkeypatch.setattr(node_check, "_SEEN_WITHIN_SECONDS", 0.0)

    def answers(
        _function: object, _recipe: object, tokens: str, token: str, *, nodes: list[Node]
    ) -> dict[Node, object]:
        asked.extend(nodes)
        assert (Path(tokens) / "driver").read_text() == token
        (Path(tokens) / BIG.node_id).write_text(token)
        report = replace(OTHER, node=BIG.name, seen_by_driver=False)
        return {BIG: report, SMALL: replace(report, node=SMALL.name)} if SMALL in nodes else {BIG: report}

    monkeypatch.setattr(node_check, "ask_every_node", answers)
    node_check.check_nodes({}, folder.path, [BIG], mine=MINE)
    with pytest.raises(EnvironmentFault, match=r"10\.0\.0\.3 .*: wrote there, but the driver does not see it"):
        node_check.check_nodes({}, folder.path, [BIG, SMALL], mine=MINE)
    assert asked == [BIG, BIG, SMALL]
    assert list(folder.path.iterdir()) == []


def test_j5_a_node_that_fails_to_answer_is_named_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = LaunchFolder.make(tmp_path, "run")
    failed = {BIG: NodeFailure(what="ModuleNotFoundError: No module named 'ray_jobs'")}
    monkeypatch.setattr(node_check, "ask_every_node", lambda *_arguments, **_options: failed)
    with pytest.raises(EnvironmentFault, match=r"10\.0\.0\.2 .*: ModuleNotFoundError"):
        node_check.check_nodes({}, folder.path, [BIG], mine=MINE)


def test_j4_a_token_that_shows_up_late_is_seen_and_a_wrong_one_never(tmp_path: Path) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 1:
            (tmp_path / "late").write_text("token")

    assert sees(tmp_path / "late", "token", clock=lambda: now[0], sleep=sleep)
    assert not sees(tmp_path / "late", "another", clock=lambda: now[0], sleep=sleep)


def test_j2_a_node_tells_why_it_cannot_use_the_data(tmp_path: Path) -> None:
    recipe = load_recipe("smoke", [f"data.train='{tmp_path}/nothing'"])
    report = node_check.look_at_data(recipe_document(recipe), node="b")
    assert "nothing" in report.data_problem
    assert report.versions["torch"]
