"""What lies in a folder of somebody's own videos: classes, splits, and what is left aside. No video is opened."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ca2st.errors import UserInputError
from sharding.datasets.folder import ClassFolders, list_class_folders, visible_entries
from sharding.datasets.label_spaces import with_label_notes
from sharding.datasets.media_root import VIDEO_SUFFIXES
from sharding.errors import AnnotationError
from sharding.format.shard_set import LabelSpace
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
    """Classes of which nothing validates: with a single video, or not in the folder's own validation split."""
    left_aside: tuple[str, ...] = ()
    """Files that are no videos, and a test split, which a training must not see; relative to the folder."""
    splits_given: bool = False
    """Whether the folder's own validation split is used."""
    follow_links: bool = False
    """Whether links were allowed to lead outside."""

    def source(self, split: str) -> SourceList:
        """The list of ``train`` or ``validation`` for the converter."""
        source = SourceList(
            dataset="folder",
            split=split,
            label_spaces=(LabelSpace(name="label", classes=self.classes),),
            targets=("label",),
            samples=self.train if split == "train" else self.validation,
        )
        return with_label_notes(source)

    def count(self, split: str) -> dict[str, int]:
        """Videos of each class in a split."""
        labels = [sample.labels[0] for sample in self.source(split).samples]
        return {name: labels.count(label) for label, name in enumerate(self.classes)}


def list_videos(folder: Path, *, follow_links: bool = False) -> OwnVideos:
    """List a folder of class folders, or of splits of class folders.

    Without a validation split of its own, `validation_names` of each class validate. A split of its own may lack
    classes, which are then only trained on. `follow_links`: links may lead outside.

    Raises:
        UserInputError: no such folder.
        AnnotationError: fewer than two classes, a class without a training video, a class that only validates, a
            folder inside a class, or a file that leads outside.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise UserInputError(f"--data-folder {folder}: expected a folder, found {found}; its form is {_FORM}")
    splits = _split_folders(folder)
    train = _listed(folder if splits is None else splits["train"], None, follow_links=follow_links)
    if train.empty:
        raise AnnotationError(
            f"{folder}: expected videos ({' '.join(sorted(VIDEO_SUFFIXES))}) of every class to train on, found none of "
            f"the class {', '.join(map(repr, train.empty))}; add some, or remove the folder"
        )
    if splits is None:
        return _shared_out(folder, train, left_aside=train.left_aside, follow_links=follow_links)
    aside = [*_beside_splits(folder, splits), *train.left_aside]
    if "validation" not in splits:
        return _shared_out(folder, train, left_aside=aside, follow_links=follow_links)
    named = {entry.name for entry in visible_entries(splits["validation"]) if entry.is_dir()}
    if extra := sorted(named - set(train.classes)):
        raise AnnotationError(
            f"{folder}: expected no class in {splits['validation'].name} that is not in {splits['train'].name}, found "
            f"{', '.join(map(repr, extra))}; nothing would be trained to name them: complete or move them"
        )
    validation = _listed(splits["validation"], train.classes, follow_links=follow_links)
    return OwnVideos(
        folder=folder,
        classes=train.classes,
        train=train.samples,
        validation=validation.samples,
        only_trained=validation.empty,
        left_aside=(*aside, *validation.left_aside),
        splits_given=True,
        follow_links=follow_links,
    )


def validation_names(names: Sequence[str]) -> frozenset[str]:
    """Which videos of one class validate: the fifth whose names have the smallest hashes, none of a single one.

    Other classes have no influence, and another video in this class changes at most who is last among them.
    """
    if len(names) < 2:
        return frozenset()
    ranked = sorted(names, key=lambda name: (xxhash.xxh3_64_intdigest(name.encode()), name))
    return frozenset(ranked[: max(1, len(names) // VALIDATION_SHARE)])


def _listed(folder: Path, classes: Sequence[str] | None, *, follow_links: bool) -> ClassFolders:
    return list_class_folders(
        folder,
        classes=classes,
        follow_links=follow_links,
        option="--data-folder",
        form=f"a folder a class, in the form {_FORM}",
    )


def _shared_out(folder: Path, listing: ClassFolders, *, left_aside: Sequence[str], follow_links: bool) -> OwnVideos:
    names = [[sample.sample_id for sample in of_class] for of_class in listing.videos.values()]
    validates = frozenset[str]().union(*map(validation_names, names))
    return OwnVideos(
        folder=folder,
        classes=listing.classes,
        train=tuple(sample for sample in listing.samples if sample.sample_id not in validates),
        validation=tuple(sample for sample in listing.samples if sample.sample_id in validates),
        only_trained=tuple(name for name, of_class in listing.videos.items() if len(of_class) == 1),
        left_aside=tuple(left_aside),
        follow_links=follow_links,
    )


def _split_folders(folder: Path) -> dict[str, Path] | None:
    """The folders of splits by split, or None where the folders are classes."""
    found = [entry for entry in visible_entries(folder) if entry.name.lower() in _SPLITS and entry.is_dir()]
    found = [entry for entry in found if any(inner.is_dir() for inner in visible_entries(entry))]
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
    if others := [entry.name for entry in visible_entries(folder) if entry.is_dir() and entry not in found]:
        raise AnnotationError(
            f"{folder}: expected only splits (train, val, test) beside each other, found {', '.join(others)} too; "
            "move them into train and val, or elsewhere"
        )
    return splits


def _beside_splits(folder: Path, splits: Mapping[str, Path]) -> list[str]:
    aside = [entry.name for entry in visible_entries(folder) if not entry.is_dir()]
    return [*aside, *(f"{splits[name].name}/" for name in ("test",) if name in splits)]
