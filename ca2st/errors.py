"""The root of every error this project raises on purpose, with the exit code it ends a command with.

::

    CA2STError              1  a fault of ours
    ├── UserInputError      2  something the user gave: a path, a recipe, an annotation row
    ├── DataDamageError     3  damaged data, or more rejects than the budget allows
    ├── EnvironmentFault    4  the machine: disk full, not writable, a missing library or device
    ├── NumericError        5  NaN or infinity where a number was expected
    └── RetriesUsedUpError  6  a run that failed in every attempt

A message says what was expected, what was found, where (file:line, shard, key, frame, rank) and what to do.
Each package derives its own errors from these in its own ``errors`` module.
"""

from collections.abc import Collection, Sequence
from typing import ClassVar, Literal, get_args, get_origin, get_type_hints


class CA2STError(Exception):
    """A fault the project can name; ``exit_code`` is what the command line ends with."""

    exit_code: ClassVar[int] = 1


class UserInputError(CA2STError, ValueError):
    """Something the user gave cannot be used as it is.

    A ValueError too, so that pydantic collects those of a recipe's sections with their paths.
    """

    exit_code: ClassVar[int] = 2


class DataDamageError(CA2STError):
    """Data is damaged, or more samples were rejected than the budget allows."""

    exit_code: ClassVar[int] = 3


class EnvironmentFault(CA2STError):  # noqa: N818  # EnvironmentError is Python's own name for OSError
    """The machine cannot do what was asked: no space, no permission, a missing device."""

    exit_code: ClassVar[int] = 4


class NumericError(CA2STError):
    """A loss, gradient or input stopped being a finite number."""

    exit_code: ClassVar[int] = 5


class RetriesUsedUpError(CA2STError):
    """Every attempt the run was allowed has failed."""

    exit_code: ClassVar[int] = 6


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Refuse a `value` of the setting `name` that is not among `choices`.

    Raises:
        UserInputError: lists the choices, and the nearest one where one is near.
    """
    if value not in choices:
        hint = did_you_mean(str(value), choices)
        raise UserInputError(f"{name}: expected one of {', '.join(choices)}, found {value!r}{hint}")


def listed(items: Sequence[object], *, most: int = 5, count: int | None = None, separator: str = ", ") -> str:
    """Return the first `most` items as text, and how many more there are: ``a, b and 3 more``.

    `count` is the number of all, where `items` are only some of them.
    """
    shown = items[:most]
    more = (len(items) if count is None else count) - len(shown)
    before = " " if separator == ", " else separator
    return separator.join(map(str, shown)) + (f"{before}and {more} more" if more else "")


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest known name, or an empty text when none is near."""
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def check_literals(settings: object, *, prefix: str = "") -> None:
    """Check every field of a settings class that is annotated with a `Literal`; raises as `check_choice`."""
    for name, kind in get_type_hints(type(settings)).items():
        if get_origin(kind) is Literal:
            check_choice(f"{prefix}{name}", getattr(settings, name), get_args(kind))
