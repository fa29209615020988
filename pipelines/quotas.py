"""Whole-number shares of a whole number: exact, and the same on every machine."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import PlanError

_MOST_BLOCK, _LEAST_BLOCK = 1024, 64


def apportion(weights: Sequence[int], total: int) -> list[int]:
    """`total` split in proportion to `weights`: each share rounded down, the rest to the largest remainders.

    Ties go to the earlier weight. Source: Hamilton's method of apportionment.
    """
    whole = sum(weights)
    shares = [total * weight // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % whole), i))
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares


def block_quotas(weights: Sequence[float]) -> NDArray[np.int64]:
    """Slots of each source in one block of the mixture, whose length is their sum: 64 to 1024.

    Weights are read as the decimals they are written as. Where a block of at most 1024 can hold their exact ratio it
    does; else they are rounded to 1024ths.

    Raises:
        PlanError: a weight is not positive, or so small that it gets no slot of a block.
    """
    wrong = [weight for weight in weights if not 0 < weight < float("inf")]
    if wrong:
        raise PlanError(f"mixture weights: expected numbers > 0, found {wrong[0]}; leave a set out to read none of it")
    ratios = [Fraction(repr(float(weight))) for weight in weights]
    scale = np.lcm.reduce([ratio.denominator for ratio in ratios], dtype=object)
    exact = [int(ratio * scale) for ratio in ratios]
    divisor = int(np.gcd.reduce(exact, dtype=object))
    exact = [share // divisor for share in exact]
    if sum(exact) > _MOST_BLOCK:
        quotas = apportion(exact, _MOST_BLOCK)
    else:
        quotas = [share * max(1, _LEAST_BLOCK // sum(exact)) for share in exact]
    if min(quotas) < 1:
        raise PlanError(
            f"mixture weights: expected at least 1/{_MOST_BLOCK} of their sum each, found {list(weights)}; "
            "raise the smallest"
        )
    return np.array(quotas, dtype=np.int64)
