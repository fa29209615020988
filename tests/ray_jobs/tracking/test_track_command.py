"""``ca2st track sync``: what it prints, and what it ends with."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from ray_jobs.cli import app
from ray_jobs.tracking.sender import EXTRAS
from ray_jobs.tracking.state import read_state
from support.fake_mlflow import FakeMlflow, served
from support.tiny_runs import ca2st
from support.tracked_runs import end, start, step, tracked_run, write

SOMETHING_LACKING = 4


def synced(run_dir: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["track", "sync", str(run_dir), *options])


@pytest.fixture
def ended_run(run_dir: Path) -> Path:
    write(run_dir, start(), step(1, 0.5), end("done", 1))
    return run_dir


def test_a_run_of_which_everything_is_sent_ends_with_0_and_lacks_nothing(ended_run: Path) -> None:
    done = synced(ended_run, "--json")
    assert done.exit_code == 0
    facts = {"sent": 3, "run_id": read_state(ended_run).run_id, "lacking": []}
    assert json.loads(done.stdout) == facts
    again = synced(ended_run, "--json")
    assert (again.exit_code, json.loads(again.stdout)) == (0, facts | {"sent": 0})


def test_a_run_whose_artefacts_are_not_taken_ends_with_4_and_names_them_until_they_are(
    ended_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(client: MlflowClient, run_id: str, folder: Path) -> None:
        raise RuntimeError("no space")

    works = EXTRAS["artefacts"]
    monkeypatch.setitem(EXTRAS, "artefacts", broken)
    failed = synced(ended_run, "--json")
    assert failed.exit_code == SOMETHING_LACKING
    assert json.loads(failed.stdout) == {"sent": 3, "run_id": read_state(ended_run).run_id, "lacking": ["artefacts"]}
    assert "artefacts: not sent (RuntimeError: no space)" in failed.stderr
    told = synced(ended_run)
    assert told.exit_code == SOMETHING_LACKING
    assert "it still lacks artefacts, for the reasons above" in told.stdout
    monkeypatch.setitem(EXTRAS, "artefacts", works)
    mended = synced(ended_run, "--json")
    assert (mended.exit_code, json.loads(mended.stdout)["lacking"]) == (0, [])


def test_a_run_without_a_line_yet_has_nothing_to_send_and_ends_with_0(run_dir: Path) -> None:
    done = synced(run_dir)
    assert done.exit_code == 0
    assert "nothing to send yet" in done.stdout
    assert json.loads(synced(run_dir, "--json").stdout) == {"sent": 0, "run_id": None, "lacking": []}


def test_what_mlflow_itself_prints_does_not_get_into_the_json_object(tmp_path: Path, fake: FakeMlflow) -> None:
    with served(fake):
        run_dir = tracked_run(tmp_path / "run", fake.uri)
        write(run_dir, start(), step(1, 0.5), end("done", 1))
        done = ca2st("track", "sync", run_dir, "--json")
    assert "View run" in done.stderr, done.stderr
    assert json.loads(done.stdout)["sent"] == 3
