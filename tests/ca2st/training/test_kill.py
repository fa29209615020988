"""T5, T18 in small: a training killed at any point, then run again, is the undisturbed training to the last bit."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import support.kill_zygote
from ca2st.training.best import best_and_last
from ca2st.training.checkpoint import list_checkpoints, read_checkpoint
from ca2st.training.journal import run_sequence
from support.processes import python_path

FILES = ("recipe.json", "model.safetensors", "optimizer.safetensors", "optimizer.json", "loader.json", "schedule.json")
REMOVALS = ("checkpoint.unmarked", "checkpoint.removed")
MOMENTS = [
    "checkpoint.folder",
    *(f"checkpoint.{file}.{moment}" for file in (*FILES, "COMPLETE.json") for moment in ("written", "renamed")),
    *REMOVALS,
]


def run_and_kill(root: Path, faults: dict[str, str]) -> dict[str, Any]:
    arguments = [f"{name}={fault}" for name, fault in faults.items()]
    program = [sys.executable, support.kill_zygote.__file__, str(root), *arguments]
    done = subprocess.run(
        program, check=False, capture_output=True, text=True, env={"PYTHONPATH": python_path()}, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


def facts(folder: Path) -> tuple[list[tuple[float, ...]], dict[str, bytes]]:
    steps = [(line["step"], line["loss"], line["sample_ids_hash"]) for line in run_sequence(folder / "journal.jsonl")]
    return steps, dict(read_checkpoint(list_checkpoints(folder / "checkpoints")[0]).files)


def check_all(root: Path, faults: dict[str, str]) -> None:
    outcomes = run_and_kill(root, {"undisturbed": "none:1"} | faults)
    assert outcomes.pop("undisturbed")["killed"] == 0
    expected = facts(root / "undisturbed")
    assert len(expected[0]) == 8
    for name, outcome in outcomes.items():
        assert outcome["killed"] == -9, f"{faults[name]} was never reached"
        assert outcome["finished"] == 0
        assert facts(root / name) == expected, f"after a kill at {faults[name]}"
        left = [path.name for path in (root / name / "checkpoints").iterdir()]
        best = best_and_last(root / name, "action_top1")[0]
        kept = {"step-8", "step-6", f"step-{best.step}"} if best else set()
        assert {folder.partition(".")[0] for folder in left} == kept, f"after a kill at {faults[name]}: {left}"
        assert len(left) == len(kept)


def test_t5_a_kill_inside_a_checkpoint_resumes_from_the_one_before(tmp_path: Path) -> None:
    check_all(tmp_path, {"inside": "checkpoint.optimizer.safetensors.written:2", "between": "step.updated:6"})


@pytest.mark.slow
def test_t5_a_kill_at_every_point_of_every_checkpoint_write(tmp_path: Path) -> None:
    # The best checkpoint stays beside the newest two, so only one is removed.
    faults = {moment: f"{moment}:{1 if moment in REMOVALS else 2}" for moment in MOMENTS}
    first = {f"first-{moment}": f"{moment}:1" for moment in ("checkpoint.folder", "checkpoint.COMPLETE.json.written")}
    check_all(tmp_path, faults | first)


@pytest.mark.slow
def test_kills_at_random_steps_leave_the_run_what_it_was(tmp_path: Path) -> None:
    draw = random.Random(7)
    points = ("step.updated", "step.logged")
    check_all(tmp_path, {f"random-{i}": f"{draw.choice(points)}:{draw.randint(1, 8)}" for i in range(12)})
