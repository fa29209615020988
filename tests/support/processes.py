"""What a test's child process needs in its environment."""

import os
from pathlib import Path


def python_path() -> str:
    """PYTHONPATH of a child: the project before the tests, whose folders are named like its packages."""
    tests = Path(__file__).parents[1]
    return os.pathsep.join((str(tests.parent), str(tests)))


def environment_without_ray() -> dict[str, str]:
    """The variables of this process but those that a Ray in it has set: with them another Ray's nodes do not start."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
