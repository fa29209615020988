"""A video of any length in windows: what each shows, what lasts for longer, and a picture of when.

Windows begin every `stride` seconds and are read some at a time: each lot becomes a small shard set, is scored and goes
to the file of rows, so that neither memory nor disk grows with the video. A video's length is not asked before: the
lots end behind its end.
"""

import csv
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ca2st.durable import write_bytes, writing
from ca2st.errors import UserInputError
from pipelines.views import EvaluationViews
from ray_jobs.pages.charts import page_environment, places
from ray_jobs.runs.inference import TrainedModel, load_trained, score
from ray_jobs.runs.prediction import DamagedVideo, Prediction, converted, likeliest, require_videos, segment_of
from sharding.errors import RejectReason
from sharding.format.index import read_parquet, sample_key
from sharding.format.shard_set import ShardSet

_WINDOWS_AT_A_TIME = 64
_MOST_WINDOW_SECONDS = 600.0
LEAST_STRIDE_SECONDS = 0.05
_MOST_EVENTS = 10_000
_MOST_SHOWN_CLASSES = 16
_END_OF_VIDEO = "segment_outside"
_OF_THE_FILE: frozenset[RejectReason] = frozenset(
    {"missing_file", "empty_file", "not_a_video", "no_index", "no_video_stream", "truncated", "hdr", "encrypted"}
)
"""Reasons that hold for all further windows alike."""
_MOST_UNREADABLE_LOTS = 16
"""In a row, before the rest of a video is given up."""
_CLOSE_SECONDS = 1e-3
_SHORT = 0.98
"""A window that has less than this share of its seconds has met the end of the video; thinned frames may end early."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowConfig:
    """How a video is cut, and what counts as an event."""

    window_seconds: float
    """Length of a window."""
    stride_seconds: float
    """Time from the beginning of a window to that of the next."""
    threshold: float = 0.5
    """A class is an event while its probability is at least this."""
    top: int = 5
    """Classes of each target in a row."""

    def __post_init__(self) -> None:
        for name, least, most in (
            ("window_seconds", LEAST_STRIDE_SECONDS, _MOST_WINDOW_SECONDS),
            ("stride_seconds", LEAST_STRIDE_SECONDS, self.window_seconds),
            ("threshold", 0.0, 1.0),
        ):
            if not least <= (value := getattr(self, name)) <= most:
                option = f"--{name.removesuffix('_seconds')}"
                raise UserInputError(f"{option}: expected {least:g} to {most:g}, found {value:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A class that a video shows from one moment to another: windows in a row, joined."""

    target: str
    label: str
    start_seconds: float
    end_seconds: float
    probability: float
    """Mean over its windows."""
    peak: float
    """Of its likeliest window."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimelineReport:
    """What was found in one video, and where it is written."""

    video: str
    num_windows: int
    seconds: float
    """End of the last window that could be read."""
    events: list[Event]
    """By time."""
    damaged: list[DamagedVideo]
    """Windows that cannot be read."""
    windows: str
    """CSV file: a row per window."""
    timeline: str
    """SVG picture."""
    document: str
    """JSON file: this report."""


class EventMerger:
    """Joins windows in which a class reaches the threshold, as they come."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._open: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        """Start, end and probability of the windows in a row of a target's class."""
        self.events: list[Event] = []
        """Those that have ended."""

    def add(self, start: float, end: float, found: Sequence[Prediction]) -> None:
        """Take in a window: `found` has every class that reaches the threshold, and maybe others."""
        held = {(one.target, one.label): one.probability for one in found if one.probability >= self._threshold}
        for name in [name for name, windows in self._open.items() if name not in held or start > windows[-1][1]]:
            self._close(name)
        for name, probability in held.items():
            self._open.setdefault(name, []).append((start, end, probability))

    def finish(self) -> list[Event]:
        """End what lasts to the end, and return all events by time."""
        for name in list(self._open):
            self._close(name)
        return sorted(
            self.events, key=lambda event: (event.start_seconds, event.end_seconds, event.target, event.label)
        )

    def _close(self, name: tuple[str, str]) -> None:
        windows = self._open.pop(name)
        probabilities = [probability for _, _, probability in windows]
        if len(self.events) == _MOST_EVENTS:
            raise UserInputError(
                f"--threshold {self._threshold:g}: more than {_MOST_EVENTS} events; expected a higher one"
            )
        self.events.append(
            Event(
                target=name[0],
                label=name[1],
                start_seconds=windows[0][0],
                end_seconds=windows[-1][1],
                probability=float(np.mean(probabilities)),
                peak=max(probabilities),
            )
        )


def predict_timeline(
    checkpoint: Path, videos: Sequence[Path], config: WindowConfig, *, views: EvaluationViews, out: Path
) -> list[TimelineReport]:
    """Classify every window of each video; rows, events and a picture go to `out`, named after the video.

    Raises:
        UserInputError: a video is not there, given twice, or called as another one.
    """
    require_videos(videos)
    names = [video.stem for video in videos]
    if len(set(names)) < len(names):
        raise UserInputError("--window: expected videos of different names, since files are named after them")
    trained = load_trained(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    return [_timeline_of(trained, video, config, views=views, out=out) for video in videos]


def _timeline_of(
    trained: TrainedModel, video: Path, config: WindowConfig, *, views: EvaluationViews, out: Path
) -> TimelineReport:
    merger, damaged = EventMerger(config.threshold), list[DamagedVideo]()
    num_windows, seconds = 0, 0.0
    rows = out / f"{video.stem}.windows.csv"
    with writing(rows) as file:
        prefixes = [""] if len(trained.classes) == 1 else [f"{target}_" for target in trained.classes]
        ranks, kinds = range(1, config.top + 1), ("label", "probability")
        named = [f"{prefix}{kind}_{rank}" for prefix in prefixes for rank in ranks for kind in kinds]
        file.write(_line(["start_seconds", "end_seconds", *named]))
        for start, end, found in _windows(trained, video, config, views=views, damaged=damaged):
            file.write(_line([f"{start:.3f}", f"{end:.3f}", *_cells(found, trained, config.top)]))
            merger.add(start, end, found)
            num_windows, seconds = num_windows + 1, max(seconds, end)
    report = TimelineReport(
        video=str(video),
        num_windows=num_windows,
        seconds=seconds,
        events=merger.finish(),
        damaged=damaged,
        windows=str(rows),
        timeline=str(out / f"{video.stem}.timeline.svg"),
        document=str(out / f"{video.stem}.events.json"),
    )
    write_bytes(Path(report.timeline), timeline_svg(report, config).encode())
    document = {**asdict(report), **asdict(config)}
    write_bytes(Path(report.document), (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    return report


def _windows(
    trained: TrainedModel, video: Path, config: WindowConfig, *, views: EvaluationViews, damaged: list[DamagedVideo]
) -> Iterator[tuple[float, float, list[Prediction]]]:
    """Yield (start, end, classes) of each window that can be read; what cannot goes to `damaged`."""
    covered, num_unreadable = 0.0, 0
    for first in itertools.count(step=_WINDOWS_AT_A_TIME):
        starts = [round((first + index) * config.stride_seconds, 6) for index in range(_WINDOWS_AT_A_TIME)]
        named = {f"{video} at {start:.3f} s": start for start in starts}
        samples = [
            segment_of(video, start, round(start + config.window_seconds, 6), name=name)
            for name, start in named.items()
        ]
        with converted(trained, samples, is_shown=False) as (shard_set, rejected):
            damaged += [one for one in rejected if one.reason != _END_OF_VIDEO]
            if shard_set is None:
                num_unreadable += 1
                reasons = {one.reason for one in rejected}
                if _END_OF_VIDEO in reasons:
                    return
                if reasons <= _OF_THE_FILE or num_unreadable == _MOST_UNREADABLE_LOTS:
                    _give_up(video, damaged, behind_seconds=starts[-1] if covered else None)
                    return
                continue
            num_unreadable = 0
            result, lengths = score(trained, shard_set, views), _durations(shard_set)
        at = {key: row for row, key in enumerate(result.sample_ids)}
        for name, start in named.items():
            if (row := at.get(sample_key(name))) is None:
                continue
            of_window = {target: values[row] for target, values in result.probabilities.items()}
            length = lengths[sample_key(name)]
            is_last = length < _SHORT * config.window_seconds
            end = start + (length if is_last else config.window_seconds)
            if end > covered + _CLOSE_SECONDS:
                yield start, end, _classes(trained, of_window, config)
            covered = end
            if is_last:  # the windows behind it are parts of it
                return


def _give_up(video: Path, damaged: list[DamagedVideo], *, behind_seconds: float | None) -> None:
    """Name the rest of a video among the damaged; None: of which nothing was read, in one entry."""
    if behind_seconds is None:
        damaged[:] = [replace(damaged[0], video=str(video))]
        return
    what = f"left out, as the windows before it cannot be read: {damaged[-1].what}"
    damaged.append(replace(damaged[-1], video=f"{video} behind {behind_seconds:.3f} s", what=what))


def _classes(trained: TrainedModel, of_window: Any, config: WindowConfig) -> list[Prediction]:
    """Return the likeliest classes, and every one that reaches the threshold, each target's likeliest first."""
    most = max(int((np.asarray(values) >= config.threshold).sum()) for values in of_window.values())
    return likeliest(trained.classes, of_window, top=max(config.top, most))


def _durations(shard_set: ShardSet) -> dict[str, float]:
    found: dict[str, float] = {}
    for shard in shard_set.shards:
        table = read_parquet(shard_set.root / shard.index_name, columns=["key", "duration_seconds"])
        found |= dict(zip(table["key"].to_pylist(), table["duration_seconds"].to_pylist(), strict=True))
    return found


def _line(cells: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _cells(found: Sequence[Prediction], trained: TrainedModel, top: int) -> list[str]:
    cells: list[str] = []
    for target in trained.classes:
        own = [one for one in found if one.target == target][:top]
        cells += [cell for one in own for cell in (one.label, f"{one.probability:.6f}")]
        cells += [""] * (2 * (top - len(own)))
    return cells


def timeline_svg(report: TimelineReport, config: WindowConfig) -> str:
    """Return a picture of the events: a row per class, those that last longest, over the video's time."""
    lasts: dict[tuple[str, str], float] = {}
    for event in report.events:
        name = (event.target, event.label)
        lasts[name] = lasts.get(name, 0.0) + event.end_seconds - event.start_seconds
    shown = sorted(lasts, key=lambda name: (-lasts[name], name))[:_MOST_SHOWN_CLASSES]
    several = len({target for target, _ in lasts}) > 1
    end = max(report.seconds, 1e-3)
    rows = []
    for name in shown:
        bars = [
            {
                "x": 100 * event.start_seconds / end,
                "width": 100 * (event.end_seconds - event.start_seconds) / end,
                "opacity": 0.25 + 0.75 * event.probability,
                "tip": f"{event.label}, {clock(event.start_seconds)} to {clock(event.end_seconds)}, "
                f"{event.probability:.0%}",
            }
            for event in report.events
            if (event.target, event.label) == name
        ]
        rows.append((f"{name[0]}: {name[1]}" if several else name[1], bars))
    marks = [(100 * at / end, clock(at)) for at in places(0.0, end) if at <= end * (1 + 1e-9)]
    return (
        page_environment()
        .get_template("timeline.svg")
        .render(
            title=Path(report.video).name,
            rows=rows,
            marks=marks,
            left_out=len(lasts) - len(shown),
            config=config,
            num_windows=report.num_windows,
        )
    )


def clock(seconds: float) -> str:
    """Return ``1:02:03`` or ``2:03.5``."""
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    shown = f"{rest:04.1f}".removesuffix(".0")
    return f"{hours}:{minutes:02d}:{shown}" if hours else f"{minutes}:{shown}"
