"""Which samples are read and how often: selection, class balance, and the record that a resume compares.

Samples are selected by class, participant or key when a run starts. What is given is combined with "and"; the names
inside one list with "or". `limit` comes last.

Class balance decides how often a pass reads each sample. A pass of N samples over classes of n_c samples gives class c
the quota Q_c, a whole number that never changes:

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

A sample of several labels counts as one of the rarest of them, c, and is read as often as a sample of a class that
occurs in as many samples as c: 1 / n_c (``full``) or 1 / sqrt(n_c) (``sqrt``) in proportion, the pass staying of N
samples, or max(1, sqrt(threshold / (n_c / N))) times, as LVIS defines it for pictures.
"""

import fnmatch
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Literal, get_args

import numpy as np
import xxhash
from numpy.typing import NDArray

from ca2st.errors import UserInputError, check_choice, did_you_mean
from pipelines.errors import PlanError, check_range
from pipelines.keyed_random import Key, apportion, block_quotas, raw_words

_PARTICIPANT = re.compile(r"[A-Za-z0-9]+")
_WILDCARDS = re.compile(r"[*?\[]")
_MOST_NAMES = 1000
"""Keys and participants remembered to name the nearest one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionConfig:
    """A part of the training samples; without settings all of them. The model's classes stay those of the set."""

    classes: tuple[str, ...] = ()
    """Only samples of these classes, by name."""
    target: str | None = None
    """The label space of `classes`; None: the first target."""
    participants: tuple[str, ...] = ()
    """Only samples of these participants, ``P01``: of the EPIC-KITCHENS, EPIC-SOUNDS and HD-EPIC sets, whose keys begin
    with the participant."""
    keys: tuple[str, ...] = ()
    """Only samples whose key matches one of these patterns (``p01_*``; ``*``, ``?`` and ``[...]``)."""
    limit: int | None = None
    """At most so many samples of all sets together: those whose hash of (limit_seed, key) is smallest, hence a random
    part that does not depend on shards, and inside that of any larger limit."""
    limit_seed: int = 0
    """Another part of the same size."""

    def __post_init__(self) -> None:
        check_range(self, "select.", "limit", low=1)
        if not 0 <= self.limit_seed < 1 << 64:
            raise UserInputError(f"select.limit_seed: expected 0 or more and below 2**64, found {self.limit_seed}")
        for field_name in ("classes", "participants", "keys"):
            if "" in getattr(self, field_name):
                raise UserInputError(f"select.{field_name}: expected names, found an empty one; remove it")
        if self.target is not None and not self.classes:
            raise UserInputError(
                f"select.target: expected select.classes beside it, whose label space it names, found {self.target!r} "
                "alone; name the classes or remove it"
            )
        for name in self.participants:
            if not _PARTICIPANT.fullmatch(name):
                raise UserInputError(
                    f"select.participants: expected names of letters and digits such as P01, found {name!r}; "
                    "use select.keys for patterns"
                )

    @property
    def is_everything(self) -> bool:
        """Whether no sample is left out."""
        return not (self.classes or self.participants or self.keys or self.limit)

    @property
    def needs_keys(self) -> bool:
        """Whether keys must be read, not labels alone."""
        return bool(self.participants or self.keys or self.limit)


class SampleSelector:
    """Decides shard by shard; afterwards knows which names matched nothing."""

    def __init__(self, config: SelectionConfig, classes: Sequence[str]) -> None:
        """`classes`: names of the label space that `config.classes` are of.

        Raises:
            UserInputError: a class that is not among them; names the nearest.
        """
        for name in config.classes:
            if name not in classes:
                raise UserInputError(
                    f"data.select.classes: expected names of the {len(classes)} classes, found {name!r}"
                    f"{did_you_mean(name, [*classes])}"
                )
        self._config = config
        self._labels = np.array(sorted(classes.index(name) for name in config.classes), np.int64)
        self._class_names = classes
        self._seen_labels: set[int] = set()
        self._participants = _Patterns(config.participants, [f"{name}[_-]*" for name in config.participants])
        self._keys = _Patterns(config.keys, config.keys)

    def mask(self, keys: Sequence[str] | None, labels: "LabelLists") -> NDArray[np.bool_]:
        """Return which samples of a shard are selected, by any of their labels; `limit` is not looked at."""
        mask = np.ones(len(labels), np.bool_)
        if len(self._labels):
            wanted = np.isin(labels.flat, self._labels)
            mask[:] = False
            mask[labels.rows[wanted]] = True
            self._seen_labels.update(np.unique(labels.flat[wanted]).tolist())
        for patterns in (self._participants, self._keys):
            if patterns.names and keys is not None:
                mask &= np.fromiter((patterns.match(key) for key in keys), np.bool_, len(keys))
        return mask

    def require_matches(self, num_selected: int) -> None:
        """Raise `UserInputError` for a class, participant or pattern that matched nothing, or all nothing together."""
        for label in self._labels.tolist():
            if label not in self._seen_labels:
                raise UserInputError(f"data.select.classes: no sample is of class {self._class_names[label]!r}")
        known = sorted({re.split("[_-]", key, maxsplit=1)[0].upper() for key in self._participants.examples})
        for name in self._participants.unmatched():
            raise UserInputError(
                f"data.select.participants: no key begins with {name!r}{did_you_mean(name, known)}; "
                f"the keys begin with {', '.join(known[:8])}{' ...' if len(known) > 8 else ''}"
            )
        for name in self._keys.unmatched():
            examples = sorted(self._keys.examples)
            starts = sorted({key[: len(name)] for key in examples})
            raise UserInputError(
                f"data.select.keys: no key matches {name!r}{did_you_mean(name.lower(), starts)}; keys look like "
                f"{', '.join(examples[:2])}"
            )
        if not num_selected:
            given = [field.name for field in fields(self._config) if getattr(self._config, field.name)]
            raise UserInputError(f"data.select: no sample matches {' and '.join(given)} together; leave one out")


class _Patterns:
    """Names matched against lower-case keys, and which of them matched at all."""

    def __init__(self, names: Sequence[str], patterns: Sequence[str]) -> None:
        self.names = names
        lower = [pattern.lower() for pattern in patterns]
        self._plain = frozenset(pattern for pattern in lower if not _WILDCARDS.search(pattern))
        self._wild = [
            (pattern, re.compile(fnmatch.translate(pattern))) for pattern in lower if pattern not in self._plain
        ]
        self._of_pattern = dict(zip(lower, names, strict=True))
        self._matched: set[str] = set()
        self.examples: set[str] = set()

    def match(self, key: str) -> bool:
        if len(self.examples) < _MOST_NAMES:
            self.examples.add(key)
        found = [key] if key in self._plain else []
        found += [pattern for pattern, compiled in self._wild if compiled.match(key)]
        self._matched.update(found)
        return bool(found)

    def unmatched(self) -> list[str]:
        return [name for pattern, name in self._of_pattern.items() if pattern not in self._matched]


def key_ranks(keys: Iterable[str], *, limit_seed: int) -> NDArray[np.uint64]:
    """Return the hash by which `limit` ranks each sample."""
    return np.fromiter((xxhash.xxh3_64_intdigest(key.encode(), seed=limit_seed) for key in keys), np.uint64)


def smallest(ranks: NDArray[np.uint64], limit: int) -> NDArray[np.bool_]:
    """Return which `limit` of the ranks are smallest; of equal ones the earlier."""
    mask = np.zeros(len(ranks), np.bool_)
    if limit >= len(ranks):
        return ~mask
    bound = np.partition(ranks, limit - 1)[limit - 1]
    mask[ranks < bound] = True
    ties = np.flatnonzero(ranks == bound)
    mask[ties[: limit - int(mask.sum())]] = True
    return mask


@dataclass(frozen=True, slots=True)
class LabelLists:
    """The labels of some samples in one label space: one each, or any number."""

    flat: NDArray[np.integer]
    """All labels, sample after sample."""
    sizes: NDArray[np.integer]
    """How many each sample has."""

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def rows(self) -> NDArray[np.int64]:
        """Return which sample each of `flat` is of."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def where(self, mask: NDArray[np.bool_]) -> "LabelLists":
        """Return those of the samples that `mask` is true for."""
        return LabelLists(self.flat[np.repeat(mask, self.sizes)], self.sizes[mask])

    def part(self, samples: slice) -> "LabelLists":
        """Return those of consecutive samples."""
        start, stop = (int(self.sizes[: at or 0].sum()) for at in (samples.start, samples.stop))
        return LabelLists(self.flat[start:stop], self.sizes[samples])

    @classmethod
    def joined(cls, parts: Sequence["LabelLists"], kind: type[np.integer]) -> "LabelLists":
        """Return the samples of all parts, their labels as `kind`."""
        flat = np.concatenate([np.empty(0, kind), *(part.flat.astype(kind) for part in parts)])
        return cls(flat, np.concatenate([np.empty(0, np.uint16), *(part.sizes.astype(np.uint16) for part in parts)]))


BalanceRule = Literal["none", "sqrt", "full", "repeat_factor"]
_CHUNK = 1 << 18
_SQRT_BITS = 40
"""Square roots are compared as whole numbers of this many binary digits after the point."""


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
        check_choice("balance.rule", self.rule, get_args(BalanceRule))
        if not 0 < self.threshold <= 1:
            raise UserInputError(f"balance.threshold: expected a part of all samples, 0 to 1, found {self.threshold}")
        if self.target is not None and self.rule == "none":
            raise UserInputError(
                f"balance.target: expected a balance.rule beside it, found {self.target!r} and rule 'none', which "
                "balances nothing; choose a rule or remove it"
            )


def class_quotas(
    counts: NDArray[np.int64], config: BalanceConfig, *, occurrences: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Return the readings of each class in a pass, for classes of `counts` samples; none for an empty class.

    `occurrences`: how many samples a class occurs in, where `counts` are those of which it is the rarest; None: as
    many. Each of the samples is then read as often as a sample of a class that occurs so often.
    """
    sizes: list[int] = counts.tolist()
    total = sum(sizes)
    if config.rule == "none":
        return counts
    occurs = sizes if occurrences is None else [max(1, n) for n in occurrences.tolist()]
    pairs = list(zip(sizes, occurs, strict=True))
    if config.rule == "repeat_factor":
        threshold = Fraction(repr(config.threshold))
        # size * sqrt(total * threshold / occurs), rounded to the nearest
        wanted = [Fraction(n * n, max(1, times)) * total * threshold for n, times in pairs]
        return np.array([max(n, (math.isqrt(math.floor(4 * x)) + 1) // 2) for n, x in zip(sizes, wanted, strict=True)])
    if occurrences is None:
        weights = [math.isqrt(n << 2 * _SQRT_BITS) if config.rule == "sqrt" else int(n > 0) for n in sizes]
    elif config.rule == "sqrt":
        weights = [n * math.isqrt((1 << 2 * _SQRT_BITS) // times) for n, times in pairs]
    else:
        weights = [(n << _SQRT_BITS) // times for n, times in pairs]
    return np.array(apportion(weights, total))


def rarest_classes(labels: LabelLists) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """Return the rarest class of each sample, and how many samples each class occurs in.

    Samples without any label are a class of their own, behind the others. Of equally rare classes the first counts.
    """
    num_classes = int(labels.flat.max()) + 1 if len(labels.flat) else 0
    counts = np.bincount(labels.flat, minlength=num_classes)
    by_rarity = np.lexsort((np.arange(num_classes), counts))
    place = np.empty(num_classes, np.int64)
    place[by_rarity] = np.arange(num_classes)
    rarest = np.full(len(labels), num_classes, np.int64)
    np.minimum.at(rarest, labels.rows, place[labels.flat])
    classes = np.append(by_rarity, num_classes)[rarest]
    return classes.astype(np.min_scalar_type(num_classes)), np.append(counts, (labels.sizes == 0).sum())[
        : int(classes.max(initial=0)) + 1
    ]


class ClassBalance:
    """How often a pass reads each sample of one source. Memory: two or four bytes per sample, and one more per pass."""

    def __init__(self, labels: NDArray[np.integer] | LabelLists, config: BalanceConfig) -> None:
        """`labels`: the label of every sample in stored order, or its labels.

        A sample of several labels is read as often as the rarest of them asks for.
        """
        if isinstance(labels, LabelLists):
            self._classes, counts = rarest_classes(labels)
        else:
            self._classes, counts = labels, None
        self._sizes = np.bincount(self._classes) if len(self._classes) else np.zeros(1, np.int64)
        self._quotas = class_quotas(self._sizes, config, occurrences=counts)
        self.num_readings = int(self._quotas.sum())
        """Readings of a pass: the same in every pass."""
        self.most_readings = int(max((-(-self._quotas // np.maximum(self._sizes, 1))).max(), 1))
        """No pass reads a sample more often."""

    def readings(self, key: Key) -> NDArray[np.integer]:
        """Return how often the pass named by `key` reads each sample."""
        divisors = np.maximum(self._sizes, 1)
        words = raw_words(key, 2 * len(self._sizes)).reshape(2, -1)
        starts, offsets = (words % divisors.astype(np.uint64)).astype(np.int64)
        pairs = zip(starts.tolist(), self._sizes.tolist(), strict=True)
        steps = np.array([_next_coprime(start, size) for start, size in pairs])
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


def _numbers_in_class(classes: NDArray[np.int64], num_classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each sample's number among those of its class here, and how many each class has here."""
    found = np.bincount(classes, minlength=num_classes)
    order = np.argsort(classes, kind="stable")
    numbers = np.empty_like(classes)
    numbers[order] = np.arange(len(classes)) - np.repeat(np.cumsum(found) - found, found)
    return numbers, found


def _next_coprime(number: int, size: int) -> int:
    """Return the first of number, number + 1, ... (beyond `size` from 1 again) that is coprime with `size`."""
    while size > 1 and math.gcd(number, size) != 1:
        number = number % size + 1
    return number


ORDER_VERSION = 1
"""Raised whenever the same record would give another order or other draws."""
Remainder = Literal["drop", "wrap", "pad"]
_MOST_LANES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class SetShare:
    """One shard set of a mixture."""

    fingerprint: str
    """Stands for every byte of the set."""
    weight: float | None
    """Its share of the samples, in parts of the sum of all weights; None: the sets are read as one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRecord:
    """The order is a function of this record, the shard sets it names and the epoch, and of nothing else.

    The number of ranks is absent on purpose: every world size reads the same global order.
    """

    seed: int
    """Keys every permutation and every draw."""
    global_batch_size: int
    """Samples of one step, all ranks together."""
    num_lanes: int
    """Parallel runs through the shards; divides `global_batch_size`."""
    shuffle_block: int
    """Samples that are shuffled together inside a lane; 0: shards and samples in their stored order."""
    remainder: Remainder
    """What becomes of an end that fills no whole batch. ``drop``: left out this epoch. ``wrap``: the batch is filled up
    with the first samples of one more pass. ``pad``: filled up with marked samples that count nowhere (evaluation)."""
    manifest_fingerprint: str
    """Stands for every byte of the shard set, the first one of a mixture."""
    mixture: tuple[SetShare, ...] = ()
    """All sets in order, where there are several."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    repeats: int = 1
    """Readings of each sample in a batch, each with draws of its own (repeated augmentation)."""
    epoch_samples: int | None = None
    """Samples of an epoch, `repeats` not counted; None: those of one pass through everything."""
    version: int = ORDER_VERSION
    """Version of the rules that turn the record into an order."""

    def __post_init__(self) -> None:
        if self.global_batch_size < 1 or self.num_lanes < 1 or self.shuffle_block < 0:
            raise PlanError(
                f"expected global_batch_size >= 1, num_lanes >= 1 and shuffle_block >= 0, found "
                f"{self.global_batch_size}, {self.num_lanes} and {self.shuffle_block}"
            )
        if self.repeats < 1 or (self.epoch_samples is not None and self.epoch_samples < 1):
            raise PlanError(
                f"expected repeats >= 1 and epoch_samples >= 1, found {self.repeats} and {self.epoch_samples}"
            )
        default = default_num_lanes(self.global_batch_size, repeats=self.repeats)
        if self.global_batch_size % self.num_lanes:
            raise PlanError(
                f"num_lanes: expected a divisor of global_batch_size {self.global_batch_size}, found {self.num_lanes}; "
                f"leave it out for {default}"
            )
        if self.repeats > 1 and (self.global_batch_size // self.num_lanes) % (2 * self.repeats):
            raise PlanError(
                f"num_lanes: with repeats {self.repeats} a lane's share of a batch must be a multiple of "
                f"{2 * self.repeats}, found {self.global_batch_size} / {self.num_lanes}; leave it out for {default}"
            )
        if self.remainder not in get_args(Remainder):
            raise PlanError(f"remainder: expected one of {', '.join(get_args(Remainder))}, found {self.remainder!r}")


def default_num_lanes(global_batch_size: int, *, repeats: int = 1) -> int:
    """Return the largest divisor of the global batch up to 64; with repeats, of its groups of 2 * `repeats`.

    Raises:
        PlanError: the batch does not hold whole groups: pairs of samples, each `repeats` times.
    """
    group = 2 * repeats if repeats > 1 else 1
    if global_batch_size % group:
        raise PlanError(
            f"global_batch_size {global_batch_size}: with repeats {repeats} expected a multiple of {group} "
            f"(pairs of samples, {repeats} times each); change one of the two"
        )
    groups = global_batch_size // group
    return max(lanes for lanes in range(1, min(_MOST_LANES, groups) + 1) if not groups % lanes)


TrainRemainder = Literal["drop", "wrap"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderConfig:
    """Which samples a training reads, and how often; all of it is part of the order."""

    weights: tuple[float, ...] | None = None
    """One per shard set: the sets' shares of the samples. None: the sets are read as one, every sample alike."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """Which samples of the sets."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """How often each class; with weights, inside each set."""
    repeats: int = 1
    """Readings of each sample in a batch (repeated augmentation)."""
    epoch_samples: int | None = None
    """Samples of an epoch before `repeats`; None: one pass through everything."""
    remainder: TrainRemainder = "drop"
    """``drop`` or ``wrap``: see `PlanRecord.remainder`."""

    def __post_init__(self) -> None:
        check_choice("remainder", self.remainder, get_args(TrainRemainder))
        check_range(self, "", "repeats", "epoch_samples", low=1)
        if self.weights is not None:
            block_quotas(self.weights)  # a weight that cannot be used is refused before anything starts
