"""What the user asked a dataset reader for."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ca2st.errors import UserInputError
from sharding.settings import RejectBudget
from sharding.synthetic.config import SyntheticConfig

_SPLIT = re.compile(r"[a-z0-9_-]{1,40}")
_MOST_NAMED = 5
_Item = TypeVar("_Item")


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
    """``csv`` and ``folder``: the class names in label order, one a line. Without it they follow from the labels."""
    follow_links: bool = False
    """``csv`` and ``folder``: whether links may lead outside `media`."""
    max_missing: RejectBudget = field(default_factory=RejectBudget)
    """How many samples may have no media file: public sets lose videos every year, which is not damage."""
    task: str | None = None
    """``synthetic`` only: the label space to learn."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """``synthetic`` only: how much of which world."""
    progress: Callable[[int, int], None] | None = None
    """``synthetic`` only: called with (clips made, clips in all) while they are made."""

    def __post_init__(self) -> None:
        if not _SPLIT.fullmatch(self.split):
            raise UserInputError(f"--split: expected 1 to 40 of a-z, 0-9, _ and -, found {self.split!r}")
        if self.limit is not None and self.limit < 1:
            raise UserInputError(f"--limit: expected at least 1, found {self.limit}")

    def require_few_missing(self, missing: Sequence[str], *, total: int) -> None:
        """Refuse more samples without a file than `max_missing` allows; `missing` holds their ids.

        Raises:
            UserInputError: with the first of them.
        """
        if missing and not self.max_missing.allows(len(missing), total):
            named = ", ".join(missing[:_MOST_NAMED]) + (", ..." if len(missing) > _MOST_NAMED else "")
            share = math.ceil(1000 * len(missing) / total) / 10
            raise UserInputError(
                f"--media {self.media}: expected a file for each of {total} samples, found none for {len(missing)} "
                f"({named}); fetch them, or leave them out with --max-missing {share:g}%"
            )

    def first(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """The first `limit` of `items`, or all."""
        return items[: self.limit]


def needed_annotations(request: DatasetRequest, dataset: str, *, what: str) -> Path:
    """The annotation file; `what` says which file of the dataset it is.

    Raises:
        UserInputError: none was given.
    """
    if request.annotations is None:
        raise UserInputError(f"--dataset {dataset}: expected --annotations, found none; pass {what}")
    return request.annotations


def needed_media(request: DatasetRequest, dataset: str, *, what: str) -> Path:
    """The media folder; `what` says what it holds.

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
