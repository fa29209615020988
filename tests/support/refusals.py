"""Give a configuration a value that its types forbid, past the type checks of the tests."""

import copy
from typing import Any, TypeVar

T = TypeVar("T")


def forced(config: T, **values: Any) -> T:
    """A copy of the dataclass with `values` set unchecked, then its own `__post_init__`, which should refuse them."""
    other = copy.copy(config)
    for name, value in values.items():
        object.__setattr__(other, name, value)
    other.__post_init__()  # type: ignore[attr-defined]  # every configuration has one
    return other
