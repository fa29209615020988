"""What the programs share."""

import shlex
from collections.abc import Sequence


def make_command(target: str, arguments: Sequence[str]) -> str:
    """Return the command that runs a program again: ``make bench-convert ARGS="--clips 8"``."""
    return f"make {target}" + (f" ARGS={shlex.quote(shlex.join(arguments))}" if arguments else "")
