"""Bytes of a sample's frames and spectrogram: read by range, compared with the index, sizes read from the headers."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import SampleDamageError
from pipelines.jpeg import jpeg_size
from pipelines.mel import parse_mel
from pipelines.shard_files import ShardFiles
from pipelines.shard_index import SampleEntry
from pipelines.stats import StatsRecorder
from sharding.index import frame_checksum, member_checksum

_MOST_GAP_BYTES = 4096
"""Ranges closer than this are read as one: a page more costs less than a call more."""
_REMEDY = "the shard was damaged after it was written: restore it from a copy or convert it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedSample:
    """What a backend needs of one sample, checked."""

    entry: SampleEntry
    frames: dict[int, bytes]
    """JPEG bytes by frame index, only those asked for."""
    height: int
    """Pixels of every frame."""
    width: int
    mel: NDArray[np.float16]
    """All rows, not normalised."""


class ByteFetcher:
    """Reads and checks samples; safe to call from several threads."""

    def __init__(self, files: ShardFiles, stats: StatsRecorder, *, num_mel_bins: int) -> None:
        self._files, self._stats, self._num_mel_bins = files, stats, num_mel_bins

    def fetch(self, entry: SampleEntry, frame_indices: Iterable[int]) -> FetchedSample:
        """The named frames and the spectrogram of a sample.

        Raises:
            ShardSetDamageError: the shard is missing or too short.
            SampleDamageError: bytes differ from their checksum, or are not JPEGs or spectrograms as the index says.
        """
        wanted = sorted(set(frame_indices))
        with self._stats.timed("fetch_seconds"):
            frames = self._read_frames(entry, wanted)
            mel = self._files.read(entry.shard, entry.mel_offset, entry.mel_bytes)
        with self._stats.timed("checksum_seconds"):
            for index, data in frames.items():
                _require_frame(entry, index, data)
            _require_mel(entry, mel)
        height, width = _common_size(entry, frames)
        where = f"{entry.where}, mel.npy"
        rows = parse_mel(mel, num_rows=entry.mel_rows, num_bins=self._num_mel_bins, where=where)
        return FetchedSample(entry=entry, frames=frames, height=height, width=width, mel=rows)

    def _read_frames(self, entry: SampleEntry, wanted: list[int]) -> dict[int, bytes]:
        offsets = entry.frame_offsets
        frames: dict[int, bytes] = {}
        for group in coalesce(wanted, offsets):
            first, end = int(offsets[group[0]]), int(offsets[group[-1] + 1])
            data = self._files.read(entry.shard, first, end - first)
            self._stats.add("bytes_read", len(data))
            frames |= {i: data[int(offsets[i]) - first : int(offsets[i + 1]) - first] for i in group}
        self._stats.add("bytes_read", entry.mel_bytes)
        return frames


def coalesce(wanted: list[int], offsets: NDArray[np.int64], *, most_gap: int = _MOST_GAP_BYTES) -> list[list[int]]:
    """Runs of ascending frame indices whose byte ranges touch or lie at most `most_gap` bytes apart."""
    groups = [wanted[:1]]
    for before, index in pairwise(wanted):
        if offsets[index] - offsets[before + 1] <= most_gap:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _require_frame(entry: SampleEntry, index: int, data: bytes) -> None:
    expected, found = int(entry.frame_xxh32[index]), frame_checksum(data)
    if found != expected:
        raise SampleDamageError(
            f"{entry.where}, frame {index} at byte {entry.frame_offsets[index]} ({len(data)} bytes): "
            f"expected xxh32 {expected:08x}, found {found:08x}; {_REMEDY}"
        )


def _require_mel(entry: SampleEntry, data: bytes) -> None:
    found = member_checksum(data)
    if found != entry.mel_xxh64:
        raise SampleDamageError(
            f"{entry.where}, mel.npy at byte {entry.mel_offset} ({len(data)} bytes): "
            f"expected xxh3-64 {entry.mel_xxh64:016x}, found {found:016x}; {_REMEDY}"
        )


def _common_size(entry: SampleEntry, frames: dict[int, bytes]) -> tuple[int, int]:
    sizes = {index: jpeg_size(data, where=f"{entry.where}, frame {index}") for index, data in frames.items()}
    if len(set(sizes.values())) != 1:
        raise SampleDamageError(f"{entry.where}: expected frames of one size, found {sizes}; convert the set again")
    return next(iter(sizes.values()))
