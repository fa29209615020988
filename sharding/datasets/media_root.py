"""File names from annotations, resolved under the media folder and never outside it."""

import os
import re
import unicodedata
from pathlib import Path

from sharding.datasets.table import CellError

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
        """The absolute path of the file that an annotation names.

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
        """A resolved path as it is named relative to the folder, with forward slashes."""
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
