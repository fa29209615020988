"""Kinds of damage to an MP4, as functions of its bytes: those that the converter must reject (row C4)."""

import io
import struct
from collections.abc import Callable

import av
import numpy as np


def _boxes(data: bytes) -> list[tuple[bytes, int, int]]:
    """Top-level boxes as (kind, offset, size)."""
    found, at = [], 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        found.append((kind, at, size or len(data) - at))
        at += size or len(data) - at
    return found


def _pictures(data: bytes) -> tuple[int, int]:
    """Where the coded pictures begin and end."""
    at, size = next((at, size) for kind, at, size in _boxes(data) if kind == b"mdat")
    return at + 8, at + size


def _fragmented(data: bytes) -> bytes:
    target = io.BytesIO()
    with (
        av.open(io.BytesIO(data), "r", format="mp4") as source,
        av.open(target, "w", format="mp4", options={"movflags": "frag_keyframe+empty_moov"}) as container,
    ):
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    return target.getvalue()


def _flipped(data: bytes) -> bytes:
    damaged = bytearray(data)
    for place in np.random.default_rng(0).integers(*_pictures(data), 30):
        damaged[place] ^= 1 << int(place) % 8
    return bytes(damaged)


def _zeroed(data: bytes) -> bytes:
    begin, end = _pictures(data)
    return data[:begin] + bytes(end - begin) + data[end:]


def _table_moved(kind: bytes, first_entry: int, by: int) -> Callable[[bytes], bytes]:
    """Add to every entry of 32 bits of a table."""

    def damage(data: bytes) -> bytes:
        at = data.index(kind) + first_entry
        (count,) = struct.unpack_from(">I", data, at - 4)
        entries = [(value + by) % (1 << 32) for value in struct.unpack_from(f">{count}I", data, at)]
        return data[:at] + struct.pack(f">{count}I", *entries) + data[at + 4 * count :]

    return damage


def _huge(data: bytes) -> bytes:
    at = next(data.rindex(name) for name in _ENTRIES if name in data) + 28  # the first one may be the file's brand
    return data[:at] + struct.pack(">HH", 60_000, 60_000) + data[at + 4 :]


def _encrypted(data: bytes) -> bytes:
    return next(data.replace(name, b"encv") for name in _ENTRIES if name in data)


_ENTRIES = (b"avc1", b"hev1", b"hvc1", b"vp09")

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "none": lambda data: data,
    "zero_bytes": lambda _: b"",
    "text": lambda _: b"<html><body>404 not found</body></html>\n" * 40,
    "no_moov": lambda data: b"".join(data[at : at + size] for kind, at, size in _boxes(data) if kind != b"moov"),
    "half": lambda data: data[: len(data) // 2],
    "half_fragmented": lambda data: _fragmented(data)[: len(data) // 2],
    "bit_flips": _flipped,
    "zeroed_mdat": _zeroed,
    "bad_stco": _table_moved(b"stco", 12, 5_000_000),
    "bad_stsz": _table_moved(b"stsz", 16, 997),
    "huge_picture": _huge,
    "encrypted": _encrypted,
}
"""By name; ``none`` is the clip as it is, which must come out."""
