"""``ca2st train --splits``: what it prints of tests that have no accuracy."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from ray_jobs import launch
from ray_jobs.evaluation import workers
from support.commands import Command


def test_splits_without_known_labels_have_a_dash_for_their_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "launch", lambda *_, **__: None)
    monkeypatch.setattr(workers, "evaluate_checkpoint", lambda *_, **__: SimpleNamespace(top1=None))
    train = Command(capsys, monkeypatch, "train")
    code, out, err = train("cast_ucf_101", "--splits", "1,2", "--out", tmp_path, "--set", "tracking.enabled=false")
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split()[:4] for line in lines[:2]] == [["split", "1", "top1", "-"], ["split", "2", "top1", "-"]]
    assert lines[2].split() == ["mean", "top1", "-"]
