"""One decoded frame made ready to be encoded: upright, progressive, square pixels, even sizes, standard colours.

A frame is deinterlaced and scaled as it lies in the source, then turned. The first frame decides the stored size; a
later one of another shape is stretched to it, as FFmpeg does, and counted. A stream without a colour matrix is taken
for BT.601 at any size, as FFmpeg takes it (players take large ones for BT.709): such large ones are counted.

High dynamic range and wide gamut become the BT.709 pictures that screens and models take frames for. PQ and HLG: signal
-> light on a display of 1000 nits (SMPTE ST 2084; BT.2100's HLG with its system gamma of 1.2 on each of red, green and
blue, as FFmpeg's zscale has it) -> BT.709 primaries -> tone curve -> BT.1886 (gamma 2.4). The unit of light is 203
nits, where BT.2408 puts the white of ordinary video: up to 0.7 of it the curve changes nothing, from there to 1000 nits
it bends smoothly into white. What was ordinary video before it was put into PQ or HLG thus comes out as it was, but for
white (239 instead of 255). The curve works on the largest of red, green and blue, so hue stays. Ordinary video of a
wide gamut: primaries alone.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import product
from typing import Any

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from sharding.errors import MediaError
from sharding.format.shard_set import VideoParameters
from sharding.media.codecs import stored_codec
from sharding.media.video import TimedFrame

HDR_POLICIES = {
    "tone-map": "PQ and HLG are converted to BT.709, and counted",
    "refuse": "PQ and HLG are rejects",
}
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
"""Transfer characteristics of high dynamic range, by their number in H.273 (as FFmpeg's)."""
WIDE_PRIMARIES = {9: "BT.2020", 12: "Display P3"}
"""Primaries that are converted, by their number in H.273; those of BT.601 are too close to BT.709 to matter."""

_WHITE_NITS, _PEAK_NITS, _KNEE, _GAMMA = 203.0, 1000.0, 0.7, 2.4
_D65 = (0.3127, 0.3290)
_CHROMATICITIES = {
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}


def standard_rgb(rgb: np.ndarray, *, transfer: int, primaries: int) -> np.ndarray:
    """BT.709 pixels, uint8 [height, width, 3], of others.

    Args:
        rgb: Non-linear, full range, uint16 [height, width, 3].
        transfer: H.273's number; one of HDR_TRANSFERS, or any other for ordinary video.
        primaries: H.273's number; those of high dynamic range are BT.2020 unless they are known.
    """
    if primaries not in _CHROMATICITIES:
        primaries = 9 if transfer in HDR_TRANSFERS else 1
    light: np.ndarray = np.maximum(
        _light_table(transfer if transfer in HDR_TRANSFERS else 1)[rgb] @ _to_bt709(primaries).T, 0
    )
    if transfer in HDR_TRANSFERS:
        brightest = np.maximum(np.maximum(light[..., :1], light[..., 1:2]), light[..., 2:])  # faster than max(axis)
        light *= tone_curve(brightest) / np.maximum(brightest, np.float32(1e-6))
    roots = np.sqrt(np.minimum(light, 1))
    pixels: np.ndarray = _pixels_of_roots()[(roots * np.float32(4095) + np.float32(0.5)).astype(np.uint16)]
    return pixels


def tone_curve(light: np.ndarray) -> np.ndarray:
    """Light on an ordinary screen, 0..1, of light in units of 203 nits: the same up to 0.7, white at 1000 nits."""
    above, room = _PEAK_NITS / _WHITE_NITS - _KNEE, 1 - _KNEE
    bend = np.float32(room * above / (above - room))  # slope 1 at the knee, and 1.0 at the peak
    excess = np.maximum(light - np.float32(_KNEE), 0)
    curve: np.ndarray = np.minimum(light, np.float32(_KNEE)) + np.minimum(excess * bend / (excess + bend), room)
    return curve


@lru_cache(maxsize=4)
def _light_table(transfer: int) -> np.ndarray:
    """Return light of every 16-bit signal, float32 [65536], in units of 203 nits."""
    signal = np.arange(65_536) / 65_535
    name = HDR_TRANSFERS.get(transfer)
    if name == "PQ":
        root = signal ** (32 / 2523)
        light = 10_000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (16_384 / 2610)
        return (light / _WHITE_NITS).astype(np.float32)
    if name == "HLG":
        upper = (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
        scene = np.where(signal <= 0.5, signal**2 / 3, upper)
        return (scene**1.2 * _PEAK_NITS / _WHITE_NITS).astype(np.float32)
    return (signal**_GAMMA).astype(np.float32)


@lru_cache(maxsize=1)
def _pixels_of_roots() -> np.ndarray:
    """Return pixels by the square root of light, uint8 [4096]: it is fast, and fine where light is little."""
    pixels: np.ndarray = np.round(255 * np.linspace(0, 1, 4096) ** (2 / _GAMMA)).astype(np.uint8)
    return pixels


@lru_cache(maxsize=4)
def _to_bt709(primaries: int) -> np.ndarray:
    matrix: np.ndarray = np.linalg.inv(_to_xyz(_CHROMATICITIES[1])) @ _to_xyz(_CHROMATICITIES[primaries])
    return matrix.astype(np.float32)


def _to_xyz(chromaticities: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Return the matrix from linear RGB of these primaries and D65 to XYZ."""
    columns = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in (*chromaticities, _D65)]).T
    matrix: np.ndarray = columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])
    return matrix


INTERLACED_POLICIES = {
    "deinterlace": "frames that are marked as interlaced are deinterlaced (yadif, a frame per frame), and counted",
    "keep": "interlaced frames are stored with both fields, and counted",
}
_SCALER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_LEAST_ASPECT, _MOST_ASPECT = Fraction(1, 5), Fraction(5)
_SAME_SHAPE = 0.02  # of an aspect ratio; even sizes and rounded pixel aspects differ by less
_COSINE_OF_A_DEGREE = math.cos(math.radians(1))
_UNSPECIFIED_MATRICES = (2, 3)  # H.273's numbers: unspecified, reserved
_DERIVED_MATRIX = 12  # of H.273: the primaries say which
_BT2020 = 9  # of its primaries
_MATRIX_OF_PRIMARIES = {1: Colorspace.ITU709, _BT2020: Colorspace.BT2020}


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureForm:
    """Pixel format and colours of the stored pictures: 4:2:0 with eight bits."""

    pixel_format: str
    colour_range: ColorRange
    colour_space: Colorspace = Colorspace.ITU601


FULL_RANGE = PictureForm(pixel_format="yuvj420p", colour_range=ColorRange.JPEG)
"""0..255, as JPEG has it."""
LIMITED_RANGE = PictureForm(pixel_format="yuv420p", colour_range=ColorRange.MPEG)
"""16..235, as video has it."""


def output_size(
    width: int, height: int, short_side: int, pixel_aspect: Fraction = Fraction(1), *, multiple: int | None = None
) -> tuple[int, int]:
    """Return width and height of square pixels: the shape on display, the shorter side at most `short_side`.

    As FFmpeg's ``scale=iw*sar:ih``: the width follows the pixels' width / height, the height stays. With `multiple`
    the shorter side is its multiple nearest to what it would be, the longer side then the multiple nearest to the
    shape: 640 x 480 at 256 becomes 336 x 256, a shape off by at most `multiple` / 2 pixels of the longer side. A side
    of a small picture grows so by at most `multiple` / 2, or to `multiple`. None: even sides, nothing is enlarged.
    """
    wide, high = width * pixel_aspect, Fraction(height)
    shorter = min(wide, high)
    if multiple is None:
        scale = min(Fraction(1), short_side / shorter)
        return _even(wide * scale), _even(high * scale)
    most = short_side // multiple * multiple
    scale = min(Fraction(2), Fraction(min(most, _nearest(shorter, multiple))) / shorter)
    return _nearest(wide * scale, multiple), _nearest(high * scale, multiple)


def _nearest(pixels: Fraction, multiple: int) -> int:
    return max(multiple, multiple * math.floor(pixels / multiple + Fraction(1, 2)))


def _even(pixels: Fraction) -> int:
    return max(2, 2 * round(pixels / 2) if pixels.denominator > 1 else int(pixels) // 2 * 2)


@dataclass(frozen=True, slots=True)
class Orientation:
    """How a source's frame is laid on the screen: transposed or not, then mirrored; the eight there are."""

    transposed: bool = False
    """Rows become columns."""
    left_right: bool = False
    top_down: bool = False

    @property
    def is_mirrored(self) -> bool:
        """Whether text would be in mirror writing without it."""
        return self.transposed ^ self.left_right ^ self.top_down

    def __str__(self) -> str:
        done = (("transposed", self.transposed), ("left-right", self.left_right), ("top-down", self.top_down))
        return ", ".join(name for name, is_done in done if is_done)

    def applied(self, plane: np.ndarray) -> np.ndarray:
        """Return the plane [rows, columns] as it is shown; a view."""
        plane = plane.T if self.transposed else plane
        return plane[:: -1 if self.top_down else 1, :: -1 if self.left_right else 1]

    def matrix(self) -> np.ndarray:
        """Return the 2x2 matrix that takes a source's (x, y) to the screen's, but for the shift."""
        x, y = -1.0 if self.left_right else 1.0, -1.0 if self.top_down else 1.0
        return np.array([[0.0, x], [y, 0.0]] if self.transposed else [[x, 0.0], [0.0, y]])


_UPRIGHT = Orientation()
_ORIENTATIONS = tuple(Orientation(*flags) for flags in product((False, True), repeat=3))


@lru_cache(maxsize=16)
def orientation_of(display_matrix: bytes) -> tuple[Orientation, bool]:
    """Return the orientation nearest to a display matrix, and whether it is within a degree of it.

    Args:
        display_matrix: Nine 32-bit numbers in this machine's order, 16.16 but for every third, as FFmpeg gives them:
            a b u, c d v, x y w; a point (p, q) of the frame goes to (a p + c q + x, b p + d q + y).
    """
    a, b, _, c, d = np.frombuffer(display_matrix, np.int32)[:5].astype(float)
    columns = np.array([[a, c], [b, d]])
    lengths = np.hypot(*columns)
    if not lengths.all():  # no picture at all by its words
        return _UPRIGHT, False
    cosines = [(columns / lengths * one.matrix()).sum(axis=0) for one in _ORIENTATIONS]
    best = max(range(len(_ORIENTATIONS)), key=lambda number: cosines[number].sum())
    return _ORIENTATIONS[best], bool(cosines[best].min() >= _COSINE_OF_A_DEGREE)


def pixel_aspect_of(stream: VideoStream) -> Callable[[], Fraction | None]:
    """Return what says the width / height of the pixels now: the container if it does, else the frames last decoded."""
    container, context = stream.sample_aspect_ratio, stream.codec_context
    is_said = container != context.sample_aspect_ratio

    def now() -> Fraction | None:
        coded = None if is_said else context.sample_aspect_ratio
        return coded or container

    return now


class PictureMaker:
    """Makes the pictures of one clip for a codec of `sharding.media.codecs`; the first frame decides their size.

    `pixel_aspect` says width / height of the source's pixels now; None: unknown, hence square.
    """

    def __init__(self, video: VideoParameters, *, pixel_aspect: Callable[[], Fraction | None] = lambda: None) -> None:
        self._video, self._pixel_aspect = video, pixel_aspect
        self._form = FULL_RANGE if stored_codec(video.codec).has_frame_ranges else LIMITED_RANGE
        self._scaler, self._rgb_scaler = VideoReformatter(), VideoReformatter()
        self._size = self._even_size = (0, 0)
        self._shape: tuple[int, int, Fraction | None, Orientation] | None = None
        self._is_stretched = False
        self._facts: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        self._notes: set[str] = set()

    @property
    def changes(self) -> Mapping[str, Any]:
        """What was done to the frames so far, beside scaling."""
        return {**self._facts, **self._counts}

    @property
    def notes(self) -> tuple[str, ...]:
        """Kinds of what a user should know about it."""
        return tuple(sorted(self._notes))

    def prepared(self, frames: Iterator[TimedFrame]) -> Iterator[TimedFrame]:
        """The same frames at the same times, ready to be scaled: those that are marked as interlaced deinterlaced.

        Give every frame of the segment: an interlaced one is made from its neighbours too.
        """
        chain: _FilterChain | None = None
        for frame in frames:
            deinterlace = False
            if frame.picture.interlaced_frame:
                large_enough = min(frame.picture.width, frame.picture.height) >= 3  # for yadif
                deinterlace = self._video.interlaced != "keep" and large_enough
                self._counts["deinterlaced_frames" if deinterlace else "interlaced_frames_kept"] += 1
                self._notes.add("deinterlaced" if deinterlace else "interlaced, kept")
            if chain is None or not chain.takes(frame.picture, deinterlace=deinterlace):
                yield from chain.add(None) if chain else ()
                chain = _FilterChain(frame.picture, deinterlace=deinterlace)
            yield from chain.add(frame)
        yield from chain.add(None) if chain else ()

    def upright(self, frame: TimedFrame) -> av.VideoFrame:
        """Return the frame's picture scaled to square pixels, converted and turned as its display matrix says.

        Raises:
            MediaError: ``decode_error`` for a pixel format or colour matrix that cannot be converted; ``hdr``.
        """
        picture, orientation = frame.picture, self._orientation(frame.display_matrix)
        width, height = self._stored_size(picture, orientation)
        if orientation.transposed:
            width, height = height, width
        stored = self._reformatted(
            self._scaler,
            self._in_standard_colour(picture, width, height),
            width,
            height,
            self._form.pixel_format,
            self._form.colour_range,
            self._form.colour_space,
        )
        return stored if orientation == _UPRIGHT else self._turned(stored, orientation)

    def _orientation(self, display_matrix: bytes | None) -> Orientation:
        if display_matrix is None:
            return _UPRIGHT
        orientation, is_exact = orientation_of(display_matrix)
        if orientation != _UPRIGHT:
            self._facts["orientation"] = str(orientation)
        if orientation.is_mirrored:
            self._notes.add("mirrored")
        if not is_exact:
            self._notes.add("tilt not applied")
        return orientation

    def _stored_size(self, picture: av.VideoFrame, orientation: Orientation) -> tuple[int, int]:
        """Of the upright picture: the first frame's; others are stretched to it."""
        shape = picture.width, picture.height, self._pixel_aspect(), orientation
        if shape != self._shape:  # one shape per clip, as a rule: fractions are left out for all but its first frame
            self._shape, self._is_stretched = shape, not self._fits(*shape)
        if self._is_stretched:
            self._counts["stretched_frames"] += 1
            self._notes.add("shape changes inside the clip")
        return self._size

    def _fits(self, width: int, height: int, said_aspect: Fraction | None, orientation: Orientation) -> bool:
        """Return whether frames of that shape have the stored one, which the first frame decides."""
        aspect = said_aspect or Fraction(1)
        if not _LEAST_ASPECT <= aspect <= _MOST_ASPECT:
            self._notes.add("absurd pixel aspect ignored")
            aspect = Fraction(1)
        if aspect != 1:
            self._facts["pixel_aspect"] = f"{aspect.numerator}:{aspect.denominator}"
        even, stored = (
            output_size(width, height, self._video.short_side, aspect, multiple=multiple)
            for multiple in (None, self._video.side_multiple)
        )
        own = (even[1], even[0]) if orientation.transposed else even
        if self._size == (0, 0):
            self._size, self._even_size = (stored[1], stored[0]) if orientation.transposed else stored, own
        first_width, first_height = self._even_size  # shapes are compared before they are rounded to larger multiples
        shape, first = own[0] / own[1], first_width / first_height
        return abs(shape / first - 1) <= _SAME_SHAPE or abs(own[0] - first_width * own[1] / first_height) <= 2

    def _in_standard_colour(self, picture: av.VideoFrame, width: int, height: int) -> av.VideoFrame:
        """Return the frame itself, or scaled and in BT.709 where it has a high dynamic range or a wide gamut."""
        transfer, primaries = picture.color_trc, picture.color_primaries
        if transfer in HDR_TRANSFERS:
            if self._video.hdr == "refuse":
                found = HDR_TRANSFERS[transfer]
                raise MediaError("hdr", f"expected standard dynamic range, found {found}; --hdr tone-map converts it")
            self._facts["tone_mapped"] = HDR_TRANSFERS[transfer]
            self._notes.add("tone-mapped")
        elif primaries in WIDE_PRIMARIES:
            self._facts["converted_primaries"] = WIDE_PRIMARIES[primaries]
            self._notes.add("wide gamut converted")
        else:
            return picture
        wide = self._reformatted(self._rgb_scaler, picture, width, height, "rgb48le", colour_range=ColorRange.JPEG)
        rgb = standard_rgb(wide.to_ndarray(), transfer=transfer, primaries=primaries)
        return av.VideoFrame.from_ndarray(rgb, format="rgb24")

    def _reformatted(
        self,
        scaler: VideoReformatter,
        picture: av.VideoFrame,
        width: int,
        height: int,
        pixel_format: str,
        colour_range: ColorRange,
        colour_space: Colorspace | None = None,
    ) -> av.VideoFrame:
        try:
            return scaler.reformat(
                picture,
                width,
                height,
                format=pixel_format,
                src_colorspace=self._matrix(picture),
                dst_colorspace=colour_space,
                dst_color_range=colour_range,
                interpolation=_SCALER,
                threads=1,
            )
        except av.error.MemoryError:
            raise
        except (ValueError, OSError) as error:
            raise MediaError(
                "decode_error",
                f"pixel format {picture.format.name}, colour matrix {picture.colorspace} of H.273: cannot be "
                f"converted ({error}); re-encode the source as yuv420p in BT.709",
            ) from error

    def _matrix(self, picture: av.VideoFrame) -> Colorspace | None:
        """Return the source's colour matrix where the scaler needs to be told; None: the frame says it."""
        if picture.format.is_rgb or len(picture.format.components) < 3:
            return None
        if picture.colorspace == _DERIVED_MATRIX:
            return _MATRIX_OF_PRIMARIES.get(picture.color_primaries, Colorspace.ITU601)
        if picture.colorspace not in _UNSPECIFIED_MATRICES:
            return None
        if picture.color_trc in HDR_TRANSFERS or picture.color_primaries == _BT2020:
            return Colorspace.BT2020
        if picture.width >= 1280 or picture.height > 576:
            self._notes.add("large picture without a colour matrix, taken for BT.601")
        return Colorspace.ITU601

    def _turned(self, picture: av.VideoFrame, orientation: Orientation) -> av.VideoFrame:
        """Return the planes of a 4:2:0 frame as they are shown."""
        width, height = picture.width, picture.height
        flat = picture.to_ndarray().reshape(-1)
        luma, chroma = width * height, width * height // 4
        shapes = (
            (0, luma, height, width),
            (luma, chroma, height // 2, width // 2),
            (luma + chroma, chroma, height // 2, width // 2),
        )
        planes = [
            orientation.applied(flat[at : at + size].reshape(rows, columns)) for at, size, rows, columns in shapes
        ]
        rows, columns = planes[0].shape
        data = np.concatenate([plane.reshape(-1) for plane in planes]).reshape(rows * 3 // 2, columns)
        turned = av.VideoFrame.from_ndarray(data, format=self._form.pixel_format)
        turned.color_range, turned.colorspace = self._form.colour_range, self._form.colour_space
        return turned


class _FilterChain:
    """FFmpeg's filters over frames of one size and format: a frame out for each one in.

    yadif, if asked for, leaves unmarked frames as they are. Where the source says its chroma samples lie is dropped:
    the scaler would keep that place, and JPEG has another. Without it, chroma is scaled about the picture's centre.
    """

    def __init__(self, picture: av.VideoFrame, *, deinterlace: bool) -> None:
        self._kind, self._deinterlaces = _kind(picture), deinterlace
        self._waiting: deque[TimedFrame] = deque()
        self._graph = Graph()
        self._graph.threads = 1
        source = self._graph.add(
            "buffer",
            video_size=f"{picture.width}x{picture.height}",
            pix_fmt=picture.format.name,
            time_base="1/90000",
            colorspace=str(picture.colorspace),
            range=str(picture.color_range),
        )
        filters = [self._graph.add("setparams", chroma_location="unspecified"), self._graph.add("buffersink")]
        if deinterlace:
            filters.insert(0, self._graph.add("yadif", mode="send_frame", parity="auto", deint="interlaced"))
        self._graph.link_nodes(source, *filters).configure()

    def takes(self, picture: av.VideoFrame, *, deinterlace: bool) -> bool:
        """Return whether the frame can follow those before it."""
        return _kind(picture) == self._kind and self._deinterlaces >= deinterlace

    def add(self, frame: TimedFrame | None) -> Iterator[TimedFrame]:
        """Give one more frame, or None after the last, and take those that are done."""
        if frame is not None:
            self._waiting.append(frame)
        self._graph.push(None if frame is None else frame.picture)
        while self._waiting:
            try:
                picture = self._graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                break
            assert isinstance(picture, av.VideoFrame)
            whose = self._waiting.popleft()
            yield TimedFrame(picture, whose.seconds, whose.duration, whose.display_matrix)
        if frame is None and self._waiting:
            raise RuntimeError("the filters did not give a frame for each one; this FFmpeg cannot be used")


def _kind(picture: av.VideoFrame) -> tuple[int, int, str, int, int]:
    return picture.width, picture.height, picture.format.name, picture.colorspace, picture.color_range
