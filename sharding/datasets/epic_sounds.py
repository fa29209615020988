"""``epic_sounds``: the published annotation CSV, with EPIC-KITCHENS-100 videos or ready-cut clips."""

from pathlib import Path

from sharding.datasets.epic_media import EpicFile, EpicMedia, EpicSegment, expected_file, read_epic_segments
from sharding.datasets.label_spaces import class_index, class_name, published_classes
from sharding.datasets.problems import Problems
from sharding.datasets.request import DatasetRequest, needed_annotations, needed_media, refuse_unused
from sharding.datasets.table import Row, read_cell, read_table
from sharding.manifest import LabelSpace
from sharding.source import SourceList, SourceSample

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
