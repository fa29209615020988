"""What a user may choose about parameters and their type, checked before there is a model, or torch to make it."""

from collections.abc import Sequence
from typing import Literal

from ca2st.errors import UserInputError, did_you_mean

Trainable = str | Sequence[str]
"""A set of `TRAINABLE_SETS` by its name, or patterns of whole parameter names."""
TRAINABLE_SETS = ("added", "head", "adapters", "all")
"""`added`: what the method adds to the experts, the published set; `head`: classifiers and last adapters; `adapters`:
the layers' adapters and the head; `all`: every parameter."""
HeldPrecision = Literal["fp32", "bf16"]
ExpertPrecision = Literal["auto", "fp32", "bf16"]


def check_trainable(which: Trainable) -> None:
    """Refuse a name that is no set, and an empty list, before there is a model.

    Raises:
        UserInputError: as said.
    """
    if isinstance(which, str):
        if which not in TRAINABLE_SETS:
            hint = did_you_mean(which, list(TRAINABLE_SETS))
            raise UserInputError(
                f"trainable: expected one of {', '.join(TRAINABLE_SETS)} or a list of patterns of parameter names, "
                f"found {which!r}{hint}"
            )
    elif not which:
        raise UserInputError("trainable: expected at least one pattern of parameter names, found an empty list")


def check_expert_precision(wanted: ExpertPrecision, *, training: HeldPrecision) -> None:
    """Refuse experts in bfloat16 beside float32 computation, which cannot read them.

    Raises:
        UserInputError: as said.
    """
    if wanted == "bf16" and training == "fp32":
        raise UserInputError(
            'experts.precision: "bf16" is read under bfloat16 autocast only, found training.precision = "fp32"; '
            'set training.precision = "bf16", or experts.precision = "auto"'
        )
