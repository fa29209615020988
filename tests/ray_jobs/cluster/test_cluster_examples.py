"""The examples of ray_jobs/cluster: the Kubernetes objects by their types, the scripts run against stand-ins."""

import os
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import ValidationError

from ray_jobs.cli import app
from support.kuberay import KINDS, PodSpec, RayJob
from support.ray_nodes import NEEDED

CLUSTER = Path(__file__).parents[3] / "ray_jobs" / "cluster"
needs_ip = pytest.mark.skipif(shutil.which("ip") is None and not NEEDED, reason="no `ip` on PATH; install iproute2")


def objects() -> dict[str, Any]:
    """The objects of rayjob.yaml, by kind and name."""
    found = list(yaml.safe_load_all((CLUSTER / "rayjob.yaml").read_text()))
    return {f"{one['kind']} {one['metadata']['name']}": one for one in found}


@pytest.fixture
def job() -> RayJob:
    return RayJob.model_validate(objects()["RayJob ca2st-train"])


def pods(job: RayJob) -> list[PodSpec]:
    cluster = job.spec.ray_cluster_spec
    return [cluster.head_group_spec.template.spec, *(group.template.spec for group in cluster.worker_group_specs)]


def parsed_train(command: str) -> dict[str, Any]:
    """The settings that `ca2st train` reads from a command line; a wrong one is an error."""
    words = shlex.split(command)
    assert words[:2] == ["ca2st", "train"]
    group = typer.main.get_command(app)
    train = group.get_command(typer.Context(group), "train")  # type: ignore[attr-defined]  # it is a group
    assert train is not None
    return train.make_context("train", words[2:]).params


@pytest.mark.parametrize("name", objects())
def test_each_kubernetes_object_has_the_fields_of_its_type(name: str) -> None:
    found = objects()[name]
    KINDS[found["kind"]].model_validate(found)


def test_a_misspelt_field_or_a_number_for_a_string_is_found() -> None:
    found = objects()["RayJob ca2st-train"]
    found["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    found["spec"]["ttlSecondsAfterFinish"] = 600
    with pytest.raises(ValidationError, match=r"num-cpus[\s\S]*ttlSecondsAfterFinish"):
        RayJob.model_validate(found)


def test_every_mount_has_its_volume_and_every_claim_its_object(job: RayJob) -> None:
    for pod in pods(job):
        volumes = {volume.name: volume for volume in pod.volumes}
        for container in pod.containers:
            assert {mount.name for mount in container.volume_mounts} <= volumes.keys()
            assert "/dev/shm" in {mount.mount_path for mount in container.volume_mounts}
        claims = [volume.persistent_volume_claim for volume in pod.volumes]
        named = {f"PersistentVolumeClaim {claim.claim_name}" for claim in claims if claim is not None}
        assert len(named) == 2
        assert named <= objects().keys()


def test_the_rayjob_asks_for_a_token_and_for_the_ray_that_we_are_tested_with(job: RayJob) -> None:
    cluster = job.spec.ray_cluster_spec
    assert cluster.auth_options.mode == "token"
    assert cluster.ray_version == metadata.version("ray")
    assert f"FROM rayproject/ray:{cluster.ray_version}-" in (CLUSTER / "Dockerfile").read_text()


def test_the_rayjob_starts_a_training_on_all_its_gpus_with_its_run_on_shared_storage(job: RayJob) -> None:
    settings = parsed_train(job.spec.entrypoint)
    (group,) = job.spec.ray_cluster_spec.worker_group_specs
    (container,) = group.template.spec.containers
    assert settings["ray"] is True
    assert settings["ray_address"] == "auto"
    assert settings["workers"] == group.replicas * int(container.resources.limits["nvidia.com/gpu"])
    writable = [mount.mount_path for mount in container.volume_mounts if not mount.read_only]
    assert Path(settings["out"]).parent.as_posix() in writable


def stand_ins(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment in which these commands are the given shell scripts, beside Python and the system's own."""
    folder.mkdir()
    for name, script in {"python": f'exec {sys.executable} "$@"', **scripts}.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(folder.parent)}


def start_node(environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [CLUSTER / "start_node.sh", *arguments], env=environment, capture_output=True, text=True, check=False
    )


RAY = 'echo "$RAY_AUTH_MODE $(cat "$RAY_AUTH_TOKEN_PATH") $GLOO_SOCKET_IFNAME ray $*"'


@needs_ip
def test_the_head_makes_a_token_of_its_own_and_workers_join_with_it(tmp_path: Path) -> None:
    environment = stand_ins(tmp_path / "bin", ray=RAY) | {"NODE_IP": "127.0.0.1", "NUM_CPUS": "3"}
    head = start_node(environment, "head")
    assert head.returncode == 0, head.stderr
    assert "NODE_IP=127.0.0.1: Ray takes the address by which this machine reaches others instead" in head.stderr
    token = tmp_path / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text()) == 64
    common = "--node-ip-address 127.0.0.1 --disable-usage-stats --block --num-cpus 3"
    head_only = "--head --port 6379 --dashboard-host 127.0.0.1 --include-dashboard true"
    assert head.stdout == f"token {token.read_text()} lo ray start {head_only} {common}\n"
    worker = start_node(environment, "worker", "10.0.0.1")
    assert worker.stdout == f"token {token.read_text()} lo ray start --address 10.0.0.1:6379 {common}\n"


@needs_ip
def test_a_node_is_refused_without_a_token_of_ones_own_and_without_an_address_of_the_machine(tmp_path: Path) -> None:
    environment = stand_ins(tmp_path / "bin", ray="echo started") | {"NODE_IP": "127.0.0.1"}
    assert_refused(start_node(environment, "worker", "10.0.0.1"), "expected the head's token, found nothing")
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o640)
    environment["RAY_AUTH_TOKEN_PATH"] = str(token)
    assert_refused(start_node(environment, "head"), "others may read it")
    token.chmod(0o600)
    assert_refused(start_node(environment | {"NODE_IP": "192.0.2.1"}, "head"), "no interface of this machine")
    for wrong in ((), ("worker",), ("head", "10.0.0.1"), ("tail",)):
        assert_refused(start_node(environment, *wrong), "expected 'head' or 'worker HEAD_IP[:PORT]'")
    assert start_node(environment, "head").stdout == "started\n"


def assert_refused(done: "subprocess.CompletedProcess[str]", why: str) -> None:
    assert done.returncode == 2
    assert why in done.stderr
    assert "secret" not in done.stdout + done.stderr
    assert "started" not in done.stdout


@needs_ip
def test_the_slurm_script_starts_a_head_and_the_other_nodes_and_trains_on_all_gpus(tmp_path: Path) -> None:
    environment = stand_ins(
        tmp_path / "bin",
        # srun stands for every node: without its own options it runs the command here.
        srun='echo "$6" >>calls; shift 6; exec "$@"',
        scontrol="echo first; echo second",
        hostname="echo 127.0.0.1 ::1",
        # A node stays until it is ended; the head answers at once.
        ray='[ "$1" = health-check ] && exit 0; echo "ray $*" >>calls; exec sleep 60',
        ca2st='until [ "$(grep -c "ray start" calls)" = 2 ]; do sleep 0.05; done; echo "ca2st $*" >>calls',
    )
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "4"}
    environment |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    activate = tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("")
    done = subprocess.run(
        ["bash", CLUSTER / "slurm.sbatch", "mine.toml"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert {"first", "second"} <= set(calls)
    assert sum(call.startswith("ray start --head --port 6379") for call in calls) == 1
    assert sum(call.startswith("ray start --address 127.0.0.1:6379") for call in calls) == 1
    settings = parsed_train(calls[-1])
    assert settings["recipe"] == "mine.toml"
    assert settings["ray_address"] == "127.0.0.1:6379"
    assert settings["workers"] == 16
    assert list(tmp_path.glob(".ray-token*")) == []


def test_the_readme_names_every_example() -> None:
    told = (CLUSTER / "README.md").read_text()
    files = {path.name for path in CLUSTER.iterdir() if path.is_file() and path.suffix != ".py"} - {"README.md"}
    assert {name for name in files if f"({name})" not in told} == set()
