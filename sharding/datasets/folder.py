"""``folder``: a folder a class, videos inside; the names of the folders, sorted, are the classes."""

import os
from pathlib import Path

from sharding.datasets.media_root import VIDEO_SUFFIXES, MediaRoot
from sharding.datasets.problems import Problems
from sharding.datasets.request import DatasetRequest, needed_media, refuse_unused
from sharding.datasets.table import CellError
from sharding.errors import AnnotationError
from sharding.manifest import LabelSpace
from sharding.source import SourceList, SourceSample


def read(request: DatasetRequest) -> SourceList:
    """Every video of every class folder, by class and then by name.

    The folder is the annotation here, so it is listed for a dry run too; no video is opened.

    Raises:
        UserInputError: an option this dataset does not use, or no folder.
        AnnotationError: no classes, an empty class, or files that are no videos of a class.
    """
    refuse_unused(request, "folder", "annotations", "classes", "task")
    media = needed_media(request, "folder", what="the folder that holds a folder a class")
    problems = Problems(media, advice="move, rename or remove it and run again")
    classes = _class_folders(media, problems)
    root = MediaRoot(media, check=True)
    samples = [
        sample
        for label, folder in enumerate(classes)
        for sample in _samples_of(folder, label, root=root, problems=problems)
    ]
    problems.refuse_any()
    return SourceList(
        dataset="folder",
        split=request.split,
        label_spaces=(LabelSpace(name="label", classes=tuple(folder.name for folder in classes)),),
        targets=("label",),
        samples=tuple(request.first(samples)),
    )


def _class_folders(media: Path, problems: Problems) -> list[Path]:
    entries = _visible(media)
    for entry in entries:
        if not entry.is_dir():
            problems.add("file beside the classes", f"{entry}: expected only class folders here, found a file")
    folders = [entry for entry in entries if entry.is_dir()]
    if not folders:
        found = f"{len(entries)} files" if entries else "an empty folder"
        raise AnnotationError(f"{media}: expected a folder a class with videos inside, found {found}")
    if len(folders) == 1:
        problems.add("one class", f"{media}: expected at least two class folders, found one, {folders[0].name!r}")
    return folders


def _samples_of(folder: Path, label: int, *, root: MediaRoot, problems: Problems) -> list[SourceSample]:
    entries = _visible(folder)
    if not entries:
        problems.add("empty class", f"{folder}: expected videos of the class {folder.name!r}, found none")
    samples = []
    for entry in entries:
        if entry.is_dir():
            hint = f" (is {folder} a split? then pass --media {folder})"
            problems.add(
                "folder in a class", f"{entry}: expected videos directly in a class folder, found a folder{hint}"
            )
        elif entry.suffix.lower() not in VIDEO_SUFFIXES:
            expected = " ".join(sorted(VIDEO_SUFFIXES))
            problems.add(
                "no known video", f"{entry}: expected a video ({expected}), found {entry.suffix or 'no suffix'!r}"
            )
        else:
            samples += _sample(entry, label, root=root, problems=problems)
    return samples


def _sample(path: Path, label: int, *, root: MediaRoot, problems: Problems) -> list[SourceSample]:
    name = f"{path.parent.name}/{path.name}"
    try:
        resolved = root.resolve(f"./{name}")
    except CellError as error:
        problems.add(error.kind, f"{ascii(str(path))[1:-1]}: expected {error.expected}")
        return []
    return [
        SourceSample(
            sample_id=name, path=resolved, start_seconds=None, end_seconds=None, labels=(label,), where=str(path)
        )
    ]


def _visible(folder: Path) -> list[Path]:
    """What lies in a folder, sorted by name, without hidden files."""
    try:
        names = os.listdir(folder)  # noqa: PTH208  # names only; a Path a file is built once, below
    except OSError as error:
        raise AnnotationError(f"{folder}: expected a readable folder, found: {error.strerror}") from error
    return [folder / name for name in sorted(names) if not name.startswith(".")]
