"""`ca2st predict`: which files are read and which cannot be."""

from pathlib import Path

import pytest

from ca2st.errors import UserInputError
from pipelines.views import EvaluationViews
from ray_jobs.runs import prediction
from ray_jobs.runs.prediction import find_videos, predict_readable, predict_videos, require_videos
from sharding.errors import RejectBudgetError
from support.annotations import touch
from support.media import damage, make_clip
from support.trained import trained_model

VIEWS = EvaluationViews(protocol="test", clips=1, crops=1)


def test_files_folders_and_patterns_name_videos(tmp_path: Path) -> None:
    touch(tmp_path, "x/b.MP4", "x/a.webm", "x/deep/c.mov", "x/.hidden/d.mp4", "x/notes.txt", "y/e.mp4", "z/f.txt")
    at = {name: tmp_path / name for name in ("x/b.MP4", "x/a.webm", "x/deep/c.mov", "y/e.mp4", "x/notes.txt")}
    a, b, c = at["x/a.webm"], at["x/b.MP4"], at["x/deep/c.mov"]
    assert find_videos([tmp_path / "y/e.mp4", tmp_path / "x"]) == ([at["y/e.mp4"], a, b, c], [at["x/notes.txt"]])
    assert find_videos([tmp_path / "x" / "*"]) == ([a, b], [at["x/notes.txt"]])
    assert find_videos([tmp_path / "x" / "**" / "*.mov"]) == ([c], [])
    assert find_videos([tmp_path / "nowhere.mp4"]) == ([tmp_path / "nowhere.mp4"], [])
    with pytest.raises(UserInputError, match=r"z: expected a folder with videos in it .*\.mp4.*, found 1 files, none"):
        find_videos([tmp_path / "z"])
    with pytest.raises(UserInputError, match="expected at least one video, found none"):
        require_videos([])
    with pytest.raises(UserInputError, match=r"\*\.avi: expected a pattern of videos .*, found 0 files"):
        find_videos([tmp_path / "*.avi"])


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    trained = trained_model(tmp_path / "run")
    monkeypatch.setattr(prediction, "load_trained", lambda _: trained)
    return tmp_path / "run"


def test_damaged_videos_are_listed_with_the_reason_and_the_others_predicted(checkpoint: Path, tmp_path: Path) -> None:
    videos = [make_clip(tmp_path / f"{number}.mp4", seconds=0.2 + number / 10) for number in range(3)]
    bad = damage(videos[0], tmp_path / "bad.mp4", "half")
    report = predict_readable(checkpoint, [videos[2], bad, *videos[:2]], top=2, views=VIEWS)
    assert [one.video for one in report.videos] == [str(video) for video in (videos[2], *videos[:2])]
    assert [one.video for one in report.damaged] == [str(bad)]
    assert report.damaged[0].what
    alone = predict_readable(checkpoint, [videos[2]], top=2, views=VIEWS)
    assert report.videos[0].predictions == pytest.approx(alone.videos[0].predictions)
    with pytest.raises(
        RejectBudgetError, match=r"expected videos that can be read, found .*bad\.mp4: .*repair or replace"
    ):
        predict_videos(checkpoint, [videos[0], bad], top=1, views=VIEWS)


def test_nothing_but_damaged_videos_is_a_report_too(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    report = predict_readable(checkpoint, [tmp_path / "text.mp4"], top=1, views=VIEWS)
    assert (report.videos, [one.reason for one in report.damaged]) == ([], ["not_a_video"])
