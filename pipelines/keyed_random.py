"""Random numbers that are a function of a key alone: no state to save, none to lose. And whole-number shares.

The key, a tuple of strings and whole numbers, is hashed (BLAKE2b, 128 bits) into the key of a Philox counter
generator whose raw 64-bit words are read from counter zero. Only the raw words are used: NumPy promises that
they never change, while it may change the methods built on them (`integers`, `permutation`, ...).
"""

import hashlib
import threading
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import PlanError

Key = tuple[str | int, ...]
_COUNTER_ZERO = np.zeros(4, dtype=np.uint64)
_USED_UP = 4
"""Words of a Philox block: none of the buffered ones is left."""
_FEW = 32
"""Up to so many words are read one by one: NumPy gives the interpreter away before it fills an array, and to have it
back from another thread takes far longer than the words."""


class _Generator(threading.local):
    """One generator per thread, set to another key for every stream: a new one would ask the system for entropy."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(key=0)


_GENERATOR = _Generator()


def raw_words(key: Key, count: int) -> NDArray[np.uint64]:
    """Return the first `count` 64-bit words of the stream named by `key`."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
    _GENERATOR.philox.state = {
        "bit_generator": "Philox",
        "state": {"counter": _COUNTER_ZERO, "key": np.frombuffer(digest, "<u8")},
        "buffer": _COUNTER_ZERO,
        "buffer_pos": _USED_UP,
        "has_uint32": 0,
        "uinteger": 0,
    }
    next_word = _GENERATOR.philox.random_raw
    words: NDArray[np.uint64]
    words = next_word(count) if count > _FEW else np.array([next_word() for _ in range(count)], dtype=np.uint64)
    return words


def uniforms(key: Key, count: int) -> NDArray[np.float64]:
    """Return `count` numbers in [0, 1) with 53 random bits each."""
    return (raw_words(key, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(key: Key, count: int) -> NDArray[np.int64]:
    """Return a random order of 0 .. count-1: the stable ranking of `count` random words."""
    return np.argsort(raw_words(key, count), kind="stable")


_MOST_BLOCK, _LEAST_BLOCK = 1024, 64


def apportion(weights: Sequence[int], total: int) -> list[int]:
    """Split `total` in proportion to `weights`: each share rounded down, the rest to the largest remainders.

    Ties go to the earlier weight. Source: Hamilton's method of apportionment.
    """
    whole = sum(weights)
    shares = [total * weight // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % whole), i))
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares


def block_quotas(weights: Sequence[float]) -> NDArray[np.int64]:
    """Return the slots of each source in one block of the mixture, whose length is their sum: 64 to 1024.

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
