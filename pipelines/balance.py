"""Class-balanced sampling: how often a pass reads each sample, so that rare classes are seen more.

A pass of N samples over classes of n_c samples gives class c the quota Q_c, a whole number that never changes:

=================  =======================================================================================
``none``           Q_c = n_c
``sqrt``           Q_c = N * sqrt(n_c) / sum of sqrt(n_k)
``full``           Q_c = N / number of classes that have samples
``repeat_factor``  Q_c = n_c * max(1, sqrt(threshold / (n_c / N))): rare classes more, none less; longer than N
=================  =======================================================================================

Source: ``full`` and ``sqrt`` are class-balanced and square-root sampling of Kang et al., "Decoupling Representation
and Classifier for Long-Tailed Recognition" (ICLR 2020), made exact; ``repeat_factor`` is repeat factor sampling of
Gupta et al., "LVIS" (CVPR 2019), with the number of repeats of a class instead of each sample's rounded.

Each sample of class c is read floor(Q_c / n_c) times, and Q_c mod n_c of them, drawn anew every pass, once more: sample
number j of the class sits at place (a * j + b) mod n_c, with keyed a (without a common divisor with n_c) and b, and the
first Q_c mod n_c places are read once more. So every sample of a class has the same chance in every pass.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ca2st.errors import UserInputError
from pipelines.choices import require_one_of
from pipelines.keyed_random import Key, raw_words
from pipelines.quotas import apportion

BalanceRule = Literal["none", "sqrt", "full", "repeat_factor"]
_CHUNK = 1 << 18
_SQRT_BITS = 40
"""Square roots are compared as whole numbers of this many binary digits behind the point."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceConfig:
    """How often classes are read in training; the module's text has the formulas."""

    rule: BalanceRule = "none"
    """``none``: as often as they occur. ``sqrt``: by the square root of it. ``full``: all alike. ``repeat_factor``:
    those rarer than `threshold` more often."""
    target: str | None = None
    """The label space that is balanced; None: the first target."""
    threshold: float = 0.001
    """``repeat_factor``: the part of all samples below which a class is rare; LVIS uses 0.001."""

    def __post_init__(self) -> None:
        require_one_of("balance.rule", self.rule, get_args(BalanceRule))
        if not 0 < self.threshold <= 1:
            raise UserInputError(f"balance.threshold: expected a part of all samples, 0 to 1, found {self.threshold}")
        if self.target is not None and self.rule == "none":
            raise UserInputError(
                f"balance.target: expected a balance.rule beside it, found {self.target!r} and rule 'none', which "
                "balances nothing; choose a rule or remove it"
            )


def class_quotas(counts: NDArray[np.int64], config: BalanceConfig) -> NDArray[np.int64]:
    """Readings of each class in a pass, for classes of `counts` samples; a class without samples gets none."""
    sizes: list[int] = counts.tolist()
    total = sum(sizes)
    if config.rule == "none":
        return counts
    if config.rule == "repeat_factor":
        threshold = Fraction(repr(config.threshold))
        wanted = [size * total * threshold for size in sizes]  # its square root, rounded to the nearest
        return np.array([max(n, (math.isqrt(math.floor(4 * x)) + 1) // 2) for n, x in zip(sizes, wanted, strict=True)])
    if config.rule == "sqrt":
        return np.array(apportion([math.isqrt(size << 2 * _SQRT_BITS) for size in sizes], total))
    return np.array(apportion([int(size > 0) for size in sizes], total))


class ClassBalance:
    """How often a pass reads each sample of one source. Memory: two or four bytes a sample, and one more a pass."""

    def __init__(self, classes: NDArray[np.integer], config: BalanceConfig) -> None:
        """`classes`: the label of every sample in stored order."""
        self._classes = classes
        self._sizes = np.bincount(classes) if len(classes) else np.zeros(1, np.int64)
        self._quotas = class_quotas(self._sizes, config)
        self.num_readings = int(self._quotas.sum())
        """Readings of a pass: the same in every pass."""
        self.most_readings = int(max((-(-self._quotas // np.maximum(self._sizes, 1))).max(), 1))
        """No pass reads a sample more often."""

    def readings(self, key: Key) -> NDArray[np.integer]:
        """How often the pass named by `key` reads each sample."""
        steps, offsets = self._places(key)
        divisors = np.maximum(self._sizes, 1)
        least, more = np.divmod(self._quotas, divisors)
        readings = np.empty(len(self._classes), np.min_scalar_type(self.most_readings))
        seen = np.zeros_like(self._sizes)
        for start in range(0, len(readings), _CHUNK):
            classes = self._classes[start : start + _CHUNK].astype(np.int64)
            numbers, found = _numbers_in_class(classes, len(seen))
            places = (steps[classes] * (seen[classes] + numbers) + offsets[classes]) % divisors[classes]
            readings[start : start + _CHUNK] = least[classes] + (places < more[classes])
            seen += found
        return readings

    def _places(self, key: Key) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The keyed factor and offset of every class."""
        words = raw_words(key, 2 * len(self._sizes)).reshape(2, -1)
        sizes = np.maximum(self._sizes, 1).astype(np.uint64)
        steps, offsets = (words % sizes).astype(np.int64)
        pairs = zip(steps.tolist(), self._sizes.tolist(), strict=True)
        return np.array([_next_coprime(step, size) for step, size in pairs]), offsets


def _numbers_in_class(classes: NDArray[np.int64], num_classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each sample's number among those of its class here, and how many each class has here."""
    found = np.bincount(classes, minlength=num_classes)
    order = np.argsort(classes, kind="stable")
    numbers = np.empty_like(classes)
    numbers[order] = np.arange(len(classes)) - np.repeat(np.cumsum(found) - found, found)
    return numbers, found


def _next_coprime(number: int, size: int) -> int:
    """The first of number, number + 1, ... (beyond `size` from 1 again) without a common divisor with `size`."""
    while size > 1 and math.gcd(number, size) != 1:
        number = number % size + 1
    return number
