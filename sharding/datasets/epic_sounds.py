"""EPIC-SOUNDS: the owners' CSV files and the videos of EPIC-KITCHENS.

Annotated segments of EPIC's kitchens, and where their videos or clips lie.

``epic_sounds``: the published annotation CSV, with EPIC-KITCHENS-100 videos or ready-cut clips.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ca2st.errors import UserInputError
from sharding.datasets.label_spaces import class_index, class_name, published_classes
from sharding.datasets.media_root import VIDEO_SUFFIXES, MediaRoot
from sharding.datasets.request import DatasetRequest, needed_annotations, needed_media, refuse_unused
from sharding.datasets.table import CellError, Problems, Row, clock_time, read_cell, read_segment, read_table
from sharding.format.shard_set import LabelSpace
from sharding.source import SourceList, SourceSample

_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EpicSegment:
    """One annotated segment of a long video."""

    segment_id: str
    participant_id: str
    video_id: str
    start_seconds: float
    end_seconds: float
    where: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EpicFile:
    """The file a segment is read from; `is_clip`: the segment is the whole of it."""

    path: Path
    is_clip: bool


def read_epic_segments(
    rows: Sequence[Row], id_column: str, *, start: str, stop: str, problems: Problems
) -> list[EpicSegment | None]:
    """A segment a row, None where a cell is wrong or the id was there before."""
    first_rows: dict[str, Row] = {}
    return [_segment(row, id_column, start, stop, first_rows=first_rows, problems=problems) for row in rows]


def _segment(
    row: Row, id_column: str, start: str, stop: str, *, first_rows: dict[str, Row], problems: Problems
) -> EpicSegment | None:
    names = [read_cell(row, column, _plain_name, problems) for column in (id_column, "participant_id", "video_id")]
    times = read_segment(row, start, stop, clock_time, problems=problems)
    first = first_rows.setdefault(row[id_column], row)
    if first is not row:
        found = f"{row[id_column]!r} was listed before, at {first.place(id_column)}"
        problems.add("sample twice", f"{row.place(id_column)}: expected every id once, {found}")
    segment_id, participant_id, video_id = names
    if segment_id is None or participant_id is None or video_id is None or times is None or first is not row:
        return None
    return EpicSegment(
        segment_id=segment_id,
        participant_id=participant_id,
        video_id=video_id,
        start_seconds=times[0],
        end_seconds=times[1],
        where=row.where,
    )


def _plain_name(text: str) -> str:
    """An id that is safe as part of a file name."""
    if not _NAME.fullmatch(text):
        raise CellError("not an id", "an id of letters, digits, _ and -")
    return text


class EpicMedia:
    """The media folder of an EPIC data set.

    ``<video_id>.MP4`` or clips ``<segment_id>.mp4``, directly in the folder, in ``<participant_id>/`` or in
    ``<participant_id>/videos/``; any known video suffix in any case.

    Args:
        folder: The folder of ``--media``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._root = MediaRoot(folder, check=True)
        self._listed: dict[Path, dict[str, list[Path]]] = {}

    def locate(self, segments: Sequence[EpicSegment]) -> list[EpicFile]:
        """The file of each segment; where there is none, the path it would have.

        Raises:
            UserInputError: not one file was found.
            AnnotationError: a segment has more than one file, or one that a link leads outside.
        """
        problems = Problems(self._folder, advice="keep one of them, inside --media, and run again")
        found = [self._files(segment) for segment in segments]
        for segment, files in zip(segments, found, strict=True):
            self._check(segment, files, problems)
        problems.refuse_any()
        if segments and not any(found):
            wanted = segments[0]
            raise UserInputError(
                f"--media {self._folder}: expected {wanted.video_id}.MP4, {wanted.participant_id}/videos/"
                f"{wanted.video_id}.MP4 or {wanted.segment_id}.mp4 and so on, found none of {len(segments)} segments; "
                "check --media"
            )
        return [files[0] if files else expected_file(self._folder, s) for s, files in zip(segments, found, strict=True)]

    def _files(self, segment: EpicSegment) -> list[EpicFile]:
        participant = self._folder / segment.participant_id
        folders = (self._folder, participant, participant / "videos")
        return [
            EpicFile(path=path, is_clip=is_clip)
            for name, is_clip in ((segment.video_id, False), (segment.segment_id, True))
            for folder in folders
            for path in self._listing(folder).get(name, [])
        ]

    def _check(self, segment: EpicSegment, files: list[EpicFile], problems: Problems) -> None:
        if len(files) > 1:
            names = " and ".join(str(file.path) for file in files)
            problems.add(
                "media found twice", f"{segment.where}: expected one file for {segment.segment_id}, found {names}"
            )
        for file in files[:1]:
            try:
                self._root.resolve(file.path.relative_to(self._folder).as_posix())
            except CellError as error:
                problems.add(error.kind, f"{segment.where}: {file.path}: expected {error.expected}")

    def _listing(self, folder: Path) -> dict[str, list[Path]]:
        """The videos of a folder by their names without suffix; empty where there is no such folder."""
        if folder not in self._listed:
            listing: dict[str, list[Path]] = {}
            for path in sorted(folder.iterdir()) if folder.is_dir() else []:
                if path.suffix.lower() in VIDEO_SUFFIXES:
                    listing.setdefault(path.stem, []).append(path)
            self._listed[folder] = listing
        return self._listed[folder]


def expected_file(folder: Path, segment: EpicSegment) -> EpicFile:
    """Where a segment's video is looked for first."""
    return EpicFile(path=folder / f"{segment.video_id}.MP4", is_clip=False)


_COLUMNS = ("annotation_id", "participant_id", "video_id", "start_timestamp", "stop_timestamp", "class", "class_id")
"""The columns that are read; start_sample, stop_sample and description are published too."""


def read(request: DatasetRequest) -> SourceList:
    """Every annotation, checked against the 44 published classes, with its video or clip.

    Single missing videos stay in the list, for the conversion to count as rejects; where not one is found, `--media`
    is refused.

    Raises:
        UserInputError: an option this dataset does not use, a missing one, or no media at all.
        AnnotationError: a wrong file or rows, or media found in two places.
    """
    refuse_unused(request, "epic_sounds", "classes", "task", "follow_links")
    annotations = needed_annotations(request, "epic_sounds", what="EPIC_Sounds_train.csv or EPIC_Sounds_validation.csv")
    what = "the folder with <video_id>.MP4, <participant_id>/videos/<video_id>.MP4 or <annotation_id>.mp4"
    media = needed_media(request, "epic_sounds", what=what) if request.check_media else request.media or Path()
    classes = published_classes("epic_sounds")
    samples = [_sample(*annotated) for annotated in _with_files(_annotated(annotations, classes), media, request)]
    return SourceList(
        dataset="epic_sounds",
        split=request.split,
        label_spaces=(LabelSpace(name="label", classes=classes),),
        targets=("label",),
        samples=tuple(samples),
    )


def _annotated(annotations: Path, classes: tuple[str, ...]) -> list[tuple[EpicSegment, int]]:
    problems = Problems(annotations, advice="correct the file and run again")
    rows = read_table(annotations, required=_COLUMNS, others=True, problems=problems).rows
    segments = read_epic_segments(
        rows, "annotation_id", start="start_timestamp", stop="stop_timestamp", problems=problems
    )
    labels = [_label(row, classes, problems) for row in rows]
    problems.refuse_any()
    pairs = zip(segments, labels, strict=True)
    return [(segment, label) for segment, label in pairs if segment is not None and label is not None]


def _label(row: Row, classes: tuple[str, ...], problems: Problems) -> int | None:
    """The class index, which must agree with the class name beside it."""
    index = read_cell(row, "class_id", class_index(len(classes)), problems)
    named = read_cell(row, "class", class_name(classes), problems)
    if index is not None and named is not None and index != named:
        problems.add(
            "class and class_id differ",
            f"{row.place('class_id')}: expected {named}, the index of {row['class']!r}, found {row['class_id']!r}",
        )
    return index if index == named else None


def _with_files(
    annotated: list[tuple[EpicSegment, int]], media: Path, request: DatasetRequest
) -> list[tuple[EpicSegment, int, EpicFile]]:
    kept = request.first(annotated)
    segments = [segment for segment, _ in kept]
    looked_at = request.check_media
    files = EpicMedia(media).locate(segments) if looked_at else [expected_file(media, s) for s in segments]
    return [(segment, label, file) for (segment, label), file in zip(kept, files, strict=True)]


def _sample(segment: EpicSegment, label: int, file: EpicFile) -> SourceSample:
    return SourceSample(
        sample_id=segment.segment_id,
        path=file.path,
        start_seconds=None if file.is_clip else segment.start_seconds,
        end_seconds=None if file.is_clip else segment.end_seconds,
        labels=(label,),
        where=segment.where,
    )
