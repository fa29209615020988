"""Errors of the loader, and the checks of its settings; exit codes come from `ca2st.errors`."""

import math

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


class DecoderMemoryError(EnvironmentFault):
    """Memory did not suffice to decode a run of clips, which are not to blame."""

    def __init__(self, backend: str, *, num_clips: int) -> None:
        super().__init__(
            f"backend {backend}: out of memory while decoding {num_clips} clips; lower training.per_device_batch_size, "
            "data.loader.prefetch_steps or data.loader.decode_threads, set data.loader.decode_on = 'cpu', or convert "
            "with a smaller --short-side"
        )


class QuarantineBudgetError(DataDamageError):
    """More samples are damaged than the quarantine's budget allows; names some."""


def check_range(settings: object, section: str, *names: str, low: int, high: int | None = None) -> None:
    """Raise `UserInputError` for a setting outside `low` to `high`, by its name in `section`; None is none."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not (low <= value and (high is None or value <= high)):
            expected = f"at least {low}" if high is None else f"{low}..{high}"
            raise UserInputError(f"{section}{name}: expected {expected}, found {value}")


def check_intervals(settings: object, section: str, *names: str) -> None:
    """Raise `UserInputError` for pairs that are no interval of positive numbers."""
    for name in names:
        low, high = getattr(settings, name)
        if not 0 < low <= high < math.inf:
            raise UserInputError(f"{section}{name}: expected 0 < low <= high, both finite, found ({low}, {high})")
