"""``ca2st train --splits``: what it prints of tests that have no accuracy."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ray_jobs import launch
from ray_jobs.cli import main
from ray_jobs.evaluation import workers


def test_splits_without_known_labels_have_a_dash_for_their_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "launch", lambda *_, **__: None)
    monkeypatch.setattr(workers, "evaluate_checkpoint", lambda *_, **__: SimpleNamespace(top1=None))
    arguments = ["cast_ucf_101", "--splits", "1,2", "--out", str(tmp_path), "--set", "tracking.enabled=false"]
    monkeypatch.setattr(sys, "argv", ["ca2st", "train", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines[:2]] == [["split", "1", "top1", "-"], ["split", "2", "top1", "-"]]
    assert lines[2].split() == ["mean", "top1", "-"]
