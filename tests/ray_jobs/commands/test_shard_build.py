"""``ca2st shard build`` as a command that is stopped while it converts (C2)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.media import make_clip
from support.processes import python_path
from support.shards import file_hashes

# Whoever starts the tests in the background ignores Ctrl-C, and so would the command.
HEARD = "import signal, ray_jobs.cli; signal.signal(signal.SIGINT, signal.default_int_handler); ray_jobs.cli.main()"
OPTIONS = ("--audio", "none", "--shard-size", "9MB")


def build(media: Path, out: Path, *options: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HEARD, "shard", "build", "--dataset", "folder", "--media", str(media)]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    arguments = [*command, "--out", str(out), *OPTIONS, *map(str, options)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for number in range(24):
        (folder / f"class_{number % 2}").mkdir(exist_ok=True)
        make_clip(folder / f"class_{number % 2}" / f"{number:02d}.mp4", seconds=0.8, size=(160, 120))
    return folder


@pytest.fixture(scope="module")
def undisturbed(media: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "set"
    _, err = (process := build(media, out, "--workers", 1)).communicate(timeout=240)
    assert process.returncode == 0, err
    return file_hashes(out)


@pytest.mark.slow
@pytest.mark.timeout(580)
@pytest.mark.parametrize(
    ("number", "code", "times", "workers"),
    [(signal.SIGTERM, 143, 1, 1), (signal.SIGINT, 130, 1, 2), (signal.SIGTERM, 143, 2, 2)],
)
def test_c2_a_signal_while_clips_are_converted_ends_with_its_code_and_the_same_command_goes_on(
    media: Path,
    undisturbed: dict[str, str],
    tmp_path: Path,
    workers: int,
    number: signal.Signals,
    code: int,
    times: int,
) -> None:
    out = tmp_path / "set"
    process = build(media, out, "--workers", workers)
    deadline = time.monotonic() + 240
    while not list(out.glob("*.tar")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for _ in range(times):
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("it was done before the signal came")
    assert process.returncode == code, err
    assert "rerun the same command to go on where it stopped" in err
    left = {name: digest for name, digest in file_hashes(out).items() if not name.startswith(".")}
    assert left.items() <= undisturbed.items(), "what has its name is complete"
    _, err = (again := build(media, out, "--workers", workers)).communicate(timeout=240)
    assert again.returncode == 0, err
    assert file_hashes(out) == undisturbed
