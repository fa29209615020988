"""What the user asked a dataset reader for, and the media folder: files are named inside it and never outside."""

import math
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ca2st.errors import UserInputError, listed
from sharding.datasets.table import CellError
from sharding.errors import AnnotationError
from sharding.settings import RejectBudget
from sharding.synthetic.config import SyntheticConfig

_SPLIT = re.compile(r"[a-z0-9_-]{1,40}")
_Item = TypeVar("_Item")
UNLABELLED_SPLIT = "test"
"""The split that may be without labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetRequest:
    """The arguments of a reader; which of them a dataset needs, the reader says."""

    annotations: Path | None = None
    """The annotation file, as its owners publish it."""
    media: Path | None = None
    """The folder the media files lie under."""
    split: str = "train"
    """Name of the split, a label of the result; for ``synthetic`` it also chooses the draws."""
    limit: int | None = None
    """Only the first N samples, in annotation order; every row is checked all the same."""
    check_media: bool = True
    """False (``--dry-run``): the annotations are read and checked, no media file is looked at."""
    classes: Path | None = None
    """Class names in label order, one per line; without it they follow from the labels, or are the published ones."""
    follow_links: bool = False
    """Whether links may lead outside `media`."""
    max_missing: RejectBudget = field(default_factory=RejectBudget)
    """How many samples may have no media file: public sets lose videos every year, which is not damage."""
    audio_root: Path | None = None
    """``csv`` only: the folder that the paths of the column ``audio`` start from; None: `media`."""
    label_separator: str | None = None
    """``csv`` only: what stands between the labels of the column ``labels``; None: ``|``."""
    task: str | None = None
    """``synthetic`` only: the label space to learn."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """``synthetic`` only: how much of which world."""
    progress: Callable[[int, int], None] | None = None
    """``synthetic`` only: called with (clips made, clips in all) while they are made."""

    def __post_init__(self) -> None:
        if not _SPLIT.fullmatch(self.split):
            raise UserInputError(f"--split: expected 1 to 40 of a-z, 0-9, _ and -, found {self.split!r}")
        if self.label_separator is not None and not self.label_separator.strip():
            raise UserInputError(
                f"--label-separator: expected one or more characters, no spaces, found {self.label_separator!r}"
            )
        if self.limit is not None and self.limit < 1:
            raise UserInputError(f"--limit: expected at least 1, found {self.limit}")

    def require_few_missing(self, missing: Sequence[str], *, total: int, hint: str = "") -> None:
        """Refuse more samples without a file than `max_missing` allows; `missing` holds their ids, `hint` what to try.

        Raises:
            UserInputError: with the first of them.
        """
        if missing and not self.max_missing.allows(len(missing), total):
            share = math.ceil(1000 * len(missing) / total) / 10
            raise UserInputError(
                f"--media {self.media}: expected a file for each of {total} samples, found none for {len(missing)} "
                f"({listed(missing)}){hint}; fetch them, or leave them out with --max-missing {share:g}%"
            )

    def require_labels(self, found: str) -> None:
        """Refuse a list without labels of any split but the test split, whose labels owners keep; `found` says where.

        Raises:
            AnnotationError: as said.
        """
        if self.split != UNLABELLED_SPLIT:
            raise AnnotationError(
                f"{found}, found no labels; a list without labels cannot be learned, with --split {UNLABELLED_SPLIT} "
                "it becomes a set without labels"
            )

    def first(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """Return the first `limit` of `items`, or all."""
        return items[: self.limit]


def needed_annotations(request: DatasetRequest, dataset: str, *, what: str) -> Path:
    """Return the annotation file; `what` says which file of the dataset it is.

    Raises:
        UserInputError: none was given.
    """
    if request.annotations is None:
        raise UserInputError(f"--dataset {dataset}: expected --annotations, found none; pass {what}")
    return request.annotations


def needed_media(request: DatasetRequest, dataset: str, *, what: str) -> Path:
    """Return the media folder; `what` says what it holds.

    Raises:
        UserInputError: none was given, or it is no folder.
    """
    if request.media is None:
        raise UserInputError(f"--dataset {dataset}: expected --media, found none; pass {what}")
    if not request.media.is_dir():
        found = "a file" if request.media.exists() else "nothing there"
        raise UserInputError(f"--media {request.media}: expected a folder, found {found}; pass {what}")
    return request.media


def refuse_unused(request: DatasetRequest, dataset: str, *names: str) -> None:
    """Refuse options that this dataset would ignore.

    Raises:
        UserInputError: one of `names` (fields of the request) was given.
    """
    for name in names:
        if getattr(request, name) not in (None, False):
            raise UserInputError(f"--{name.replace('_', '-')}: --dataset {dataset} does not use it; leave it out")


VIDEO_SUFFIXES = frozenset(
    {".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv"}
    | {".ts", ".webm", ".wmv"}
)
"""Endings of the containers that are read, in lower case; files may write them in any case."""

_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class MediaRoot:
    """The folder that media files must lie in.

    Args:
        folder: The folder of ``--media``.
        check: Whether to look at the files: they must exist and, links followed, lie inside.
        follow_links: Whether links may lead outside; None: there is no such option to name.
        option: The option that names the folder, for messages.
    """

    def __init__(self, folder: Path, *, check: bool, follow_links: bool | None = None, option: str = "--media") -> None:
        self._folder, self._check = f"{option} {folder}", check
        self._follow_links = follow_links
        self._root, self._real_root = Path(os.path.abspath(folder)), folder.resolve()  # noqa: PTH100  # keeps links

    def resolve(self, text: str) -> Path:
        """Return the absolute path of the file that an annotation names.

        Raises:
            CellError: an empty or unsafe path, one that leads outside, or a missing file.
        """
        check_name(text)
        path = Path(os.path.normpath(self._root / text))
        if not (path.is_relative_to(self._root) or path.is_relative_to(self._real_root)):
            raise self._outside()
        if self._check:
            self._look_at(path)
        return path

    def name_of(self, path: Path) -> str:
        """Return a resolved path as it is named relative to the folder, with forward slashes."""
        root = self._root if path.is_relative_to(self._root) else self._real_root
        return path.relative_to(root).as_posix()

    def _look_at(self, path: Path) -> None:
        try:
            target, is_file = path.resolve(), path.is_file()
        except (OSError, RuntimeError):  # a name too long for the file system, or a circle of links
            is_file = False
        if not is_file:
            hint = " (folders are separated by /)" if "\\" in path.name else ""
            raise CellError("missing file", f"an existing file inside {self._folder}{hint}")
        if not self._follow_links and not target.is_relative_to(self._real_root):
            hint = "" if self._follow_links is None else " (a link leads outside: with --follow-links it may)"
            raise CellError("outside the media folder", f"a file inside {self._folder}, links followed{hint}")

    def _outside(self) -> CellError:
        return CellError("outside the media folder", f"a file inside {self._folder}, links followed")


def check_name(text: str) -> None:
    """Refuse what can be no plain file name.

    Raises:
        CellError: empty, not text that UTF-8 can write, or a protocol such as ``concat:``.
    """
    if not text:
        raise CellError("unsafe path", "the name of a media file")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise CellError("unsafe path", "a file name without control or unwritable characters")
    if _PROTOCOL.match(text):
        raise CellError("unsafe path", f"a file name, not a protocol (./{text} if it is one)")
