"""Errors of the loader; exit codes come from `ca2st.errors`."""

from ca2st.errors import CA2STError, DataDamageError, EnvironmentFault, UserInputError

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
