"""What the user asked a dataset reader for, and the media folder: files are named inside it and never outside."""

import os
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ca2st.errors import UserInputError
from sharding.datasets.table import CellError
from sharding.errors import AnnotationError
from sharding.settings import RejectBudget
from sharding.synthetic.config import SyntheticConfig

_SPLIT = re.compile(r"[a-z0-9_-]{1,40}")
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


VIDEO_SUFFIXES = frozenset(
    {".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv"}
    | {".ts", ".webm", ".wmv"}
)
"""Endings of the containers that are read, in lower case; files may write them in any case."""

_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class MediaRoot:
    """The folder that media files must lie in, which the option `option` names.

    With `check` files are looked at: they must exist and, links followed, lie inside unless `follow_links`.
    """

    def __init__(self, folder: Path, *, check: bool, follow_links: bool, option: str = "--media") -> None:
        self._inside = f"inside {option} {folder}"
        self._check, self._follow_links = check, follow_links
        self._root, self._real_root = Path(os.path.abspath(folder)), folder.resolve()  # noqa: PTH100  # keeps links

    def resolve(self, text: str) -> Path:
        """Return the absolute path of the file that an annotation names.

        Raises:
            CellError: an empty or unsafe path (control characters, a protocol such as ``concat:``), one that leads
                outside, or a missing file.
        """
        if not text:
            raise CellError("unsafe path", "the name of a media file")
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
            raise CellError("unsafe path", "a file name without control or unwritable characters")
        if _PROTOCOL.match(text):
            raise CellError("unsafe path", f"a file name, not a protocol (./{text} if it is one)")
        path = Path(os.path.normpath(self._root / text))
        if not (path.is_relative_to(self._root) or path.is_relative_to(self._real_root)):
            raise CellError("outside the media folder", f"a file {self._inside}, links followed")
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
            raise CellError("missing file", f"an existing file {self._inside}{hint}")
        if not self._follow_links and not target.is_relative_to(self._real_root):
            hint = " (a link leads outside: with --follow-links it may)"
            raise CellError("outside the media folder", f"a file {self._inside}, links followed{hint}")
