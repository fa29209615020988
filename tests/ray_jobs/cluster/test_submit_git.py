"""A submitted job knows the commit it was sent from, although no checkout is where it runs."""

import subprocess
from pathlib import Path

import pytest

from ca2st.errors import UserInputError
from ray_jobs import environment
from ray_jobs.cluster import submission
from ray_jobs.cluster.submission import Choices, prepared
from support.tiny_runs import RECIPE


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clean repository with a recipe."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "tiny.toml").write_text(RECIPE.format(root="/shared"))
    git(folder, "init")
    git(folder, "add", "tiny.toml")
    git(folder, "commit", "-m", "first")
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Where a job runs: no checkout."""
    folder = tmp_path / "working_dir"
    folder.mkdir()
    return folder


def variables(checkout: Path, **choices: object) -> dict[str, str]:
    """Of the job that is sent from `checkout`."""
    named = {"out": Path("/shared/run"), "variables": {}} | choices
    job = prepared(Choices(recipe=str(checkout / "tiny.toml"), **named))  # type: ignore[arg-type]  # its fields
    return dict(job.env_vars)


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch, checkout: Path) -> None:
    """The command is given in the checkout."""
    monkeypatch.chdir(checkout)
    monkeypatch.delenv("CA2ST_GIT", raising=False)


@pytest.mark.parametrize("dirty", ["false", "true"])
def test_the_job_has_the_commit_of_the_checkout_it_was_sent_from_and_whether_it_was_changed(
    checkout: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, dirty: str
) -> None:
    if dirty == "true":
        (checkout / "new.txt").touch()
    expected = {"git.commit": git(checkout, "rev-parse", "HEAD"), "git.dirty": dirty}
    sent = variables(checkout)
    assert environment.git_state(elsewhere) == {}
    for name, value in sent.items():
        monkeypatch.setenv(name, value)
    assert environment.git_state(elsewhere) == expected


def test_a_checkout_is_asked_before_the_variable(
    checkout: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CA2ST_GIT", f"{'a' * 40} true")
    assert environment.git_state(elsewhere) == {"git.commit": "a" * 40, "git.dirty": "true"}
    assert environment.git_state(checkout) == {"git.commit": git(checkout, "rev-parse", "HEAD"), "git.dirty": "false"}


def test_nothing_is_told_of_a_package_that_does_not_come_from_here(
    checkout: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "CA2ST_GIT" in variables(checkout)
    assert "CA2ST_GIT" not in variables(checkout, package=False)
    monkeypatch.setattr(submission, "checked_wheel", lambda path: path)
    assert "CA2ST_GIT" not in variables(checkout, wheel=Path("other.whl"))
    monkeypatch.chdir(elsewhere)
    assert "CA2ST_GIT" not in variables(checkout)


def test_a_cleanliness_that_git_does_not_tell_is_left_out(
    checkout: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = environment._git
    monkeypatch.setattr(
        environment, "_git", lambda folder, *words: None if "status" in words else asked(folder, *words)
    )
    commit = {"git.commit": git(checkout, "rev-parse", "HEAD")}
    assert environment.git_state(checkout) == commit
    monkeypatch.setenv("CA2ST_GIT", variables(checkout)["CA2ST_GIT"])
    assert environment.git_state(elsewhere) == commit


@pytest.mark.parametrize("told", ["main", f"{'a' * 40} maybe", f"https://me:hunter2@host/{'a' * 40}"])
def test_a_variable_that_tells_no_commit_is_refused_and_not_repeated(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    monkeypatch.setenv("CA2ST_GIT", told)
    with pytest.raises(UserInputError, match="CA2ST_GIT: expected a commit and true or false") as refusal:
        environment.git_state(elsewhere)
    assert told not in str(refusal.value)
