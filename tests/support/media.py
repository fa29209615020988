"""Tiny media files for tests: clips whose frames carry their own number, and the ways a file can be damaged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

TIME_BASE = Fraction(1, 90_000)
CODE_BITS = 8


@dataclass(frozen=True, kw_only=True)
class Sound:
    """A sine tone as the sound track of a test clip."""

    seconds: float = 1.0
    delay_seconds: float = 0.0
    """Later (positive) or earlier (negative) than the first frame."""
    hz: float = 1000.0
    rate: int = 48_000
    layout: str = "stereo"
    codec: str = "aac"
    amplitude: float = 0.5
    beeps: Sequence[float] = ()
    """Where given, the tone sounds only for 80 ms from each of these seconds of the track."""


def numbered_frame(number: int, width: int, height: int) -> np.ndarray:
    """An RGB frame with `number` as eight black or white columns over its upper half and a ramp below."""
    image = np.zeros((height, width, 3), np.uint8)
    edges = np.linspace(0, width, CODE_BITS + 1).astype(int)
    for bit in range(CODE_BITS):
        image[: height // 2, edges[bit] : edges[bit + 1]] = 255 if number >> bit & 1 else 0
    image[height // 2 :] = np.linspace(30, 220, width).astype(np.uint8)[None, :, None]
    return image


def read_number(image: np.ndarray) -> int:
    """The number that `numbered_frame` drew, from an RGB or grey image of any size."""
    grey = image.mean(axis=2) if image.ndim == 3 else image
    height, width = grey.shape
    band = grey[height // 8 : height // 3]
    centres = ((np.arange(CODE_BITS) + 0.5) * width / CODE_BITS).astype(int)
    return sum(1 << bit for bit, centre in enumerate(centres) if band[:, centre].mean() > 127)


def make_clip(
    path: Path,
    *,
    seconds: float = 1.0,
    fps: Fraction | float = 30,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    gop: int = 12,
    b_frames: int = 0,
    sound: Sound | None = None,
    rotation: int = 0,
    times: Sequence[float] | None = None,
    draw: Callable[[int, int, int], np.ndarray] = numbered_frame,
    colour: tuple[int, int] | None = None,
    pixel_aspect: Fraction | None = None,
    codec_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    title: str = "",
) -> Path:
    """Write a clip; `times` (seconds a frame) gives a variable frame rate, `colour` = (colorspace, range) tags."""
    rate = Fraction(fps).limit_denominator(1001)
    moments = list(times) if times is not None else [float(i / rate) for i in range(round(seconds * rate))]
    with av.open(str(path), "w", options=container_options or {}) as container:
        if title:
            container.metadata["title"] = title
        video = container.add_stream(codec, rate=rate, options={"bf": str(b_frames)} | (codec_options or {}))
        video.width, video.height = size
        video.pix_fmt = pixel_format
        video.gop_size = gop
        video.thread_count = 1
        base = 1 / rate if path.suffix == ".avi" else _time_base(codec, rate)  # AVI counts frames
        video.time_base = video.codec_context.time_base = base
        if colour:
            video.codec_context.colorspace, video.codec_context.color_range = colour
        if pixel_aspect:
            video.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation:
            video.set_display_rotation(rotation)
        audio = container.add_stream(sound.codec, rate=sound.rate, layout=sound.layout) if sound else None
        if audio and sound and sound.codec == "wmav2":
            audio.bit_rate = 128_000  # it has no default
        for number, moment in enumerate(moments):
            picture = av.VideoFrame.from_ndarray(draw(number, *size), format="rgb24")
            if colour:
                picture = picture.reformat(
                    format=pixel_format, src_color_range="JPEG", dst_colorspace=colour[0], dst_color_range=colour[1]
                )
            picture.pts, picture.time_base = round(moment * 90_000), TIME_BASE
            container.mux(video.encode(picture))
        container.mux(video.encode(None))
        if sound and audio:
            _add_sound(container, audio, sound)
    return path


def _time_base(codec: str, rate: Fraction) -> Fraction:
    """The finest unit of time that the codec takes, up to ours."""
    return {"mpeg4": Fraction(1, 60_000), "mpeg2video": 1 / rate}.get(codec, TIME_BASE)


def joined(target: Path, parts: Sequence[Path], *, seconds_each: float) -> Path:
    """The packets of all parts in the streams of the first one, one part behind the other."""
    with av.open(str(parts[0])) as first, av.open(str(target), "w") as write:
        streams = {stream.index: write.add_stream_from_template(stream) for stream in first.streams}
        for number, part in enumerate(parts):
            with av.open(str(part)) as read:
                for packet in read.demux():
                    if packet.pts is None or packet.dts is None:
                        continue
                    shift = round(number * seconds_each / packet.time_base)
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = streams[packet.stream.index]
                    write.mux(packet)
    return target


def _add_sound(container: av.container.OutputContainer, stream: av.AudioStream, sound: Sound) -> None:
    times = np.arange(round(sound.seconds * sound.rate)) / sound.rate
    wave = (sound.amplitude * np.sin(2 * np.pi * sound.hz * times)).astype(np.float32)
    if sound.beeps:
        wave *= np.any([(times >= beep) & (times < beep + 0.08) for beep in sound.beeps], axis=0)
    channels = len(av.AudioLayout(sound.layout).channels)
    step = stream.codec_context.frame_size or 1024
    for first in range(0, len(wave), step):
        block = np.repeat(wave[None, first : first + step], channels, axis=0)
        if stream.format.is_packed:
            block = block.T.reshape(1, -1)
        if stream.format.name.startswith(("s16", "s32")):
            kind = np.int16 if stream.format.name.startswith("s16") else np.int32
            block = (block.astype(np.float64) * np.iinfo(kind).max).astype(kind)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), stream.format.name, sound.layout)
        frame.sample_rate = sound.rate
        frame.pts = first + round(sound.delay_seconds * sound.rate)
        frame.time_base = Fraction(1, sound.rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def remux(source: Path, target: Path, change: Callable[[str, float], float | None]) -> Path:
    """Copy the packets; `change` gives each (kind of stream, seconds) its new seconds, or None to drop it."""
    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        streams = {stream.index: write.add_stream_from_template(stream) for stream in read.streams}
        for packet in read.demux():
            if packet.pts is None or packet.dts is None:
                continue
            seconds = float(packet.pts * packet.time_base)
            moved = change(packet.stream.type, seconds)
            if moved is None:
                continue
            shift = round((moved - seconds) / packet.time_base)
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            packet.stream = streams[packet.stream.index]
            write.mux(packet)
    return target


@dataclass(frozen=True, kw_only=True)
class Track:
    """A stream of `with_tracks`: the picture or the sound of a file, and what the container says about it."""

    source: Path
    kind: str = "audio"
    disposition: Disposition = Disposition(0)  # noqa: RUF009  a flag, immutable
    language: str | None = None


def with_tracks(target: Path, tracks: Sequence[Track]) -> Path:
    """Copy the first stream of each kind asked for into one file, in order."""
    with av.open(str(target), "w") as write:
        opened = []
        for track in tracks:
            read = av.open(str(track.source))
            stream = read.streams.get(**{track.kind: 0})[0]
            copy = write.add_stream_from_template(stream)
            copy.disposition = track.disposition
            if track.language:
                copy.metadata["language"] = track.language
            opened.append((read, stream, copy))
        packets = [
            (float(packet.dts * packet.time_base), packet, copy)
            for read, stream, copy in opened
            for packet in read.demux(stream)
            if packet.dts is not None
        ]
        for _, packet, copy in sorted(packets, key=lambda one: one[0]):
            packet.stream = copy
            write.mux(packet)
        for read, _, _ in opened:
            read.close()
    return target


def boxes(data: bytes) -> list[tuple[str, int, int]]:
    """Top-level boxes of an MP4 as (type, offset, size)."""
    found, at = [], 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big") or len(data) - at
        found.append((data[at + 4 : at + 8].decode("latin-1"), at, size))
        at += size
    return found


def _zero_byte(_: bytes) -> bytes:
    return b""


def _text(_: bytes) -> bytes:
    return b"<html><body>404 not found</body></html>\n" * 40


def _no_moov(data: bytes) -> bytes:
    return b"".join(data[at : at + size] for kind, at, size in boxes(data) if kind != "moov")


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _bit_flips(data: bytes) -> bytes:
    (_, at, size) = next(box for box in boxes(data) if box[0] == "mdat")
    damaged = bytearray(data)
    for place in np.random.default_rng(0).integers(at + 8, at + size, 30):
        damaged[place] ^= 1 << int(place) % 8
    return bytes(damaged)


def _zeroed_mdat(data: bytes) -> bytes:
    (_, at, size) = next(box for box in boxes(data) if box[0] == "mdat")
    return data[: at + 8] + bytes(size - 8) + data[at + size :]


def _bad_stco(data: bytes) -> bytes:
    at = data.index(b"stco")
    count = int.from_bytes(data[at + 8 : at + 12], "big")
    damaged = bytearray(data)
    for entry in range(count):
        place = at + 12 + 4 * entry
        value = int.from_bytes(damaged[place : place + 4], "big") + 5_000_000
        damaged[place : place + 4] = value.to_bytes(4, "big")
    return bytes(damaged)


def _bad_stsz(data: bytes) -> bytes:
    at = data.index(b"stsz")
    damaged = bytearray(data)
    for entry in range(int.from_bytes(data[at + 12 : at + 16], "big")):
        place = at + 16 + 4 * entry
        value = int.from_bytes(damaged[place : place + 4], "big") // 2
        damaged[place : place + 4] = value.to_bytes(4, "big")
    return bytes(damaged)


def _picture_file(_: bytes) -> bytes:
    """A PNG of one pixel under the name of a video."""
    packed = "789c6360000002000154a24f9f0000000049454e44ae426082"
    head = "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154"
    return bytes.fromhex(head + packed)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "zero_byte": _zero_byte,
    "text": _text,
    "no_moov": _no_moov,
    "half": _half,
    "bit_flips": _bit_flips,
    "zeroed_mdat": _zeroed_mdat,
    "bad_stco": _bad_stco,
    "bad_stsz": _bad_stsz,
    "picture_file": _picture_file,
}


def damage(source: Path, target: Path, kind: str) -> Path:
    """Write a damaged copy of `source`; `kind` is a key of DAMAGES."""
    target.write_bytes(DAMAGES[kind](source.read_bytes()))
    return target
