"""Frames and sound into an ordinary mp4: H.264 where this PyAV has it (MPEG-4 part 2 where not) with AAC."""

import io
from fractions import Fraction

import av
import numpy as np
from jaxtyping import Float, UInt8

_ENCODERS: dict[str, dict[str, str]] = {
    "libx264": {"preset": "veryfast", "crf": "20", "mbtree": "0", "threads": "1", "flags": "+bitexact"},
    "mpeg4": {"qscale": "2", "threads": "1", "flags": "+bitexact"},
}
"""Encoder options. ``mbtree`` off: on frames of a few macroblocks x264's look-ahead gives other bytes every time."""


def video_encoder() -> str:
    """Name of the video encoder this machine's PyAV offers, the best first."""
    return next(name for name in _ENCODERS if name in av.codecs_available)


def tool_versions() -> dict[str, str]:
    """What decides the bytes beside the settings."""
    libraries = {name: ".".join(map(str, version)) for name, version in av.library_versions.items()}
    return {"encoder": video_encoder(), "av": av.__version__, "numpy": np.__version__, **libraries}


def encode_clip(
    frames: UInt8[np.ndarray, "frames height width 3"],
    sound: Float[np.ndarray, "num_samples"],
    *,
    frames_per_second: int,
    sample_rate_hz: int,
) -> bytes:
    """The bytes of an mp4 with one video and one mono audio stream; the same input gives the same bytes."""
    sink, name = io.BytesIO(), video_encoder()
    with av.open(sink, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        video = container.add_stream(name, rate=frames_per_second, options=_ENCODERS[name])
        assert isinstance(video, av.VideoStream)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1
        audio = container.add_stream("aac", rate=sample_rate_hz, layout="mono", options={"flags": "+bitexact"})
        audio.codec_context.thread_count = 1
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())
        samples = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        samples.sample_rate, samples.pts, samples.time_base = sample_rate_hz, 0, Fraction(1, sample_rate_hz)
        container.mux(audio.encode(samples))
        container.mux(audio.encode())
    return sink.getvalue()
