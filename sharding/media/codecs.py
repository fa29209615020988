"""The codecs in which clips are stored."""

from dataclasses import dataclass

from ca2st.errors import UserInputError, check_choice

DEFAULT_GOP_FRAMES = 8
"""Frames from one key frame to the next: half a second at 16 fps; a reader decodes at most this many for one."""
MOST_GOP_FRAMES = 600
SIDE_MULTIPLE = 16
"""Both sides of stored pictures are multiples of this: a block of every codec. A GPU's decoder, made for whole blocks,
then serves the next clip of its size too; for other sizes DALI 2.4 makes another for every clip, some 50 ms each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredCodec:
    """A value of ``--codec``."""

    name: str
    has_frame_ranges: bool
    """Whether the index names the bytes of single frames; else a reader takes the whole member."""
    pixel_format: str
    """FFmpeg's name."""
    colour: str
    """Matrix and range of the stored pixels."""
    quality_scale: str
    """What ``--quality`` means."""
    best_quality: int
    worst_quality: int
    default_quality: int
    """Measured in RGB on an animation film at short side 256: mjpeg 34.5 dB, the others 36 to 37.5 dB."""
    smallest_side: int
    """Pixels of the shortest side the encoder takes."""
    sample_entries: tuple[bytes, ...]
    """Names the codec goes by in an MP4's sample description."""
    frame_bytes: int
    """Measured size of a frame at short side 256 and default quality."""

    quality_exponent: float
    """A frame's size goes with quality to minus this power, measured near the default."""

    def expected_frame_bytes(self, short_side: int, quality: int) -> float:
        """Return bytes of a frame of ordinary content, 4:3 to 16:9."""
        relative: float = (self.default_quality / quality) ** self.quality_exponent
        return self.frame_bytes * (short_side / 256) ** 2 * relative

    def check_quality(self, quality: int) -> None:
        """Raise UserInputError unless the quality lies on the codec's scale."""
        if not self.best_quality <= quality <= self.worst_quality:
            raise UserInputError(
                f"quality: expected {self.best_quality} (best) to {self.worst_quality}, the {self.quality_scale} "
                f"of {self.name}, found {quality}"
            )


_CODECS = (
    StoredCodec(
        name="mjpeg",
        has_frame_ranges=True,
        pixel_format="yuvj420p",
        colour="bt601-full",
        quality_scale="quantiser",
        best_quality=2,
        worst_quality=31,
        default_quality=5,
        smallest_side=2,
        sample_entries=(b"mp4v", b"jpeg"),
        frame_bytes=13_600,
        quality_exponent=0.55,
    ),
    StoredCodec(
        name="h264",
        has_frame_ranges=False,
        pixel_format="yuv420p",
        colour="bt601-limited",
        quality_scale="constant rate factor (x264)",
        best_quality=1,
        worst_quality=51,
        default_quality=20,
        smallest_side=2,
        sample_entries=(b"avc1",),
        frame_bytes=4_900,
        quality_exponent=2.5,
    ),
    StoredCodec(
        name="hevc",
        has_frame_ranges=False,
        pixel_format="yuv420p",
        colour="bt601-limited",
        quality_scale="constant rate factor (x265)",
        best_quality=1,
        worst_quality=51,
        default_quality=23,
        smallest_side=16,
        sample_entries=(b"hev1", b"hvc1"),
        frame_bytes=3_200,
        quality_exponent=2.5,
    ),
    StoredCodec(
        name="vp9",
        has_frame_ranges=False,
        pixel_format="yuv420p",
        colour="bt601-limited",
        quality_scale="constant quality (libvpx)",
        best_quality=1,
        worst_quality=63,
        default_quality=30,
        smallest_side=2,
        sample_entries=(b"vp09",),
        frame_bytes=3_800,
        quality_exponent=1.4,
    ),
)
STORED_CODECS: dict[str, StoredCodec] = {codec.name: codec for codec in _CODECS}
"""Every codec by name."""


def stored_codec(name: str) -> StoredCodec:
    """Return the codec of that name.

    Raises:
        UserInputError: none has it; the message lists those there are.
    """
    check_choice("codec", name, STORED_CODECS)
    return STORED_CODECS[name]
