"""How many steps an epoch has, and which positions of each step are a rank's."""

from pipelines.errors import PlanError
from pipelines.record import Remainder


def count_steps(num_samples: int, global_batch_size: int, *, remainder: Remainder) -> int:
    """Batches of an epoch.

    Raises:
        PlanError: there are no samples, or with ``drop`` fewer than one batch.
    """
    if num_samples < (global_batch_size if remainder == "drop" else 1):
        raise PlanError(
            f"expected at least one batch of samples: global_batch_size {global_batch_size} (remainder {remainder}), "
            f"found {num_samples} samples; convert more data or lower the batch"
        )
    return num_samples // global_batch_size if remainder == "drop" else -(-num_samples // global_batch_size)


def require_enough_samples(*, num_samples: int, global_batch_size: int, world_size: int, remainder: Remainder) -> None:
    """Refuse, before anything starts, a set that cannot feed every rank.

    Raises:
        PlanError: no samples, fewer samples than ranks, or with ``drop`` fewer than one batch; holds the three numbers.
    """
    least = max(1, world_size, global_batch_size if remainder == "drop" else 1)
    if num_samples < least:
        raise PlanError(
            f"too few samples: {num_samples} samples, global_batch_size {global_batch_size}, world_size {world_size}; "
            f"at least {least} samples are needed (remainder {remainder}): convert more data, lower the batch, or use "
            "fewer ranks"
        )


def rank_positions(rank: int, world_size: int, *, global_batch_size: int, keep_pairs: bool) -> range:
    """The positions of a global batch that belong to `rank`: a run, and together all of them, each once.

    With `keep_pairs` (training) positions 2k and 2k+1, the partners of a mixup, stay on one rank: run borders are
    even, and only the last position of an odd batch is without a partner. Without, runs differ by at most one.

    Raises:
        PlanError: the rank is outside the world, or a rank would get nothing.
    """
    unit = 2 if keep_pairs else 1
    num_units = -(-global_batch_size // unit)
    if not 0 <= rank < world_size:
        raise PlanError(f"rank: expected 0 <= rank < world_size {world_size}, found {rank}")
    if num_units < world_size:
        what = "two positions (a mixup pair)" if keep_pairs else "one position"
        raise PlanError(
            f"global_batch_size {global_batch_size} on {world_size} ranks: every rank needs {what}; "
            f"use a global batch of at least {unit * world_size} or fewer ranks"
        )
    first, last = (min(global_batch_size, unit * (edge * num_units // world_size)) for edge in (rank, rank + 1))
    return range(first, last)
