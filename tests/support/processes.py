"""What a test's child process needs to import the project and the tests' own modules."""

import os
from pathlib import Path


def python_path() -> str:
    """PYTHONPATH of a child: the project before the tests, whose folders are named like its packages."""
    tests = Path(__file__).parents[1]
    return os.pathsep.join((str(tests.parent), str(tests)))
