"""Damaged clips before the decoders of a device, each in a process of its own with a time limit (row P15).

The kinds of damage are those that the converter must reject (row C4), as functions of an MP4's bytes. In training a
damaged clip is stopped by its checksum, before any decoder. Here nothing stands before the decoder.

Run as a program this file is the process of one trial: it decodes a damaged clip and says on stdout, as JSON, what came
out. Arguments: device, codec, the clip before and after the damage, frames and pixels of a view.
"""

import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch

from benchmarks.parity import StoredClip, backend_on, compare
from ca2st.errors import CA2STError
from ca2st.spec import ClipSpec
from pipelines.augment.boxes import CropBox
from pipelines.decode.reference import ReferenceBackend
from pipelines.rendering import RenderRequest, VideoMember
from pipelines.storage.samples import video_facts
from pipelines.threads import StatsRecorder
from sharding.media.codecs import stored_codec


def _boxes(data: bytes) -> list[tuple[bytes, int, int]]:
    """Return top-level boxes as (kind, offset, size)."""
    found, at = [], 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        found.append((kind, at, size or len(data) - at))
        at += size or len(data) - at
    return found


def _pictures(data: bytes) -> tuple[int, int]:
    """Return where the coded pictures begin and end."""
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


LEAST_PSNR_DB = 35.0
"""Decoded frames that lie nearer to the reference are right: decoders round, they do not show other pictures."""
Outcome = Literal["refused", "decoded", "concealed", "crashed", "hung"]
_MOST_WORDS = 240
_SOURCES = str(Path(__file__).parents[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class DamageTrial:
    """One damaged clip before one decoder."""

    codec: str
    damage: str
    """A name of `DAMAGES`."""
    outcome: Outcome
    """``decoded``: the reference decodes it too; ``concealed``: the reference refuses it, and pictures came out."""
    backend: str
    """What was tried; empty where its process did not live to say."""
    psnr_db: float | None
    """Of what came out, to the reference's pictures of the same bytes, or (concealed) of the clip before the damage;
    None: nothing came out, or no difference."""
    words: str
    """The error, or how the process ended."""

    @property
    def is_sound(self) -> bool:
        """No crash, no hang, and no picture that is silently another than the reference's."""
        if self.damage == "none":
            return self.outcome == "decoded" and self._is_near
        return self.outcome == "refused" or (self.outcome in ("decoded", "concealed") and self._is_near)

    @property
    def _is_near(self) -> bool:
        return self.psnr_db is None or self.psnr_db >= LEAST_PSNR_DB


def try_damages(
    clip: StoredClip,
    spec: ClipSpec,
    folder: Path,
    *,
    device: str,
    damages: Sequence[str] = tuple(DAMAGES),
    seconds: float,
    at_once: int,
) -> list[DamageTrial]:
    """Try every kind of damage to `clip`; a process may take `seconds`, its start included, `at_once` run together."""
    good = folder / f"{clip.codec}.mp4"
    good.write_bytes(clip.video.mp4)

    def one(damage: str) -> DamageTrial:
        bad = folder / f"{clip.codec}-{damage}.mp4"
        bad.write_bytes(DAMAGES[damage](clip.video.mp4))
        arguments = [device, clip.codec, str(good), str(bad), str(spec.num_frames), str(spec.crop_size)]
        return run_child(clip.codec, damage, [sys.executable, "-P", __file__, *arguments], seconds=seconds)

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, damages))


def run_child(codec: str, damage: str, command: Sequence[str], *, seconds: float) -> DamageTrial:
    """Return what the process says, or how it ended without a word."""
    path = os.pathsep.join(filter(None, (_SOURCES, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    try:
        done = subprocess.run([*command], capture_output=True, text=True, timeout=seconds, check=False, env=environment)
    except subprocess.TimeoutExpired:
        return _silent(codec, damage, "hung", f"no word within {seconds:g} s")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return _silent(codec, damage, "crashed", f"exit code {done.returncode}: {last[:_MOST_WORDS]}")
    said = json.loads(done.stdout.splitlines()[-1])
    return DamageTrial(codec=codec, damage=damage, **(said | {"words": said["words"][:_MOST_WORDS]}))


def _silent(codec: str, damage: str, outcome: Outcome, words: str) -> DamageTrial:
    return DamageTrial(codec=codec, damage=damage, outcome=outcome, backend="", psnr_db=None, words=words)


def tried(device: torch.device, codec: str, good: bytes, bad: bytes, spec: ClipSpec) -> dict[str, Any]:
    """Return fields of a `DamageTrial`: how the device's backend takes `bad`."""
    oracle = ReferenceBackend(crop_size=spec.crop_size, stats=StatsRecorder())
    backend = backend_on(device, codec, spec, threads=1)
    wanted = _spread(video_facts(good, stored_codec(codec), where="the clip").num_frames, spec.num_frames)
    said = {"backend": backend.name, "psnr_db": None, "words": ""}
    try:
        ours = backend.render([_request(codec, bad, spec, wanted)])
    except CA2STError as error:
        return said | {"outcome": "refused", "words": str(error)}
    finally:
        backend.close()
    try:
        theirs, outcome = oracle.render([_request(codec, bad, spec, wanted)]), "decoded"
    except CA2STError as error:
        theirs, outcome = oracle.render([_request(codec, good, spec, wanted)]), "concealed"
        said["words"] = f"the reference: {error}"
    return said | {"outcome": outcome, "psnr_db": compare(codec, "decode", ours, theirs).psnr_db}


def _spread(num_frames: int, wanted: int) -> tuple[int, ...]:
    """Frames from the first to the last one."""
    return tuple(number * (num_frames - 1) // max(1, wanted - 1) for number in range(wanted))


def _request(codec: str, data: bytes, spec: ClipSpec, wanted: tuple[int, ...]) -> RenderRequest:
    side = spec.crop_size
    box = CropBox(top=0, left=0, height=side, width=side)
    frames = VideoMember(data, codec, wanted)
    return RenderRequest(frames=frames, boxes=(box,), flip=False, where="the damaged clip")


def main(arguments: list[str]) -> None:
    """Try one clip."""
    device, codec, good, bad, num_frames, crop_size = arguments
    spec = ClipSpec(num_frames=int(num_frames), crop_size=int(crop_size))
    found = tried(torch.device(device), codec, Path(good).read_bytes(), Path(bad).read_bytes(), spec)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
