"""Small whole runs through the command line: seconds of training on fake shards."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.fake_shards import make_samples, make_shard_set
from support.forked_commands import run_forked

RECIPE = """\
name = "tiny"

[model]
kind = "ca2st"
dim = 16
depth = 2
num_heads = 2

[clip]
num_frames = 4
crop_size = 32
mel_rows = 48

[data]
train = "{root}/shards/train"
validation = "{root}/shards/validation"

[data.sampling]
scheme = "uniform"

[optim]
warmup_epochs = 0.5

[training]
epochs = 4
global_batch_size = 6
per_device_batch_size = 2
checkpoint_every_steps = 3
validate_every_epochs = 2

[tracking]
uri = "sqlite:///{root}/mlflow.db"
"""


def make_tiny_run(root: Path) -> Path:
    """Fake shards and a recipe for them under `root`; 4 epochs of 4 steps. Returns the recipe's path."""
    make_shard_set(root / "shards" / "train", make_samples(25), samples_per_shard=7)
    make_shard_set(root / "shards" / "validation", make_samples(5), split="validation")
    path = root / "tiny.toml"
    path.write_text(RECIPE.format(root=root))
    return path


def ca2st(
    *arguments: object, fault: str = "", cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run the command as a user would; `fault` goes into CA2ST_FAULT, `environment` beside it.

    A child is forked from a process that has the imports; with an `environment` it is a process of its own.
    """
    variables = os.environ | {"CA2ST_FAULT": fault} | dict(environment or {})
    if environment is None:
        return run_forked([*map(str, arguments)], environment=variables, folder=cwd or Path.cwd())
    return subprocess.run(
        [sys.executable, "-m", "ray_jobs.cli", *map(str, arguments)],
        env=variables,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def journal(run_dir: Path, event: str) -> list[dict[str, Any]]:
    """The journal's lines of one event."""
    lines = (run_dir / "journal.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == event]


def sequence(run_dir: Path) -> list[tuple[int, str, float]]:
    """(step, sample_ids_hash, loss): the last line of each step."""
    last = {line["step"]: line for line in journal(run_dir, "step")}
    return [(step, last[step]["sample_ids_hash"], last[step]["loss"]) for step in sorted(last)]
