"""A training sent to a real Ray cluster as a job, with a worker killed on the way; the nodes have no ca2st."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from ray_jobs.environment import git_state
from ray_jobs.tracking.state import read_state
from support.ray_head import RayHead, bare_python, ray_head
from support.tiny_runs import ca2st, journal, make_tiny_run, sequence

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(580)]
NO_TRACKING = ("--set", "tracking.enabled=false")
UNAUTHORIZED = 401


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return bare_python(tmp_path_factory.mktemp("bare") / "venv")


@pytest.fixture(scope="module")
def cluster(python: str) -> Iterator[RayHead]:
    with ray_head(num_cpus=2, python=python) as head:
        yield head


def test_t1_a_job_whose_worker_is_killed_ends_with_the_losses_of_two_plain_processes(
    cluster: RayHead, python: str, tmp_path: Path
) -> None:
    recipe = make_tiny_run(tmp_path)
    command = (*("submit", recipe, "--address", cluster.address, "--python", python, "--json"), *NO_TRACKING)
    training = (*command, "--out", tmp_path / "job", "--workers", 2)
    done = ca2st(*training, "--env", "CA2ST_FAULT", fault="step.logged:5:kill", environment=cluster.client_variables)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["run_dir"] == str(tmp_path / "job")
    assert facts["job_id"].startswith("ca2st-tiny-")
    assert [line["attempt"] for line in journal(tmp_path / "job", "start")] == [1, 2]

    assert read_state(tmp_path / "job").tags.items() >= git_state(Path.cwd()).items(), "no checkout is there"

    plain = ca2st("train", recipe, "--out", tmp_path / "plain", "--workers", 2, *NO_TRACKING)
    assert plain.returncode == 0, plain.stderr
    assert sequence(tmp_path / "job") == sequence(tmp_path / "plain")

    refused = ca2st(*training, "--set", "optim.base_lr=0.5", environment=cluster.client_variables)
    assert refused.returncode == 2, refused.stderr
    assert json.loads(refused.stdout)["exit_code"] == 2
    assert "optim.base_lr: 0.001 -> 0.5" in refused.stderr, "what the driver said"


def test_a_job_without_the_token_is_refused(cluster: RayHead) -> None:
    answer = requests.post(f"{cluster.address}/api/jobs/", json={"entrypoint": "true"}, timeout=30)
    assert answer.status_code == UNAUTHORIZED
