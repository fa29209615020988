"""What of ca2st ``ca2st submit`` sends: the packages that run here, or a wheel of the user's."""

import zipfile
from pathlib import Path

import pytest

from ca2st.errors import UserInputError
from ray_jobs.cluster.submission import Choices, PreparedJob, checked_wheel, prepared, send
from support.fake_jobs import FakeJobs
from support.tiny_runs import RECIPE


def job(tmp_path: Path, *, package: bool = True, wheel: Path | None = None) -> PreparedJob:
    (tmp_path / "tiny.toml").write_text(RECIPE.format(root="/shared"))
    recipe, out = str(tmp_path / "tiny.toml"), Path("/shared/run")
    return prepared(Choices(recipe=recipe, out=out, variables={}, package=package, wheel=wheel))


def made_wheel(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return path


def test_the_packages_that_run_here_are_sent_beside_the_recipe(tmp_path: Path) -> None:
    jobs, sent = FakeJobs(), job(tmp_path)
    send(jobs, sent)
    checkout = Path(__file__).parents[3]
    assert sent.modules == tuple(checkout / name for name in ("ca2st", "sharding", "pipelines", "ray_jobs"))
    assert jobs.files == [{"submitted_recipe/tiny.toml": RECIPE.format(root="/shared")}]
    assert {"recipes", "cli.py", "__init__.py"} <= jobs.modules[0]["ray_jobs"]


def test_what_is_sent_is_counted_without_compiled_files(tmp_path: Path) -> None:
    alone = job(tmp_path, package=False)
    assert alone.num_bytes == len(alone.recipe_text)
    wheel = made_wheel(tmp_path / "ca2st-0.1.0-py3-none-any.whl", "ca2st-0.1.0.dist-info/METADATA")
    assert job(tmp_path, wheel=wheel).num_bytes == len(alone.recipe_text) + wheel.stat().st_size
    sources = [path for package in job(tmp_path).modules for path in package.rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in sources if path.suffix != ".pyc")
    assert job(tmp_path).num_bytes == len(alone.recipe_text) + written


def test_a_wheel_is_sent_as_the_packages_in_it_for_ray_would_install_torch_beside_it(tmp_path: Path) -> None:
    names = ("ca2st/__init__.py", "ca2st/errors.py", "ray_jobs/__init__.py", "ca2st-0.1.0.dist-info/METADATA")
    wheel = made_wheel(tmp_path / "ca2st-0.1.0-py3-none-any.whl", *names)
    jobs = FakeJobs()
    send(jobs, job(tmp_path, wheel=wheel))
    assert jobs.modules == [{"ca2st": {"__init__.py", "errors.py"}, "ray_jobs": {"__init__.py"}}]


def test_a_wheel_of_something_else_is_refused(tmp_path: Path) -> None:
    other = made_wheel(tmp_path / "other-1.0-py3-none-any.whl", "other-1.0.dist-info/METADATA")
    with pytest.raises(UserInputError, match=r"expected ca2st-VERSION.*found a wheel of other-1\.0\.dist-info"):
        checked_wheel(other)
    other.write_bytes(b"no zip")
    with pytest.raises(UserInputError, match="found no zip archive"):
        checked_wheel(other)
    with pytest.raises(UserInputError, match="found no such file"):
        checked_wheel(tmp_path / "none.whl")
