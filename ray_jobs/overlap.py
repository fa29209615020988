"""The same video in two shard sets, as a training and a test split must not have it.

By name: two samples of one id, or cut from a source file of one name. By content: a difference hash of three stills
(64 bits each: is a pixel of the 9 x 8 grey picture brighter than its left neighbour?) and one of the spectrogram. A
video that was encoded, scaled or converted otherwise differs in a few bits; another one in about half of them. Another
part of the same video is found by its source's name alone.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from ca2st.checked_json import parse_json
from pipelines.decode.reference import decode_frames
from pipelines.rendering import RenderRequest
from pipelines.storage.index import read_columns
from pipelines.storage.samples import SampleReader
from sharding.format.shard_set import ShardSet

_STILLS = (1 / 6, 1 / 2, 5 / 6)
_MOST_BITS = 10
"""Of 64: unrelated stills differ in 32 on average, and in 10 or fewer once in about 10^8."""
_MOST_SOUND_BITS = 16
_LEAST_ONES = 6
"""A still with fewer, or fewer zeros, is nearly one colour and says nothing."""
_ROWS_AT_ONCE = 256
Evidence = Literal["id", "source", "content"]
_NAMES: tuple[Evidence, Evidence] = ("id", "source")


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """Two samples that seem to be one video."""

    by: Evidence
    first: str
    """Sample id in the first set."""
    second: str
    """Sample id in the second set."""


def find_overlaps(
    first: ShardSet, second: ShardSet, *, content: bool = False, progress: Callable[[int], None] = lambda _: None
) -> list[Overlap]:
    """Return the pairs of samples that seem to be one video, each pair once, by id before source before content.

    Args:
        first: A set.
        second: Another.
        content: Whether to decode three stills of every sample and compare what they show.
        progress: Called with the number of samples of both sets that were looked at, while they are decoded.

    Raises:
        DataDamageError: a set is not what was written.
    """
    names = [
        [(str(record.get("sample_id", key)), str(record.get("source", key))) for key, record in records]
        for records in map(read_records, (first, second))
    ]
    pairs: dict[tuple[int, int], Evidence] = {}
    by: Evidence
    for part, by in enumerate(_NAMES):
        places: dict[str, list[int]] = defaultdict(list)
        for number, one in enumerate(names[0]):
            places[one[part]].append(number)
        for number, one in enumerate(names[1]):
            for other in places.get(one[part], ()):
                pairs.setdefault((other, number), by)
    if content:
        done = itertools.count(1)
        hashes = [_hashes(shard_set, lambda: progress(next(done))) for shard_set in (first, second)]
        for pair in _alike(*hashes):
            pairs.setdefault(pair, "content")
    return [Overlap(by=by, first=names[0][one][0], second=names[1][other][0]) for (one, other), by in pairs.items()]


def read_records(shard_set: ShardSet) -> Generator[tuple[str, dict[str, Any]], None, None]:
    """Yield the key and the JSON of every sample in stored order."""
    with closing(SampleReader(shard_set)) as reader:
        for shard, table in read_columns(shard_set, ["key", "json_offset", "json_bytes"]):
            with reader.files.opened(shard) as file:
                for cells in table.to_pylist():
                    data = file.read(cells["json_offset"], cells["json_bytes"])
                    where = f"{shard.name}, {cells['key']}.json"
                    yield cells["key"], parse_json(data, dict[str, Any], where=where)


def _hashes(shard_set: ShardSet, step: Callable[[], None]) -> NDArray[np.uint64]:
    """[samples, 4]: three stills and the sound; 0 where there is nothing to compare."""
    hashes = []
    with closing(SampleReader(shard_set)) as reader:
        for number, shard in enumerate(shard_set.shards):
            for row in range(shard.num_samples):
                entry = reader.indexes.entry(number, row)
                stills = tuple(int(place * entry.num_frames) for place in _STILLS)
                sample = reader.fetch(entry, stills)
                request = RenderRequest(frames=sample.clip_frames(stills), boxes=(), flip=False, where=entry.where)
                frames = rearrange(decode_frames(request), "time c height width -> time height width c").numpy()
                found = [difference_hash(Image.fromarray(frame).convert("L")) for frame in frames]
                mel = sample.mel.astype(np.float32)
                hashes.append([*found, difference_hash(Image.fromarray(mel)) if len(mel) else 0])
                step()
    return np.array(hashes, np.uint64).reshape(-1, len(_STILLS) + 1)


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
    found = Counter(one.by for one in overlaps)
    return {by: found[by] for by in get_args(Evidence)}
