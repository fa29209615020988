"""Every sample counts exactly once at any number of processes, and no process holds a set of a million."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.processes import python_path

MILLION = 1_000_000
MOST_BYTES = 1_000_000_000


def scored(folder: Path, world_size: int, *, num_samples: int, lose: int = -1) -> dict[str, Any]:
    """The join's answer; the peaks of all processes under ``peaks``."""
    folder.mkdir()
    options = map(str, (folder, num_samples, world_size, lose))
    command = [sys.executable, "-m", "support.score_many", *options]
    environment = os.environ | {"PYTHONPATH": python_path()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert len(found["peaks"]) == world_size + 1
    return found


@pytest.mark.parametrize(
    "num_samples", [pytest.param(50_000, marks=pytest.mark.slow), pytest.param(MILLION, marks=pytest.mark.soak)]
)
@pytest.mark.timeout(900)
def test_p13_a_million_samples_count_once_at_1_2_and_3_processes_within_a_gigabyte(
    tmp_path: Path, num_samples: int
) -> None:
    found = [scored(tmp_path / str(size), size, num_samples=num_samples) for size in (1, 2, 3)]
    for one in found:
        assert one["num_samples"] == num_samples
        assert max(one["peaks"]) < MOST_BYTES
        assert one["metrics"] == pytest.approx(found[0]["metrics"], abs=1e-5)  # batches of other clips round otherwise
    assert {"top1", "map", "d_prime"} <= found[0]["metrics"].keys()
    files = [(tmp_path / str(world_size) / "all.parquet").stat().st_size for world_size in (1, 2, 3)]
    assert max(files) < 1.1 * min(files)


@pytest.mark.slow
def test_p13_one_sample_that_is_lost_among_many_is_named(tmp_path: Path) -> None:
    found = scored(tmp_path / "lost", 2, num_samples=20_000, lose=17_777)
    assert "found 1 never scored: video-00017777-0123456789abcdef; no metric is reported" in found["error"]
    assert not (tmp_path / "lost" / "all.parquet").exists()
