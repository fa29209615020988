"""Which samples of the shard sets are trained on: chosen by class, participant or key when a run starts.

What is given is combined with "and"; the names inside one list with "or". `limit` comes last.
"""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import xxhash
from numpy.typing import NDArray

from ca2st.errors import UserInputError, did_you_mean

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
        if self.limit is not None and self.limit < 1:
            raise UserInputError(f"select.limit: expected at least 1, found {self.limit}")
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

    def mask(self, keys: Sequence[str] | None, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which samples of a shard are selected; `limit` is not looked at."""
        mask = np.ones(len(labels), np.bool_)
        if len(self._labels):
            mask &= np.isin(labels, self._labels)
            self._seen_labels.update(np.unique(labels[mask]).tolist())
        for patterns in (self._participants, self._keys):
            if patterns.names and keys is not None:
                mask &= np.fromiter((patterns.match(key) for key in keys), np.bool_, len(keys))
        return mask

    def require_matches(self, num_selected: int) -> None:
        """Refuse names that matched no sample.

        Raises:
            UserInputError: a class, participant or pattern that matches nothing, or all of them nothing together.
        """
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
    """The hash by which `limit` ranks each sample."""
    return np.fromiter((xxhash.xxh3_64_intdigest(key.encode(), seed=limit_seed) for key in keys), np.uint64)


def smallest(ranks: NDArray[np.uint64], limit: int) -> NDArray[np.bool_]:
    """Which `limit` of the ranks are smallest; of equal ones the earlier."""
    mask = np.zeros(len(ranks), np.bool_)
    if limit >= len(ranks):
        return ~mask
    bound = np.partition(ranks, limit - 1)[limit - 1]
    mask[ranks < bound] = True
    ties = np.flatnonzero(ranks == bound)
    mask[ties[: limit - int(mask.sum())]] = True
    return mask
