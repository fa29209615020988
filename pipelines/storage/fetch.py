"""Bytes of a sample, read by range and compared with the index, on threads.

Bytes of a sample's video and spectrogram: read by range, compared with the index, sizes read from the headers.

Where every frame is a picture of its own just the wanted ones are read; where frames depend on others, the whole
member. Either way, what is read is what is checked.

Threads that read bytes and never keep a process alive.

`concurrent.futures` waits at the interpreter's exit for every thread it ever started: one read that never returns,
from a file server that is gone, and the process never ends. These are daemons: closing waits for them only so long.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from typing import ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import SampleDamageError
from pipelines.rendering import ClipFrames, JpegFrames, VideoMember
from pipelines.stats import StatsRecorder
from pipelines.storage.headers import jpeg_size, parse_mel, video_facts
from pipelines.storage.index import SampleEntry
from pipelines.storage.shard_files import ShardFiles
from sharding.format.index import frame_checksum, member_checksum

_MOST_GAP_BYTES = 4096
"""Ranges closer than this are read as one: a page more costs less than a call more."""
MOST_MEMBER_BYTES = 1 << 28
"""A video that is read whole may be so large: ten minutes at short side 256. Some dozens are in memory at a time."""
_REMEDY = "the shard was damaged after it was written: restore it from a copy or convert it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedSample:
    """What a backend needs of one sample, checked."""

    entry: SampleEntry
    frames: dict[int, bytes]
    """JPEG bytes by frame index, only those asked for; empty where there is a `member`."""
    height: int
    """Pixels of every frame."""
    width: int
    mel: NDArray[np.float16]
    """All rows, not normalised."""
    member: bytes | None = None
    """The whole video file, for codecs whose frames depend on others."""

    def clip_frames(self, frame_indices: tuple[int, ...]) -> ClipFrames:
        """The frames of a view, as a backend takes them."""
        if self.member is None:
            return JpegFrames(tuple(self.frames[index] for index in frame_indices))
        return VideoMember(self.member, self.entry.codec.name, frame_indices)


class ByteFetcher:
    """Reads and checks samples; safe to call from several threads."""

    def __init__(self, files: ShardFiles, stats: StatsRecorder, *, num_mel_bins: int) -> None:
        self._files, self._stats, self._num_mel_bins = files, stats, num_mel_bins

    def fetch(self, entry: SampleEntry, frame_indices: Iterable[int]) -> FetchedSample:
        """The named frames (or the member that holds them) and the spectrogram of a sample.

        Raises:
            ShardSetDamageError: the shard is missing or too short.
            SampleDamageError: bytes differ from their checksum, or are not the pictures, video or spectrogram that the
                index says.
        """
        wanted = sorted(set(frame_indices))
        with self._stats.timed("fetch_seconds", where=entry.where):
            frames = self._read_frames(entry, wanted) if entry.codec.has_frame_ranges else {}
            member = None if entry.codec.has_frame_ranges else self._read_member(entry)
            mel = self._files.read(entry.shard, entry.mel_offset, entry.mel_bytes)
            self._stats.add("bytes_read", entry.mel_bytes)
        with self._stats.timed("checksum_seconds", where=entry.where):
            for index, data in frames.items():
                _require_frame(entry, index, data)
            if member is not None:
                _require_member(entry, "mp4", entry.video_offset, member, entry.video_xxh64)
            _require_member(entry, "mel.npy", entry.mel_offset, mel, entry.mel_xxh64)
        height, width = _common_size(entry, frames) if member is None else _member_size(entry, member)
        where = f"{entry.where}, mel.npy"
        rows = parse_mel(mel, num_rows=entry.mel_rows, num_bins=self._num_mel_bins, where=where)
        return FetchedSample(entry=entry, frames=frames, height=height, width=width, mel=rows, member=member)

    def _read_member(self, entry: SampleEntry) -> bytes:
        if entry.video_bytes > MOST_MEMBER_BYTES:
            raise SampleDamageError(
                f"{entry.where}: expected a video of at most {MOST_MEMBER_BYTES} bytes, found {entry.video_bytes}; "
                "convert with shorter segments, or with --codec mjpeg, which is read frame by frame"
            )
        data = self._files.read(entry.shard, entry.video_offset, entry.video_bytes)
        self._stats.add("bytes_read", len(data))
        return data

    def _read_frames(self, entry: SampleEntry, wanted: list[int]) -> dict[int, bytes]:
        offsets = entry.frame_offsets
        frames: dict[int, bytes] = {}
        for group in coalesce(wanted, offsets):
            first, end = int(offsets[group[0]]), int(offsets[group[-1] + 1])
            data = self._files.read(entry.shard, first, end - first)
            self._stats.add("bytes_read", len(data))
            frames |= {i: data[int(offsets[i]) - first : int(offsets[i + 1]) - first] for i in group}
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


def _require_member(entry: SampleEntry, name: str, offset: int, data: bytes, expected: int) -> None:
    found = member_checksum(data)
    if found != expected:
        raise SampleDamageError(
            f"{entry.where}, {name} at byte {offset} ({len(data)} bytes): "
            f"expected xxh3-64 {expected:016x}, found {found:016x}; {_REMEDY}"
        )


def _member_size(entry: SampleEntry, member: bytes) -> tuple[int, int]:
    facts = video_facts(member, entry.codec, where=entry.where)
    if facts.num_frames != entry.num_frames:
        raise SampleDamageError(
            f"{entry.where}: expected a video of {entry.num_frames} frames, found {facts.num_frames}; "
            "convert the set again"
        )
    return facts.height, facts.width


def _common_size(entry: SampleEntry, frames: dict[int, bytes]) -> tuple[int, int]:
    sizes = {index: jpeg_size(data, where=f"{entry.where}, frame {index}") for index, data in frames.items()}
    if len(set(sizes.values())) != 1:
        raise SampleDamageError(f"{entry.where}: expected frames of one size, found {sizes}; convert the set again")
    return next(iter(sizes.values()))


P = ParamSpec("P")
T = TypeVar("T")
_Call = Callable[[], None]


class FetchThreads:
    """A fixed number of threads that make calls in the order they came; errors travel in the futures."""

    def __init__(self, count: int) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"clip-fetch_{number}", daemon=True) for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> "Future[T]":
        """Have `function` called by one of the threads."""
        future: Future[T] = Future()

        def call() -> None:
            if self._closing.is_set() or not future.set_running_or_notify_cancel():
                future.cancel()
                return
            try:
                future.set_result(function(*arguments, **named))
            except BaseException as error:  # noqa: BLE001 - carried to whoever asks for the result
                future.set_exception(error)

        self._calls.put(call)
        return future

    def close(self, *, patience_seconds: float = 10.0) -> None:
        """Let running calls end, drop those that wait, and end the threads; one that hangs is left behind."""
        self._closing.set()
        for _ in self._threads:
            self._calls.put(None)
        deadline = time.monotonic() + patience_seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call
