"""Where a command writes a file that the user named: checked before any work is done for it."""

import os
from pathlib import Path

from ca2st.errors import UserInputError


def require_folder_place(path: Path, option: str) -> None:
    """Refuse a folder that cannot be one: a file has its name, or that of a folder above it.

    Raises:
        UserInputError: as said, or the name is longer than any may be.
    """
    for place in (path, *path.parents):
        try:
            found = place.exists()
        except OSError as error:
            raise UserInputError(f"{option}: expected the name of a folder, found {path}: {error.strerror}") from error
        if found and not place.is_dir():
            raise UserInputError(f"{option}: expected a folder, found the file {place}; choose another name")


def require_writable_place(path: Path, option: str) -> None:
    """Refuse a file that could not get its name at the end.

    Raises:
        UserInputError: the folder is not there or cannot be written to, or `path` is a folder.
    """
    if not path.parent.is_dir():
        raise UserInputError(
            f"{option}: expected a file in a folder that exists, found no {path.parent}; make it first"
        )
    if path.is_dir():
        raise UserInputError(f"{option}: expected the name of a file, found the folder {path}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserInputError(f"{option}: expected a folder that can be written to, found {path.parent}; name another")
