"""A real Ray whose workers find damaged data: the run ends as that, not as restarts used up."""

import json
import re
import shutil
from pathlib import Path

import pytest

from support.fake_shards import flip_byte
from support.tiny_runs import ca2st, journal, make_tiny_run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(580)]


def test_t4_a_failure_that_no_restart_mends_ends_a_ray_run_at_once_with_its_own_exit_code_and_rank(
    tmp_path: Path,
) -> None:
    recipe, run_dir = make_tiny_run(tmp_path), tmp_path / "run"
    shutil.copytree(tmp_path / "shards" / "train", tmp_path / "damaged")
    shard = tmp_path / "damaged" / "ca2st-000001.tar"
    for place in range(2_000, shard.stat().st_size - 2_000, 400):
        flip_byte(shard, place)
    options = ("--out", run_dir, "--data", tmp_path / "damaged", "--set", "tracking.enabled=false")
    done = ca2st("train", recipe, *options, "--ray", "--workers", 2)
    assert done.returncode == 3, done.stderr
    failure = json.loads((run_dir / "failure.json").read_text())
    assert failure["final"]
    assert not failure["echo"]
    assert "ca2st-000001.tar" in failure["message"]
    last = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert f"rank {failure['rank']} on {failure['node']}, attempt 1: {failure['kind']}: " in last
    assert "ca2st-000001.tar" in last
    assert [line["attempt"] for line in journal(run_dir, "start")] == [1]
    assert journal(run_dir, "end")[-1]["status"] == "failed"
    assert not (run_dir / "launches").exists()


def test_a_run_that_fails_in_every_attempt_ends_with_6(tmp_path: Path) -> None:
    recipe, run_dir = make_tiny_run(tmp_path), tmp_path / "run"
    options = ("--out", run_dir, "--set", "tracking.enabled=false", "--set", "launch.max_failures=0")
    done = ca2st("train", recipe, *options, "--ray", "--workers", 1, fault="step.received:2:raise")
    assert done.returncode == 6, done.stderr
    last = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert re.search(
        r"failed in every attempt \(0 restarts allowed\); the last one: .*fault point step\.received", last
    )
    assert [line["attempt"] for line in journal(run_dir, "start")] == [1]
