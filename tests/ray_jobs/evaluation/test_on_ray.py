"""`ca2st evaluate --ray`: tasks of a Ray score the set as one process does."""

import json
from pathlib import Path

import numpy as np
import pytest

from ray_jobs.evaluation.predictions import Rows, read_facts, read_rows
from support.tiny_runs import ca2st, make_tiny_run


def rows_of(path: Path) -> Rows:
    (rows,) = read_rows(path, read_facts(path))
    return rows


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_tasks_of_a_ray_give_the_predictions_of_one_process(tmp_path: Path) -> None:
    recipe, run_dir = make_tiny_run(tmp_path), tmp_path / "run"
    settings = ("--set", "training.epochs=1", "--set", "tracking.enabled=false")
    done = ca2st("train", recipe, "--out", run_dir, *settings)
    assert done.returncode == 0, done.stderr
    test = ("evaluate", run_dir, "--data", tmp_path / "shards" / "train", "--views", "1x1", "--json")
    facts = {}
    for name, options in {"here": (), "ray": ("--ray", "--workers", 3)}.items():
        done = ca2st(*test, "--predictions", tmp_path / f"{name}.parquet", *options)
        assert done.returncode == 0, done.stderr
        facts[name] = json.loads(done.stdout)
    assert facts["ray"]["top1"] == facts["here"]["top1"]
    here, there = (rows_of(tmp_path / f"{name}.parquet") for name in facts)
    assert there.keys == here.keys
    np.testing.assert_allclose(there.probabilities["label"], here.probabilities["label"], atol=1e-5)
