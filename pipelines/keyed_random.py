"""Random numbers that are a function of a key alone: no state to save, none to lose.

The key, a tuple of strings and whole numbers, is hashed (BLAKE2b, 128 bits) into the key of a Philox counter
generator whose raw 64-bit words are read from counter zero. Only the raw words are used: NumPy promises that
they never change, while it may change the methods built on them (`integers`, `permutation`, ...).
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

Key = tuple[str | int, ...]


def raw_words(key: Key, count: int) -> NDArray[np.uint64]:
    """The first `count` 64-bit words of the stream named by `key`."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
    words: NDArray[np.uint64] = np.random.Philox(key=np.frombuffer(digest, "<u8")).random_raw(count)
    return words


def uniforms(key: Key, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) with 53 random bits each."""
    return (raw_words(key, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(key: Key, count: int) -> NDArray[np.int64]:
    """A random order of 0 .. count-1: the stable ranking of `count` random words."""
    return np.argsort(raw_words(key, count), kind="stable")
