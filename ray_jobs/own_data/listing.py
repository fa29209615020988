"""What lies in a folder of somebody's own videos: classes, splits, and what is left aside. No video is opened."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from ca2st.errors import UserInputError
from sharding.datasets.media_root import VIDEO_SUFFIXES, MediaRoot
from sharding.datasets.problems import Problems
from sharding.datasets.table import CellError
from sharding.errors import AnnotationError
from sharding.manifest import LabelSpace
from sharding.source import SourceList, SourceSample

VALIDATION_SHARE = 5
"""One in so many videos of a class validates, and at least one where there are two."""
_SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
_FORM = "DIR/<class>/*.mp4, or DIR/train/<class>/*.mp4 with DIR/val/<class>/*.mp4 beside it"


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnVideos:
    """The videos of a folder, each in one split."""

    folder: Path
    """As it was given."""
    classes: tuple[str, ...]
    """Names of the class folders, sorted: the labels."""
    train: tuple[SourceSample, ...]
    """By class and then by name."""
    validation: tuple[SourceSample, ...]
    """The same; empty where no class has a second video."""
    only_trained: tuple[str, ...] = ()
    """Classes with a single video, of which nothing validates."""
    left_aside: tuple[str, ...] = ()
    """Files that are no videos, and a test split, which a training must not see; relative to the folder."""
    splits_given: bool = False
    """Whether the folder's own validation split is used."""

    def source(self, split: str) -> SourceList:
        """The list of ``train`` or ``validation`` for the converter."""
        return SourceList(
            dataset="folder",
            split=split,
            label_spaces=(LabelSpace(name="label", classes=self.classes),),
            targets=("label",),
            samples=self.train if split == "train" else self.validation,
        )

    def count(self, split: str) -> dict[str, int]:
        """Videos of each class in a split."""
        labels = [sample.labels[0] for sample in self.source(split).samples]
        return {name: labels.count(label) for label, name in enumerate(self.classes)}


def list_videos(folder: Path) -> OwnVideos:
    """List a folder of class folders, or of splits of class folders.

    Without a validation split of its own, `validation_names` of each class validate.

    Raises:
        UserInputError: no such folder.
        AnnotationError: fewer than two classes, an empty class, splits with different classes, a folder inside a
            class, or a file that leads outside.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise UserInputError(f"--data-folder {folder}: expected a folder, found {found}; its form is {_FORM}")
    splits = _split_folders(folder)
    if splits is None:
        found_videos = _Listing.of(folder)
        return _shared_out(folder, found_videos, left_aside=found_videos.left_aside)
    listings = {split: _Listing.of(path) for split, path in splits.items() if split != "test"}
    aside = _beside_splits(folder, splits)
    aside += [name for listing in listings.values() for name in listing.left_aside]
    if "validation" not in listings:
        return _shared_out(folder, listings["train"], left_aside=aside)
    _require_equal_classes(folder, listings)
    return OwnVideos(
        folder=folder,
        classes=tuple(listings["train"].videos),
        train=listings["train"].samples(),
        validation=listings["validation"].samples(),
        left_aside=tuple(aside),
        splits_given=True,
    )


def validation_names(names: Sequence[str]) -> frozenset[str]:
    """Which videos of one class validate: the fifth whose names have the smallest hashes, none of a single one.

    Other classes have no influence, and another video in this class changes at most who is last among them.
    """
    if len(names) < 2:
        return frozenset()
    ranked = sorted(names, key=lambda name: (xxhash.xxh3_64_intdigest(name.encode()), name))
    return frozenset(ranked[: max(1, len(names) // VALIDATION_SHARE)])


def _shared_out(folder: Path, listing: "_Listing", *, left_aside: Sequence[str]) -> OwnVideos:
    samples = listing.samples()
    names = [[sample.sample_id for sample in of_class] for of_class in listing.videos.values()]
    validates = frozenset[str]().union(*map(validation_names, names))
    return OwnVideos(
        folder=folder,
        classes=tuple(listing.videos),
        train=tuple(sample for sample in samples if sample.sample_id not in validates),
        validation=tuple(sample for sample in samples if sample.sample_id in validates),
        only_trained=tuple(name for name, of_class in listing.videos.items() if len(of_class) == 1),
        left_aside=tuple(left_aside),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Listing:
    """Class folders of one split."""

    videos: Mapping[str, list[SourceSample]]
    """By class."""
    left_aside: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path) -> "_Listing":
        problems = Problems(folder, advice=f"change it and run again (the form is {_FORM})")
        entries = list(_visible(folder))
        aside = [entry.name for entry in entries if not entry.is_dir()]
        folders = [entry for entry in entries if entry.is_dir()]
        if not folders:
            found = f"{len(aside)} files and no folder" if aside else "an empty folder"
            raise AnnotationError(f"{folder}: expected a folder a class, found {found}; the form is {_FORM}")
        if len(folders) == 1:
            problems.add("one class", f"{folder}: expected at least two classes, found one, {folders[0].name!r}")
        root = MediaRoot(folder, check=True)
        videos = {
            entry.name: list(_videos_of(entry, label, root=root, problems=problems, aside=aside))
            for label, entry in enumerate(folders)
        }
        problems.refuse_any()
        return cls(videos=videos, left_aside=aside)

    def samples(self) -> tuple[SourceSample, ...]:
        return tuple(sample for of_class in self.videos.values() for sample in of_class)


def _videos_of(
    folder: Path, label: int, *, root: MediaRoot, problems: Problems, aside: list[str]
) -> Iterator[SourceSample]:
    """The videos of one class; what is none goes to `aside`, what cannot be used to `problems`."""
    num_videos = 0
    for entry in _visible(folder):
        name = f"{folder.name}/{entry.name}"
        if entry.is_dir():
            num_videos += 1  # the problem is the folder, not an empty class
            problems.add("folder in a class", f"{entry}: expected videos directly in a class, found a folder")
        elif entry.suffix.lower() not in VIDEO_SUFFIXES:
            aside.append(name)
        else:
            num_videos += 1
            try:
                path = root.resolve(f"./{name}")
            except CellError as error:
                problems.add(error.kind, f"{ascii(str(entry))[1:-1]}: expected {error.expected}")
                continue
            yield SourceSample(
                sample_id=name, path=path, start_seconds=None, end_seconds=None, labels=(label,), where=str(entry)
            )
    if not num_videos:
        endings = " ".join(sorted(VIDEO_SUFFIXES))
        problems.add("empty class", f"{folder}: expected videos ({endings}) of the class {folder.name!r}, found none")


def _split_folders(folder: Path) -> dict[str, Path] | None:
    """The folders of splits by split, or None where the folders are classes."""
    found = [entry for entry in _visible(folder) if entry.name.lower() in _SPLITS and entry.is_dir()]
    found = [entry for entry in found if any(inner.is_dir() for inner in _visible(entry))]
    if not found:
        return None
    splits: dict[str, Path] = {}
    for entry in found:
        split = _SPLITS[entry.name.lower()]
        if split in splits:
            raise AnnotationError(
                f"{folder}: expected one folder for {split}, found {splits[split].name} and {entry.name}; join them"
            )
        splits[split] = entry
    if "train" not in splits:
        names = ", ".join(path.name for path in splits.values())
        raise AnnotationError(f"{folder}: expected a folder train beside {names}, found none; the form is {_FORM}")
    if others := [entry.name for entry in _visible(folder) if entry.is_dir() and entry not in found]:
        raise AnnotationError(
            f"{folder}: expected only splits (train, val, test) beside each other, found {', '.join(others)} too; "
            "move them into train and val, or elsewhere"
        )
    return splits


def _beside_splits(folder: Path, splits: Mapping[str, Path]) -> list[str]:
    aside = [entry.name for entry in _visible(folder) if not entry.is_dir()]
    return [*aside, *(f"{splits[name].name}/" for name in ("test",) if name in splits)]


def _require_equal_classes(folder: Path, listings: Mapping[str, _Listing]) -> None:
    train, validation = (set(listings[split].videos) for split in ("train", "validation"))
    if train == validation:
        return
    parts = {"only in train": sorted(train - validation), "only in validation": sorted(validation - train)}
    told = "; ".join(f"{', '.join(names)} {where}" for where, names in parts.items() if names)
    raise AnnotationError(f"{folder}: expected the same classes in train and validation, found {told}; complete them")


def _visible(folder: Path) -> Iterator[Path]:
    """What lies in a folder, sorted by name, without hidden files."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise AnnotationError(f"{folder}: expected a readable folder, found: {error.strerror}") from error
    yield from (entry for entry in entries if not entry.name.startswith("."))
