"""What is shown while something runs: enough to see how far it is and how long it takes, on a terminal and in a log."""

import math
import os
import pty
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest

from ray_jobs import console
from ray_jobs.console import duration, progress

SHOW = """
import time
from ray_jobs.console import progress
with progress("Training a_recipe_with_a_long_name", 240) as update:
    for step in range(0, 60):
        update(step, "epoch 3  loss 4.1234  128 clips/s  data wait 12%")
        time.sleep(0.02)
"""


def test_a_bar_on_80_columns_keeps_20_cells_and_the_time_that_is_left() -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "80", "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", SHOW], stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        try:
            while block := os.read(ours, 65_536):
                shown += block
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()))
    last = [line for line in lines if "59/240" in line][-1]
    assert len(last) <= 80
    assert len(re.findall("[━╸╺]", last)) >= 20
    assert re.search(r"59/240 +\d:\d\d:\d\d ", last)


def test_lines_of_a_log_have_the_time_of_day_and_the_time_that_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with progress("Training", 240) as update:
        for step in (40, 41, 42, 240):  # a run that is resumed
            update(step, "loss 1.0")
            now[0] += 30.0
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in lines] == [
        "Training: 41/240  1:39:30 left  loss 1.0",
        "Training: 42/240  1:39:00 left  loss 1.0",
        "Training: 240/240  loss 1.0",
    ]


@pytest.mark.parametrize(("seconds", "told"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3723, "1:02:03")])
def test_durations_are_told_as_clocks_do(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_a_number_that_is_not_finite_is_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Facts:
        values: list[float]

    console.print_json({"d_prime": math.inf, "facts": Facts([math.nan, -math.inf, 0.1])})
    assert capsys.readouterr().out == '{"d_prime": null, "facts": {"values": [null, null, 0.1]}}\n'
