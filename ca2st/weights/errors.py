"""Errors of reading and writing weights."""

from ca2st.errors import DataDamageError, UserInputError


class WeightsMismatchError(UserInputError):
    """Weights that do not fit the model: tensors missing, left over, of another shape or at odds with each other."""


class ForeignFileRefusedError(UserInputError):
    """A foreign checkpoint that is not read: it asks for code, for too much, or is no checkpoint at all."""


class WeightsDamageError(DataDamageError):
    """A weights file that is not what was written."""
