"""What travels with a job: one archive that Ray unpacks on every node as the job's working directory.

Ray would install a wheel among its `py_modules` by pip with everything it depends on, torch too, and would know it
by its file name only. A wheel of pure Python needs no installing: unpacked where Ray starts the processes, and on
their PYTHONPATH, it goes before a ca2st of the cluster's image. Ray names the archive by a hash of its bytes and does
not send one again that it has. So the wheel travels inside the working directory, never beside it.
"""

import zipfile
from io import BytesIO
from pathlib import Path, PurePosixPath

from ca2st.errors import UserInputError
from ray_jobs.submit.wheel import PROJECT, zipped

_RECIPE_FOLDER = "submitted_recipe"


def recipe_place(recipe: str) -> str:
    """Where the recipe lies in the working directory: under its own name, which messages then show."""
    name = Path(recipe).name
    return f"{_RECIPE_FOLDER}/{name if name.endswith('.toml') else f'{name}.toml'}"


def payload(*, recipe_place: str, recipe_text: str, wheel: bytes | None) -> bytes:
    """The working directory as a zip archive: the recipe as it was written, and the wheel's files unless None."""
    contents = {recipe_place: recipe_text.encode()}
    if wheel is not None:
        with zipfile.ZipFile(BytesIO(wheel)) as archive:
            contents |= {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    return zipped(contents)


def read_wheel(path: Path) -> bytes:
    """A wheel that the user gives.

    Raises:
        UserInputError: it is no wheel of ca2st for every machine.
    """
    if not path.is_file():
        raise UserInputError(f"--wheel {path}: expected a wheel of {PROJECT}, found no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise UserInputError(f"--wheel {path}: expected a wheel of {PROJECT}, found no zip archive") from error
    infos = {PurePosixPath(name).parts[0] for name in names if ".dist-info/" in name}
    if not any(info.startswith(f"{PROJECT}-") for info in infos) or not path.name.endswith("-none-any.whl"):
        found = ", ".join(sorted(infos)) or "none"
        raise UserInputError(f"--wheel {path}: expected {PROJECT}-VERSION-py3-none-any.whl, found a wheel of {found}")
    return path.read_bytes()
