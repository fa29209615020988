"""A choice by name, refused with the known names."""

from collections.abc import Sequence

from ca2st.errors import UserInputError, did_you_mean


def require_one_of(name: str, value: str, known: Sequence[str]) -> None:
    """Refuse a `value` of the setting `name` that is not among `known`.

    Raises:
        UserInputError: lists the known names, and the nearest one where one is near.
    """
    if value not in known:
        hint = did_you_mean(value, [*known])
        raise UserInputError(f"{name}: expected one of {', '.join(known)}, found {value!r}{hint}")
