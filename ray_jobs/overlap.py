"""The same video in two shard sets, as a training and a test split must not have it.

By name: two samples of one id, or cut from a source file of one name. By content: a difference hash of three stills
(64 bits each: is a pixel of the 9 x 8 grey picture brighter than its left neighbour?) and one of the spectrogram. A
video that was encoded, scaled or converted otherwise differs in a few bits; another one in about half of them. Another
part of the same video is found by its source's name alone.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from ca2st.checked_json import parse_json
from pipelines.decode.reference import decode_frames
from pipelines.rendering import RenderRequest
from pipelines.storage.index import read_columns
from pipelines.storage.samples import FetchedSample, SampleReader
from sharding.format.shard_set import ShardSet

_STILLS = (1 / 6, 1 / 2, 5 / 6)
_MOST_BITS = 10
"""Of 64: unrelated stills differ in 32 on average, and in 10 or fewer once in about 10^8."""
_MOST_SOUND_BITS = 16
_LEAST_ONES = 6
"""A still with fewer, or fewer zeros, is nearly one colour and says nothing."""
_ROWS_AT_ONCE = 256
_FIELDS = {"id": "sample_id", "source": "source"}
"""Where a sample's JSON has its names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """Two samples that seem to be one video."""

    by: Literal["id", "source", "content"]
    first: str
    """Sample id in the first set."""
    second: str
    """Sample id in the second set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    shard: int
    row: int
    names: Mapping[str, str]
    """Its id and the name of its source file."""


def find_overlaps(
    first: ShardSet, second: ShardSet, *, content: bool = False, progress: Callable[[int, int], None] | None = None
) -> list[Overlap]:
    """Return the pairs of samples that seem to be one video, each pair once, by id before source before content.

    Args:
        first: A set.
        second: Another.
        content: Whether to decode three stills of every sample and compare what they show.
        progress: Called with (samples looked at, samples in all) while they are decoded.

    Raises:
        DataDamageError: a set is not what was written.
    """
    both = [list(_samples(shard_set)) for shard_set in (first, second)]
    pairs: dict[tuple[int, int], Overlap] = {}
    for by in ("id", "source"):
        places: dict[str, list[int]] = defaultdict(list)
        for number, one in enumerate(both[0]):
            places[one.names[by]].append(number)
        for number, one in enumerate(both[1]):
            for other in places.get(one.names[by], ()):
                pairs.setdefault((other, number), _overlap(by, both[0][other], one))
    if content:
        total, done = sum(map(len, both)), itertools.count(1)
        step = (lambda: progress(next(done), total)) if progress else (lambda: None)
        hashes = [_hashes(shard_set, samples, step) for shard_set, samples in zip((first, second), both, strict=True)]
        for pair in _alike(*hashes):
            pairs.setdefault(pair, _overlap("content", both[0][pair[0]], both[1][pair[1]]))
    return list(pairs.values())


def _overlap(by: str, one: _Sample, other: _Sample) -> Overlap:
    return Overlap(by=cast("Literal['id', 'source', 'content']", by), first=one.names["id"], second=other.names["id"])


def _samples(shard_set: ShardSet) -> Iterator[_Sample]:
    """Yield what every sample's JSON says of its origin, in stored order."""
    for shard, row, key, record in read_records(shard_set):
        names = {by: str(record.get(field, key)) for by, field in _FIELDS.items()}
        yield _Sample(shard=shard, row=row, names=names)


def read_records(shard_set: ShardSet) -> Generator[tuple[int, int, str, dict[str, Any]], None, None]:
    """Yield the JSON of every sample in stored order, with the numbers of its shard and row and its key."""
    with closing(SampleReader(shard_set)) as reader:
        tables = read_columns(shard_set, ["key", "json_offset", "json_bytes"])
        for number, (shard, table) in enumerate(tables):
            with reader.files.opened(shard) as file:
                for row, cells in enumerate(table.to_pylist()):
                    data = file.read(cells["json_offset"], cells["json_bytes"])
                    where = f"{shard.name}, {cells['key']}.json"
                    yield number, row, cells["key"], parse_json(data, dict[str, Any], where=where)


def _hashes(shard_set: ShardSet, samples: list[_Sample], step: Callable[[], None]) -> NDArray[np.uint64]:
    """[samples, 4]: three stills and the sound; 0 where there is nothing to compare."""
    hashes = np.zeros((len(samples), len(_STILLS) + 1), np.uint64)
    with closing(SampleReader(shard_set)) as reader:
        for number, one in enumerate(samples):
            entry = reader.indexes.entry(one.shard, one.row)
            stills = tuple(int(place * entry.num_frames) for place in _STILLS)
            hashes[number] = _fingerprint(reader.fetch(entry, stills), stills)
            step()
    return hashes


def _fingerprint(sample: FetchedSample, stills: tuple[int, ...]) -> list[int]:
    request = RenderRequest(frames=sample.clip_frames(stills), boxes=(), flip=False, where=sample.entry.where)
    frames = rearrange(decode_frames(request), "time c height width -> time height width c").numpy()
    found = [difference_hash(Image.fromarray(frame).convert("L")) for frame in frames]
    mel = sample.mel.astype(np.float32)
    return [*found, difference_hash(Image.fromarray(mel)) if len(mel) else 0]


def difference_hash(picture: Image.Image) -> int:
    """Return 64 bits: whether each pixel of the picture, scaled to 9 x 8, is brighter than its left neighbour.

    0 where hardly any is, or hardly any is not: a picture of one colour.
    """
    small = np.asarray(picture.resize((9, 8), Image.Resampling.BOX), np.float32)
    bits = (small[:, 1:] > small[:, :-1] + 1e-3).ravel()
    if not _LEAST_ONES <= bits.sum() <= bits.size - _LEAST_ONES:
        return 0
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _alike(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """Yield pairs whose comparable stills (one at least) all agree, and whose sounds do where both have one."""
    most = np.array([*[_MOST_BITS] * len(_STILLS), _MOST_SOUND_BITS])
    for start in range(0, len(first), _ROWS_AT_ONCE):
        rows = first[start : start + _ROWS_AT_ONCE]
        comparable = np.zeros((len(rows), len(second)), bool)
        agree = np.ones_like(comparable)
        for column in range(len(most)):
            mine, theirs = rows[:, None, column], second[None, :, column]
            known = (mine != 0) & (theirs != 0)
            agree &= ~known | (np.bitwise_count(mine ^ theirs) <= most[column])
            if column < len(_STILLS):
                comparable |= known
        for row, other in zip(*np.nonzero(agree & comparable), strict=True):
            yield start + int(row), int(other)


def counts(overlaps: list[Overlap]) -> Mapping[str, int]:
    """Return how many pairs were found by what."""
    found = {"id": 0, "source": 0, "content": 0}
    for one in overlaps:
        found[one.by] += 1
    return found
