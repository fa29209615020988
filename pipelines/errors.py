"""Errors of the loader, and the check of a choice by name.

Errors of the data pipeline; exit codes come from `ca2st.errors`.

A choice by name, refused with the known names.
"""

from collections.abc import Sequence

from ca2st.errors import CA2STError, DataDamageError, EnvironmentFault, UserInputError, did_you_mean

REMEDY = "restore it from a copy or convert it again; `ca2st shard verify` lists all damage"
"""What to do about a `ShardSetDamageError`."""


class PlanError(UserInputError):
    """No order can be made of these samples, batch, lanes and ranks; the message holds the numbers."""


class ShardSetDamageError(DataDamageError):
    """Files of a shard set are missing or are not what its shard table says."""


class SampleDamageError(DataDamageError):
    """Bytes of one sample are not those its index names; the message holds shard, key, offset and what to do."""


class LoaderClosedError(CA2STError):
    """A closed loader was asked for batches: a fault of the calling code."""


class LoaderStalledError(EnvironmentFault):
    """A thread of the loader hangs or is gone: storage or decoder; the message names the stage and the sample."""


class QuarantineBudgetError(DataDamageError):
    """More samples are damaged than the quarantine's budget allows; names some."""


def require_one_of(name: str, value: str, known: Sequence[str]) -> None:
    """Refuse a `value` of the setting `name` that is not among `known`.

    Raises:
        UserInputError: lists the known names, and the nearest one where one is near.
    """
    if value not in known:
        hint = did_you_mean(value, [*known])
        raise UserInputError(f"{name}: expected one of {', '.join(known)}, found {value!r}{hint}")
