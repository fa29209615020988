"""`ca2st evaluate --ray` and `ca2st robustness --ray`: tasks of a Ray score as one process does."""

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from numpy.typing import NDArray

from ca2st.errors import DataDamageError, EnvironmentFault
from ray_jobs.cli import main
from ray_jobs.evaluation import workers
from ray_jobs.evaluation.predictions import read_facts, read_rows
from ray_jobs.evaluation.workers import Workers, scoring_ray
from support.fake_shards import flip_byte
from support.processes import python_path
from support.tiny_runs import ca2st, make_tiny_run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(580), pytest.mark.usefixtures("own_process")]
LOCAL_RAY = Workers(number=2, ray_address="local")


def answers(path: Path | str) -> tuple[list[str], NDArray[np.float32]]:
    """Keys and probabilities `[samples, classes]` of a predictions file."""
    (rows,) = read_rows(Path(path), read_facts(Path(path)))
    return rows.keys, rows.probabilities["label"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shard sets and a trained run."""
    root = tmp_path_factory.mktemp("on_ray")
    settings = ("training.epochs=1", "tracking.enabled=false", "optim.base_lr=10.0")  # answers differ from clip to clip
    options = [part for setting in settings for part in ("--set", setting)]
    done = ca2st("train", make_tiny_run(root), "--out", root / "run", *options)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    """One Ray for all tests, as a command starts it: its workers import torch once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", python_path())
        with scoring_ray(LOCAL_RAY):
            yield


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a command in this process; returns what it prints as JSON, of one that fails what it ``told``."""

    def run(*arguments: object, exit_code: int = 0) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["ca2st", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        assert (ended.value.code or 0) == exit_code, told.err
        return {"told": told.err} if exit_code else dict(json.loads(told.out.strip().splitlines()[-1]))

    return run


def test_a_ray_of_our_own_listens_on_the_loopback_interface_alone() -> None:
    assert ray.util.get_node_ip_address() == "127.0.0.1"  # though ray was imported before our settings, above
    this = psutil.Process()
    heard = [one for child in this.children(recursive=True) for one in child.net_connections("inet")]
    addresses = {one.laddr.ip.removeprefix("::ffff:") for one in heard if one.status == psutil.CONN_LISTEN}
    assert addresses == {"127.0.0.1"}


def test_the_folder_of_a_ray_of_our_own_is_closed_to_others() -> None:
    assert ray._private.worker._global_node is not None
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    assert session.is_dir()
    assert session.parents[1].stat().st_mode & 0o777 == 0o700


def test_tasks_of_a_ray_give_the_predictions_of_one_process(root: Path, command: Callable[..., dict[str, Any]]) -> None:
    test = ("evaluate", root / "run", "--data", root / "shards" / "train", "--views", "1x1")
    here, there = (
        command(*test, "--predictions", root / f"{name}.parquet", *options)
        for name, options in {"here": (), "ray": ("--ray", "--workers", 3)}.items()
    )
    assert there["top1"] == here["top1"]
    (keys, rows), (own_keys, own) = answers(there["predictions"]), answers(here["predictions"])
    assert keys == own_keys
    assert own.std(axis=0).min() > 1e-3, "rows in another order would be seen"
    np.testing.assert_allclose(rows, own, atol=1e-5)


def test_tasks_of_a_ray_disturb_the_sound_as_one_process_does(
    root: Path, command: Callable[..., dict[str, Any]]
) -> None:
    names = ["white_noise", "time_shift", "masked_audio_keys"]
    test = ("robustness", root / "run", "--data", root / "shards" / "train", "--views", "1x1", "--seed", 5)
    here, there = (
        command(*test, "--conditions", ",".join(names), "--out", root / f"robustness_{name}", *options)
        for name, options in {"here": (), "ray": ("--ray", "--workers", 2)}.items()
    )
    assert (there["num_samples"], there["clean"]) == (25, here["clean"])
    assert [one["name"] for one in there["conditions"]] == names
    _, clean = answers(root / "robustness_ray" / "clean.parquet")
    for one, other in zip(there["conditions"], here["conditions"], strict=True):
        assert (one["metrics"], one["against_clean"]) == (other["metrics"], other["against_clean"])
        (keys, rows), (own_keys, own) = answers(one["predictions"]), answers(other["predictions"])
        assert keys == own_keys
        np.testing.assert_allclose(rows, own, atol=1e-5)
        assert np.abs(rows - clean).max() > 1e-4, f"{one['name']} disturbs nothing"
    assert Path(there["plot"]).read_text() == Path(here["plot"]).read_text()


def test_damage_that_a_task_meets_is_told_by_its_name_and_exit_code(
    root: Path, tmp_path: Path, command: Callable[..., dict[str, Any]]
) -> None:
    shutil.copytree(root / "shards" / "train", tmp_path / "shards")
    shard = tmp_path / "shards" / "ca2st-000001.tar"
    for place in range(2_000, shard.stat().st_size - 2_000, 400):
        flip_byte(shard, place)
    test = ("evaluate", root / "run", "--data", tmp_path / "shards", "--views", "1x1", "--ray", "--workers", 2)
    told = command(*test, "--predictions", tmp_path / "rows.parquet", exit_code=DataDamageError.exit_code)["told"]
    assert re.search(r"rank \d: \w+: .*ca2st-000001\.tar", told)
    assert not (tmp_path / "rows.parquet").exists()


def end_the_process(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_task_that_is_lost_in_every_try_is_told_as_a_fault_of_the_machine(
    root: Path, command: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_score_as_worker", end_the_process)
    monkeypatch.setattr(workers, "_MOST_TRIES", 1)
    test = ("evaluate", root / "run", "--data", root / "shards" / "validation", "--views", "1x1", "--ray")
    told = command(*test, exit_code=EnvironmentFault.exit_code)["told"]
    assert "Ray lost a task in each of 1 tries: " in told
