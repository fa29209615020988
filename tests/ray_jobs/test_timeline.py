"""`ca2st predict --window`: videos of any length, a row per window, merged events, a picture."""

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ca2st.errors import UserInputError
from pipelines.views import EvaluationViews
from ray_jobs.commands import runs as commands
from ray_jobs.runs import model, timeline
from ray_jobs.runs.prediction import Prediction
from ray_jobs.runs.timeline import (
    Event,
    EventMerger,
    TimelineReport,
    WindowConfig,
    clock,
    predict_timeline,
    timeline_svg,
)
from support.media import damage, make_clip
from support.trained import trained_model

VIEWS = EvaluationViews(protocol="test", clips=1, crops=1)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    trained = trained_model(tmp_path / "run")
    monkeypatch.setattr(timeline, "load_trained", lambda _: trained)
    return tmp_path / "run"


def rows(report: TimelineReport) -> list[dict[str, str]]:
    with Path(report.windows).open() as file:
        return list(csv.DictReader(file))


def test_a_video_is_a_row_per_window_whatever_the_lots_are(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = make_clip(tmp_path / "film.mp4", seconds=2.2)
    config = WindowConfig(window_seconds=0.6, stride_seconds=0.4, threshold=0.0, top=2)
    (whole,) = predict_timeline(checkpoint, [video], config, views=VIEWS, out=tmp_path / "whole")
    starts = [float(row["start_seconds"]) for row in rows(whole)]
    assert starts == [0.0, 0.4, 0.8, 1.2, 1.6], "the window at 2.0 s is a part of the one before"
    assert [float(row["end_seconds"]) for row in rows(whole)] == pytest.approx([0.6, 1.0, 1.4, 1.8, 2.2])
    monkeypatch.setattr(timeline, "_WINDOWS_AT_A_TIME", 2)
    (parts,) = predict_timeline(checkpoint, [video], config, views=VIEWS, out=tmp_path / "parts")
    for one, other in zip(rows(whole), rows(parts), strict=True):
        assert one["label_1"] == other["label_1"]
        assert float(one["probability_1"]) == pytest.approx(float(other["probability_1"]), abs=1e-5)
    assert (parts.num_windows, parts.seconds) == (5, pytest.approx(2.2))
    document = json.loads(Path(parts.document).read_text())
    assert {event["label"] for event in document["events"]} == {"red", "green", "blue"}
    assert all((event["start_seconds"], event["end_seconds"]) == (0.0, parts.seconds) for event in document["events"])


def film_with_a_hole(folder: Path) -> Path:
    """Twenty seconds, of which some in the middle are zeros."""
    video = make_clip(folder / "film.mp4", seconds=20, fps=5, size=(32, 32), gop=5)
    content = bytearray(video.read_bytes())
    first, last = content.index(b"mdat"), content.index(b"moov")
    begin, end = (first + int(share * (last - first)) for share in (0.3, 0.7))
    content[begin:end] = bytes(end - begin)
    video.write_bytes(content)
    return video


def test_what_follows_a_long_stretch_of_damage_is_read_or_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = film_with_a_hole(tmp_path)
    config = WindowConfig(window_seconds=2.0, stride_seconds=2.0)
    monkeypatch.setattr(timeline, "_WINDOWS_AT_A_TIME", 2)
    (report,) = predict_timeline(checkpoint, [video], config, views=VIEWS, out=tmp_path / "out")
    read = {float(row["start_seconds"]) for row in rows(report)}
    unread = {float(one.video.split(" at ")[1].removesuffix(" s")) for one in report.damaged}
    assert read | unread == set(map(float, range(0, 20, 2)))
    assert {0.0, 18.0} <= read
    assert {8.0, 10.0} <= unread, "a lot as a whole"
    monkeypatch.setattr(timeline, "_MOST_UNREADABLE_LOTS", 1)
    (given_up,) = predict_timeline(checkpoint, [video], config, views=VIEWS, out=tmp_path / "out")
    assert "film.mp4 behind " in given_up.damaged[-1].video
    assert "left out" in given_up.damaged[-1].what


@pytest.mark.parametrize(("how", "reason"), [("text", "not_a_video"), ("half", "truncated")])
def test_a_file_that_cannot_be_read_at_all_is_named_once(
    checkpoint: Path, tmp_path: Path, how: str, reason: str
) -> None:
    video = damage(make_clip(tmp_path / "film.mp4", seconds=1.0), tmp_path / "bad.mp4", how)
    config = WindowConfig(window_seconds=0.5, stride_seconds=0.5)
    (report,) = predict_timeline(checkpoint, [video], config, views=VIEWS, out=tmp_path / "out")
    assert [(one.video, one.reason) for one in report.damaged] == [(str(video), reason)]
    assert (report.num_windows, rows(report)) == (0, [])


def test_a_video_of_more_than_ten_minutes_is_read_to_its_end(checkpoint: Path, tmp_path: Path) -> None:
    video = make_clip(tmp_path / "film.mp4", seconds=660, fps=1, size=(32, 32))
    config = WindowConfig(window_seconds=120.0, stride_seconds=120.0)
    (report,) = predict_timeline(checkpoint, [video], config, views=VIEWS, out=tmp_path / "out")
    assert [float(row["end_seconds"]) for row in rows(report)] == [120.0, 240.0, 360.0, 480.0, 600.0, 660.0]


def test_windows_in_a_row_above_the_threshold_are_one_event() -> None:
    merger = EventMerger(0.5)
    for start, share in enumerate([0.9, 0.7, 0.2, 0.6, 0.1]):
        merger.add(start, start + 2, [Prediction(target="label", label="run", probability=share)])
    merger.add(9, 11, [Prediction(target="label", label="run", probability=0.8)])
    found = [(event.start_seconds, event.end_seconds, event.probability, event.peak) for event in merger.finish()]
    assert found == [(0, 3, pytest.approx(0.8), 0.9), (3, 5, pytest.approx(0.6), 0.6), (9, 11, pytest.approx(0.8), 0.8)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"window_seconds": 700.0, "stride_seconds": 1.0}, "--window: expected 0.05 to 600, found 700"),
        ({"window_seconds": 2.0, "stride_seconds": 3.0}, "--stride: expected 0.05 to 2, found 3"),
        ({"window_seconds": 2.0, "stride_seconds": 1.0, "threshold": 1.5}, "--threshold: expected 0 to 1, found 1.5"),
    ],
)
def test_windows_that_cannot_be_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(UserInputError, match=said):
        WindowConfig(**settings)


def test_videos_of_one_name_are_refused_before_one_overwrites_the_other(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "film.mp4").write_bytes(b"")
    videos = [tmp_path / name / "film.mp4" for name in ("a", "b")]
    config = WindowConfig(window_seconds=2.0, stride_seconds=1.0)
    with pytest.raises(UserInputError, match="expected videos of different names"):
        predict_timeline(tmp_path, videos, config, views=VIEWS, out=tmp_path)


def test_the_picture_has_a_bar_per_event_at_its_place_and_escapes_names() -> None:
    merger = EventMerger(0.5)
    merger.add(25, 50, [Prediction(target="label", label="<run>", probability=0.75)])
    report = TimelineReport(
        video="x/film.mp4",
        num_windows=4,
        seconds=100.0,
        events=merger.finish(),
        damaged=[],
        windows="",
        timeline="",
        document="",
    )
    drawn = ElementTree.fromstring(timeline_svg(report, WindowConfig(window_seconds=25.0, stride_seconds=25.0)))
    bars = [one for one in drawn.iter() if one.tag.endswith("rect") and one.get("fill-opacity")]
    (bar,) = bars
    assert float(bar.get("x")) == pytest.approx(220 + 0.25 * 720)
    assert float(bar.get("width")) == pytest.approx(0.25 * 720)
    assert "<run>" in "".join(drawn.itertext())


@pytest.mark.parametrize(("seconds", "shown"), [(5.0, "0:05"), (62.5, "1:02.5"), (3723.0, "1:02:03"), (59.96, "1:00")])
def test_times_are_told_as_a_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_events_of_several_videos_are_told_under_their_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    event = Event(target="label", label="red", start_seconds=0.0, end_seconds=2.0, probability=0.75, peak=0.9)
    reports = [
        TimelineReport(
            video=name, num_windows=1, seconds=2.0, events=[event], damaged=[], windows="", timeline="", document=""
        )
        for name in ("a.mp4", "b.mp4")
    ]
    monkeypatch.setattr(model, "find_checkpoint", lambda *_: tmp_path)
    monkeypatch.setattr(timeline, "predict_timeline", lambda *_, **__: reports)
    commands.predict(tmp_path, [Path("a.mp4"), Path("b.mp4")], window=2.0)
    line = "       0:00 -      0:02   75.0%  label: red"
    assert capsys.readouterr().out.splitlines() == ["a.mp4", line, "b.mp4", line]
