"""The package that a job carries.

A wheel of the ca2st that runs here: built from its checkout, or packed again from its installed files.

The same sources give the same bytes, so an unchanged project is neither built nor sent twice.

What travels with a job: one archive that Ray unpacks on every node as the job's working directory.

Ray would install a wheel among its `py_modules` by pip with everything it depends on, torch too, and would know it
by its file name only. A wheel of pure Python needs no installing: unpacked where Ray starts the processes, and on
their PYTHONPATH, it goes before a ca2st of the cluster's image. Ray names the archive by a hash of its bytes and does
not send one again that it has. So the wheel travels inside the working directory, never beside it.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Mapping
from importlib import metadata
from io import BytesIO
from pathlib import Path, PurePosixPath

from ca2st.durable import write_bytes
from ca2st.errors import EnvironmentFault, UserInputError

PROJECT = "ca2st"
_PROJECT_FILES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE")
_WRITTEN_BY_INSTALLERS = ("INSTALLER", "REQUESTED", "RECORD", "direct_url.json", "uv_build.json", "uv_cache.json")
_OLDEST_TIME_OF_A_ZIP = (1980, 1, 1, 0, 0, 0)
_BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
_KEPT_WHEELS = 5


def project_wheel(cache_folder: Path) -> bytes:
    """The wheel of the ca2st that runs here: of a checkout, built from the sources as they are now.

    Raises:
        EnvironmentFault: it cannot be made; the message ends with what the build said.
    """
    import ca2st

    root = Path(ca2st.__file__).resolve().parents[1]
    if is_checkout(root):
        return built(root, cache_folder)
    # Looked up beside the running code: metadata of another ca2st may come first on the path.
    for installed in metadata.distributions(name=PROJECT, path=[str(root)]):
        return repacked(installed)
    raise EnvironmentFault(
        f"{root}: expected a checkout or an installed {PROJECT} here, found neither; give a wheel by --wheel FILE"
    )


def is_checkout(root: Path) -> bool:
    """Whether `root` holds the project's sources, not an installation."""
    path = root / "pyproject.toml"
    if not path.is_file():
        return False
    name: object = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {}).get("name")
    return name == PROJECT


def built(checkout: Path, cache_folder: Path) -> bytes:
    """The wheel of a checkout, kept in `cache_folder` under a hash of what it is built from."""
    sources = {path.relative_to(checkout).as_posix(): path for path in _sources(checkout)}
    folder = cache_folder / "wheels"
    kept = folder / f"{_hash_of(sources)}.whl"
    if kept.is_file():
        os.utime(kept)
        return kept.read_bytes()
    wheel = _build(sources)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(kept, wheel)
    for old in sorted(folder.glob("*.whl"), key=lambda path: path.stat().st_mtime, reverse=True)[_KEPT_WHEELS:]:
        old.unlink(missing_ok=True)
    return wheel


def _sources(checkout: Path) -> Iterable[Path]:
    """What a wheel is built from: the project's own files, and the folders that are packages."""
    yield from (checkout / name for name in _PROJECT_FILES if (checkout / name).is_file())
    for package in sorted(checkout.iterdir()):
        if (package / "__init__.py").is_file():
            yield from sorted(path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def _hash_of(sources: Mapping[str, Path]) -> str:
    digest = hashlib.sha256(metadata.version("setuptools").encode())
    for name, path in sources.items():
        digest.update(f"\0{name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _build(sources: Mapping[str, Path]) -> bytes:
    """Build in a copy: the checkout gets no build folders, and old ones in it do not get into the wheel."""
    with tempfile.TemporaryDirectory() as name:
        copy, out = Path(name) / "sources", Path(name) / "out"
        for path, source in sources.items():
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy / path)
        out.mkdir()
        done = subprocess.run(
            [sys.executable, "-P", "-c", _BUILD, str(out)], cwd=copy, capture_output=True, text=True, check=False
        )
        wheels = list(out.glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            said = "\n".join((done.stdout + done.stderr).splitlines()[-10:])
            raise EnvironmentFault(
                f"the project's wheel could not be built; setuptools must be installed here, or give a wheel by "
                f"--wheel FILE, or use the cluster's own ca2st by --no-package:\n{said}"
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            return zipped({entry: archive.read(entry) for entry in archive.namelist()})


def repacked(installed: metadata.Distribution) -> bytes:
    """The wheel that an installed distribution came from: its files as they are now, with a RECORD of their own.

    Raises:
        EnvironmentFault: one of its files is gone.
    """
    contents: dict[str, bytes] = {}
    for path in installed.files or ():
        name = path.as_posix()
        if name.startswith("..") or path.suffix == ".pyc" or path.name in _WRITTEN_BY_INSTALLERS:
            continue
        try:
            contents[name] = Path(str(path.locate())).read_bytes()
        except FileNotFoundError as error:
            raise EnvironmentFault(f"{PROJECT} is damaged, {error.filename} is not there: install it again") from error
    info = f"{PROJECT}-{installed.version}.dist-info"
    contents[f"{info}/RECORD"] = _record(contents, f"{info}/RECORD")
    return zipped(contents)


def _record(contents: Mapping[str, bytes], name: str) -> bytes:
    lines = [
        f"{path},sha256={urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}"
        for path, data in sorted(contents.items())
    ]
    return "".join(f"{line}\n" for line in [*lines, f"{name},,"]).encode()


def zipped(contents: Mapping[str, bytes]) -> bytes:
    """A zip archive whose bytes depend on nothing but `contents`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(contents):
            entry = zipfile.ZipInfo(name, date_time=_OLDEST_TIME_OF_A_ZIP)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, contents[name])
    return buffer.getvalue()


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
