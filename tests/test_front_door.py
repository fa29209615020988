"""The public names of the four packages, and the README's example as it is written."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.media import Sound, make_clip
from support.processes import python_path
from support.tiny_runs import ca2st, make_tiny_run

PACKAGES = ("ca2st", "sharding", "pipelines", "ray_jobs")
README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there_has_a_docstring_and_a_typo_is_an_attribute_error(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name.startswith("__") or getattr(module, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = module.no_such_name


def test_importing_the_packages_imports_nothing_heavy() -> None:
    script = "import sys, ca2st, sharding, pipelines, ray_jobs; print([n for n in %r if n in sys.modules])"
    heavy = ("torch", "ray", "mlflow", "nvidia", "av", "pyarrow")
    found = subprocess.run([sys.executable, "-c", script % (heavy,)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_example_of_the_readme_runs_as_it_is_written(tmp_path: Path) -> None:
    recipe = make_tiny_run(tmp_path)
    done = ca2st("train", recipe, "--out", tmp_path / "runs" / "my", "--set", "tracking.enabled=false", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    make_clip(tmp_path / "holiday.mp4", sound=Sound())
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    found = subprocess.run(
        [sys.executable, "-"],
        input=example,
        cwd=tmp_path,
        env={"PYTHONPATH": python_path(), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "torch.Size([8, 3, 16, 224, 224])" in found.stdout
    assert found.stdout.count("holiday.mp4") == 1


def test_the_readme_is_read_in_minutes_what_is_longer_is_in_its_package() -> None:
    assert len(README.read_bytes()) <= 10_000


ROOT = README.parent
GUIDES = [
    *sorted(path for package in (*PACKAGES, "tests") for path in (ROOT / package).rglob("*.md")),
    README,
    ROOT / "CONTRIBUTING.md",
]
MADE_BY_READERS = {"sharding/datasets/sound_events.py", "tests/sharding/datasets/test_sound_events.py"}
"""Files that CONTRIBUTING's worked example adds."""


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_readme_leads_somewhere_and_every_module_that_it_names_is_there(guide: Path) -> None:
    text = guide.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text.replace("\n", "")):
        place, _, section = link.partition("#")
        if place.startswith("http"):
            continue
        target = (guide.parent / place).resolve() if place else guide
        assert target.exists(), link
        assert not section or section in _sections(target), link
    modules = set(re.findall(r"`([\w/]+\.py)`", text)) - MADE_BY_READERS
    folders = [ROOT / package for package in (*PACKAGES, "tests")]
    assert [
        name
        for name in sorted(modules)
        if not (ROOT / name).exists() and not any(any(folder.rglob(name)) for folder in folders)
    ] == []


def _sections(guide: Path) -> set[str]:
    """Return the anchors of a guide's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", guide.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
