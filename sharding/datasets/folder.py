"""``folder``: a folder per class, videos inside; the names of the folders, sorted, are the classes."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ca2st.errors import did_you_mean
from sharding.datasets.label_spaces import check_class_name, read_classes
from sharding.datasets.request import VIDEO_SUFFIXES, DatasetRequest, MediaRoot, needed_media
from sharding.datasets.table import CellError, Problems
from sharding.errors import AnnotationError
from sharding.format.shard_set import LabelSpace
from sharding.source import EMPTY_FOLDERS, LEFT_ASIDE, UNUSED_CLASSES, SourceList, SourceSample

_LITTER = frozenset({"thumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "system volume information", "@eadir"})
"""What operating systems leave in folders, in lower case; passed over as hidden files are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassFolders:
    """What lies in a folder of class folders."""

    videos: Mapping[str, tuple[SourceSample, ...]]
    """By class in label order; a class may have none."""
    left_aside: tuple[str, ...]
    """Files that are no videos, beside the class folders and in them; relative to the folder."""
    empty_folders: tuple[str, ...]
    """Class folders without a video."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes in label order."""
        return tuple(self.videos)

    @property
    def samples(self) -> tuple[SourceSample, ...]:
        """All videos, by class and then by name."""
        return tuple(sample for of_class in self.videos.values() for sample in of_class)

    @property
    def empty(self) -> tuple[str, ...]:
        """Classes without a video, with or without a folder."""
        return tuple(name for name, of_class in self.videos.items() if not of_class)


def read(request: DatasetRequest, dataset: str) -> SourceList:
    """Return every video of every class folder, by class and then by name.

    The folder is the annotation here, so it is listed for a dry run too; no video is opened. Raises as
    `list_class_folders`, and UserInputError where there is no folder.
    """
    media = needed_media(request, dataset, what="the folder that holds a folder per class")
    classes = None if request.classes is None else read_classes(request.classes)
    found = list_class_folders(media, classes=classes, follow_links=request.follow_links)
    unused = set(found.empty) - set(found.empty_folders)
    notes = {
        LEFT_ASIDE: found.left_aside,
        EMPTY_FOLDERS: found.empty_folders,
        UNUSED_CLASSES: tuple(name for name in found.empty if name in unused),
    }
    return SourceList(
        dataset=dataset,
        split=request.split,
        label_spaces=(LabelSpace(name="label", classes=found.classes),),
        targets=("label",),
        samples=found.samples[: request.limit],
        notes={kind: places for kind, places in notes.items() if places},
    )


def list_class_folders(
    folder: Path,
    *,
    classes: Sequence[str] | None = None,
    follow_links: bool = False,
    option: str = "--media",
    form: str = "a folder per class with videos inside",
) -> ClassFolders:
    """List the videos of class folders; hidden files and those of operating systems are passed over.

    Args:
        folder: Holds the class folders.
        classes: The class names in label order, of which some folders may be missing; None: the names of the folders.
        follow_links: Whether links may lead outside `folder`.
        option: The option that names the folder, for messages.
        form: What is expected, for messages.

    Raises:
        AnnotationError: no class folders or no video at all, fewer than two classes, a folder that is none of
            `classes`, a folder inside a class, a name that cannot be one, or a link that leads outside.
    """
    problems = Problems(folder, advice="change it and run again")
    entries = visible_entries(folder)
    folders = {entry.name: entry for entry in entries if entry.is_dir()}
    aside = [entry.name for entry in entries if not entry.is_dir()]
    for entry in entries:
        if not entry.exists():
            problems.add("broken link", f"{entry}: expected a class folder or a file, found a link to nothing")
    if not folders:
        found = f"{len(aside)} files and no folder" if aside else "an empty folder"
        raise AnnotationError(f"{folder}: expected {form}, found {found}")
    _check_names(folders, classes, problems)
    names = tuple(folders) if classes is None else tuple(classes)
    if len(names) == 1:
        problems.add("one class", f"{folder}: expected at least two classes, found one, {names[0]!r}")
    root = MediaRoot(folder, check=True, follow_links=follow_links, option=option)
    videos = {
        name: tuple(_videos_of(folders[name], label, root=root, problems=problems, aside=aside))
        for label, name in enumerate(names)
        if name in folders
    }
    problems.refuse_any()
    if not any(videos.values()):
        endings = " ".join(sorted(VIDEO_SUFFIXES))
        raise AnnotationError(f"{folder}: expected {form} (endings: {endings}), found no video in any of its folders")
    return ClassFolders(
        videos={name: videos.get(name, ()) for name in names},
        left_aside=tuple(aside),
        empty_folders=tuple(name for name, of_class in videos.items() if not of_class),
    )


def _check_names(folders: Mapping[str, Path], classes: Sequence[str] | None, problems: Problems) -> None:
    for name, folder in folders.items():
        try:
            check_class_name(name)
        except CellError as error:
            problems.add(error.kind, f"{ascii(str(folder))[1:-1]}: expected {error.expected} as the folder's name")
            continue
        if classes is not None and name not in classes:
            near = did_you_mean(name, list(classes))
            problems.add(
                "unknown class", f"{folder}: expected one of the {len(classes)} class names{near}, found {name!r}"
            )


def _videos_of(
    folder: Path, label: int, *, root: MediaRoot, problems: Problems, aside: list[str]
) -> list[SourceSample]:
    """Return the videos of one class; what is none goes to `aside`, what cannot be used to `problems`."""
    samples = []
    for entry in visible_entries(folder):
        name = f"{folder.name}/{entry.name}"
        if entry.is_dir():
            hint = f" (is {folder} a split? then give {folder})"
            problems.add(
                "folder in a class", f"{entry}: expected videos directly in a class folder, found a folder{hint}"
            )
        elif entry.suffix.lower() not in VIDEO_SUFFIXES:
            aside.append(name)
        else:
            try:
                path = root.resolve(f"./{name}")
            except CellError as error:
                problems.add(error.kind, f"{ascii(str(entry))[1:-1]}: expected {error.expected}")
                continue
            samples.append(
                SourceSample(
                    sample_id=name, path=path, start_seconds=None, end_seconds=None, labels=(label,), where=str(entry)
                )
            )
    return samples


def visible_entries(folder: Path) -> list[Path]:
    """Return what lies in a folder, sorted by name, without hidden files and what operating systems leave.

    Raises:
        AnnotationError: the folder cannot be listed.
    """
    try:
        names = os.listdir(folder)  # noqa: PTH208  # names only; the Path of a file is built once, below
    except OSError as error:
        raise AnnotationError(f"{folder}: expected a readable folder, found: {error.strerror}") from error
    return [folder / name for name in sorted(names) if not name.startswith(".") and name.lower() not in _LITTER]
