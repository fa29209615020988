"""T18: one long run on two workers through 200 faults, and its numbers are those of an undisturbed one.

Outside CI: ``pytest -m soak tests/ray_jobs/runs/test_chaos.py``. The environment may say another number of faults
(CA2ST_CHAOS_FAULTS) and the seed of a run to repeat (CA2ST_CHAOS_SEED), which a failure prints.
"""

import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.fake_shards import flip_byte
from support.tiny_runs import ca2st, journal, make_tiny_run, sequence

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]
_NUM_FAULTS = int(os.environ.get("CA2ST_CHAOS_FAULTS", "200"))
_STEPS_PER_EPOCH = 4
_SECONDS = 300
"""An attempt that takes longer hangs."""
_MOST_STEPS = 5
"""An attempt whose fault did not come by then is stopped, so that the run does not end before its faults do."""
_REFUSED = 2
_STEP_POINTS = ("step.received", "step.updated", "step.logged", "validation.begun")
_CHECKPOINT_POINTS = (
    *("checkpoint.folder", "checkpoint.unmarked", "checkpoint.removed"),
    *(
        f"checkpoint.{name}.{when}"
        for name in ("COMPLETE.json", "model.safetensors")
        for when in ("written", "renamed")
    ),
)
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fault:
    """What goes wrong in one attempt, or after it."""

    inside: str = ""
    """CA2ST_FAULT of the attempt."""
    sent: signal.Signals | None = None
    """Signal to the command itself, after `steps` more steps."""
    steps: int = 0
    damage: bool = False
    """A byte of the newest checkpoint is flipped before the attempt."""


def _drawn(draw: random.Random) -> _Fault:
    damage = draw.random() < 0.1
    if draw.random() < 0.25:
        return _Fault(sent=draw.choice(_SIGNALS), steps=draw.randint(0, 4), damage=damage)
    if draw.random() < 0.5:
        point, kind = draw.choice(_STEP_POINTS), draw.choice(("kill", "raise"))
        nth = 1 if point == "validation.begun" else draw.randint(1, 5)
        return _Fault(inside=f"{point}:{nth}:{kind}:{draw.randint(0, 1)}", damage=damage)
    kind = draw.choice(("kill", "raise", "enospc"))
    return _Fault(inside=f"{draw.choice(_CHECKPOINT_POINTS)}:{draw.randint(1, 2)}:{kind}", damage=damage)


def test_t18_a_run_through_many_random_faults_ends_with_the_numbers_of_an_undisturbed_one(tmp_path: Path) -> None:
    seed = int(os.environ.get("CA2ST_CHAOS_SEED") or secrets.randbits(32))
    draw = random.Random(seed)
    recipe = make_tiny_run(tmp_path)
    epochs = 4 + 4 * _NUM_FAULTS  # an attempt makes far fewer steps than sixteen
    settings = ("tracking.enabled=false", f"training.epochs={epochs}", "training.checkpoint_every_steps=2")
    arguments = ("train", recipe, "--workers", 2, *(part for setting in settings for part in ("--set", setting)))
    done = ca2st(*arguments, "--out", tmp_path / "undisturbed")
    assert done.returncode == 0, done.stderr
    assert len(sequence(tmp_path / "undisturbed")) == epochs * _STEPS_PER_EPOCH

    run_dir = tmp_path / "run"
    mark = secrets.token_hex(8)
    (tmp_path / "tmp").mkdir()
    environment = {"CA2ST_CHAOS": mark, "TMPDIR": str(tmp_path / "tmp")}
    shared_memory = set(Path("/dev/shm").iterdir())
    ends: Counter[int] = Counter()
    num_stopped, damaged = 0, set[Path]()
    for number in range(_NUM_FAULTS):
        fault = _drawn(draw)
        if fault.damage:
            _damage_newest_checkpoint(run_dir, draw, damaged)
        code, was_stopped, said = _attempt((*arguments, "--out", run_dir), fault, run_dir, environment)
        ends[code] += 1
        num_stopped += was_stopped
        where = f"seed {seed}, fault {number}, {fault}, exit code {code}\n{said}"
        assert code != _REFUSED, where
        assert code != 0, f"the run ended before its faults: {where}"
        assert _gone(mark), f"processes are left: {where}"
    done = ca2st(*arguments, "--out", run_dir, environment=environment)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    print(f"seed {seed}: attempts by exit code {dict(ends)}, of them stopped before their fault: {num_stopped}")
    assert num_stopped < _NUM_FAULTS / 2
    assert sequence(run_dir) == sequence(tmp_path / "undisturbed"), f"seed {seed}"
    assert journal(run_dir, "eval")[-1]["metrics"] == journal(tmp_path / "undisturbed", "eval")[-1]["metrics"]
    assert _gone(mark)
    assert set(Path("/dev/shm").iterdir()) - shared_memory == set()
    left = [path.name for path in (tmp_path / "tmp").iterdir() if not path.name.startswith("torchinductor_")]
    assert left == []  # torch's own cache of compiled code is for the next run


def _attempt(
    arguments: tuple[object, ...], fault: _Fault, run_dir: Path, environment: dict[str, str]
) -> tuple[int, bool, str]:
    """Run the command once, with its fault; returns exit code, whether it was stopped before, and what it said."""
    with subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.cli", *map(str, arguments)],
        env=os.environ | environment | {"CA2ST_FAULT": fault.inside},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it in the background
    ) as process:
        goal = _num_steps(run_dir) + (_MOST_STEPS if fault.sent is None else fault.steps)
        deadline = time.monotonic() + _SECONDS
        while process.poll() is None and _num_steps(run_dir) < goal and time.monotonic() < deadline:
            time.sleep(0.02)
        was_stopped = fault.sent is None and process.poll() is None
        process.send_signal(fault.sent or signal.SIGTERM)
        try:
            _, said = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"{fault}: still there after {_SECONDS} s")
    return process.returncode, was_stopped, said


def _num_steps(run_dir: Path) -> int:
    path = run_dir / "journal.jsonl"
    return path.read_bytes().count(b'"event":"step"') if path.exists() else 0


def _damage_newest_checkpoint(run_dir: Path, draw: random.Random, damaged: set[Path]) -> None:
    complete = sorted(run_dir.glob("checkpoints/*/COMPLETE.json"), key=lambda path: path.stat().st_mtime)
    complete = [path for path in complete if path not in damaged]
    if len(complete) > 1:  # one sound one stays
        damaged.add(complete[-1])
        file = draw.choice(sorted(path for path in complete[-1].parent.iterdir() if path.stat().st_size))
        flip_byte(file, draw.randrange(file.stat().st_size))


def _gone(mark: str) -> bool:
    """Whether no process of the run is left, within a while."""
    deadline = time.monotonic() + 30
    while list(_marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not list(_marked(mark))


def _marked(mark: str) -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                yield path.parent.name
        except OSError:  # ended meanwhile
            continue
