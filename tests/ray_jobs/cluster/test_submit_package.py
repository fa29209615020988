"""The wheel that ``ca2st submit`` sends, and the archive it travels in."""

import os
import subprocess
import sys
import zipfile
from importlib import metadata
from io import BytesIO
from pathlib import Path

import pytest

from ca2st.errors import EnvironmentFault, UserInputError
from ray_jobs.cluster import package as wheels
from ray_jobs.cluster.package import payload, read_wheel, recipe_place


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Of the sources under test, built once."""
    return wheels.project_wheel(tmp_path_factory.mktemp("cache"))


def files_of(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(BytesIO(archive)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def test_the_wheel_holds_the_packages_with_their_data_and_nothing_else(wheel: bytes) -> None:
    files = files_of(wheel)
    assert {name.split("/")[0] for name in files} == {
        "ca2st",
        "sharding",
        "pipelines",
        "ray_jobs",
        f"ca2st-{metadata.version('ca2st')}.dist-info",
    }
    checkout = Path(__file__).parents[3]
    folders = [checkout / "ray_jobs" / name for name in ("recipes", "cluster", "pages/page_files")]
    shipped = {str(path.relative_to(checkout)) for folder in folders for path in folder.iterdir() if path.is_file()}
    assert shipped <= set(files)
    assert not [name for name in files if "test" in name or name.endswith(".pyc")]


def test_the_wheels_files_run_unpacked_before_an_installed_ca2st(wheel: bytes, tmp_path: Path) -> None:
    with zipfile.ZipFile(BytesIO(wheel)) as archive:
        archive.extractall(tmp_path / "unpacked")
    (tmp_path / "unpacked" / "ca2st" / "__init__.py").write_text('__version__ = "of the job"\n')
    done = subprocess.run(
        [sys.executable, "-m", "ray_jobs.cli", "--version"],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "unpacked")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "of the job\n"), done.stderr


def test_unchanged_sources_are_not_built_again_and_changed_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "__init__.py").write_text("")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text("")
    built: list[set[str]] = []

    def build(sources: dict[str, Path]) -> bytes:
        built.append(set(sources))
        return b"wheel %d" % len(built)

    monkeypatch.setattr(wheels, "_build", build)
    cache = tmp_path / "cache"
    assert wheels.built(tmp_path, cache) == wheels.built(tmp_path, cache) == b"wheel 1"
    (tmp_path / "one" / "new.py").write_text("x = 1")
    assert wheels.built(tmp_path, cache) == b"wheel 2"
    assert built == [{"one/__init__.py"}, {"one/__init__.py", "one/new.py"}]
    for number in range(9):
        (tmp_path / "one" / "new.py").write_text(f"x = {number}")
        wheels.built(tmp_path, cache)
    assert len(list((cache / "wheels").iterdir())) == 5


def test_a_build_that_fails_tells_what_it_said(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "ca2st"\n')
    with pytest.raises(EnvironmentFault, match=r"--wheel FILE.*--no-package(.|\n)*version"):
        wheels.built(tmp_path, tmp_path / "cache")


def test_an_installed_ca2st_is_packed_again_without_what_its_installer_wrote(wheel: bytes, tmp_path: Path) -> None:
    with zipfile.ZipFile(BytesIO(wheel)) as archive:
        archive.extractall(tmp_path)
    info = tmp_path / f"ca2st-{metadata.version('ca2st')}.dist-info"
    (info / "INSTALLER").write_text("pip")
    with (info / "RECORD").open("a") as record:
        record.write(f"../../../bin/ca2st,,\n{info.name}/INSTALLER,,\nca2st/__pycache__/errors.cpython-311.pyc,,\n")
    again = wheels.repacked(metadata.Distribution.at(info))
    before, after = files_of(wheel), files_of(again)
    listed = {line.split(",")[0] for line in after[f"{info.name}/RECORD"].decode().splitlines()}
    assert listed == set(after)
    for files in (before, after):
        del files[f"{info.name}/RECORD"]
    assert before == after
    (tmp_path / "ca2st" / "errors.py").unlink()
    with pytest.raises(EnvironmentFault, match=r"errors\.py is not there: install it again"):
        wheels.repacked(metadata.Distribution.at(info))


def test_what_lies_beside_installed_packages_is_no_checkout(tmp_path: Path) -> None:
    assert wheels.is_checkout(Path(__file__).parents[3])
    assert not wheels.is_checkout(tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\n')
    assert not wheels.is_checkout(tmp_path)


def test_the_same_job_is_the_same_archive_and_holds_recipe_and_wheel(wheel: bytes) -> None:
    place = recipe_place("recipes/tiny.toml")
    archive = payload(recipe_place=place, recipe_text="name = 'tiny'", wheel=wheel)
    assert archive == payload(recipe_place=place, recipe_text="name = 'tiny'", wheel=wheel)
    files = files_of(archive)
    assert files.pop("submitted_recipe/tiny.toml") == b"name = 'tiny'"
    assert files == files_of(wheel)
    assert set(files_of(payload(recipe_place=recipe_place("smoke"), recipe_text="", wheel=None))) == {
        "submitted_recipe/smoke.toml"
    }


def test_a_wheel_of_something_else_is_refused(tmp_path: Path, wheel: bytes) -> None:
    ours = tmp_path / "ca2st-0.1.0-py3-none-any.whl"
    ours.write_bytes(wheel)
    assert read_wheel(ours) == wheel
    other = tmp_path / "other-1.0-py3-none-any.whl"
    other.write_bytes(wheels.zipped({"other-1.0.dist-info/METADATA": b""}))
    with pytest.raises(UserInputError, match=r"expected ca2st-VERSION.*found a wheel of other-1\.0\.dist-info"):
        read_wheel(other)
    other.write_bytes(b"no zip")
    with pytest.raises(UserInputError, match="found no zip archive"):
        read_wheel(other)
    with pytest.raises(UserInputError, match="found no such file"):
        read_wheel(tmp_path / "none.whl")
