"""Which codecs are read and written here, tried on a few frames.

Libraries are imported inside the checks: one that is missing is a finding of its own check, not the end of all.
"""

import io
from fractions import Fraction
from typing import TYPE_CHECKING

from ray_jobs.doctor.finding import Check, Finding

if TYPE_CHECKING:
    import numpy as np

_ENCODERS = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9", "mjpeg": "mjpeg"}
_QUIET = {"libx265": {"x265-params": "log-level=none"}}
_NUM_FRAMES, _SIZE = 4, 64
_MEND = "install the PyAV wheel of requirements.lock: it carries FFmpeg with all of these"


def video_checks() -> dict[str, Check]:
    """One round trip a codec."""
    return {f"video {codec}": lambda codec=codec: check_video(codec) for codec in _ENCODERS}  # type: ignore[misc]


def check_video(codec: str) -> Finding:
    """Encode a few frames, decode them again, compare."""
    import av
    import numpy as np

    name, encoder = f"video {codec}", _ENCODERS[codec]
    if encoder not in av.codecs_available:
        return Finding(name=name, ok=False, what=f"no encoder {encoder}", mend=_MEND, needed=codec == "mjpeg")
    frames = _frames()
    with av.open(io.BytesIO(_encoded(encoder, frames)), "r") as container:
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    if len(found) != len(frames):
        return Finding(name=name, ok=False, what=f"{len(frames)} frames in, {len(found)} out", mend=_MEND)
    error = float(np.abs(np.stack(found).astype(float) - frames).mean())
    ok = error < 16
    return Finding(
        name=name, ok=ok, what=f"{encoder} and back: {error:.1f} of 255 off on average", mend="" if ok else _MEND
    )


def check_audio() -> Finding:
    """Encode a second of AAC and decode it."""
    import av
    import numpy as np

    sink, rate = io.BytesIO(), 16_000
    tone = np.sin(np.arange(rate, dtype=np.float32) * (2 * np.pi * 440 / rate))[None]
    with av.open(sink, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    sink.seek(0)
    with av.open(sink, "r") as container:
        found = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    ok = len(found) >= rate and float(np.abs(found).max()) > 0.5
    return Finding(
        name="audio aac", ok=ok, what=f"{rate} samples in, {len(found)} out", mend="" if ok else _MEND, needed=False
    )


def check_dali() -> Finding:
    """DALI decodes a JPEG on the CPU, as training does, to the pixels of Pillow."""
    from pipelines.backends import dali_is_installed

    name, mend = "dali cpu", "pip install nvidia-dali-cuda130==2.4.0; until then the slower reference backend is used"
    if not dali_is_installed():
        return Finding(name=name, ok=False, what="nvidia-dali is not installed", mend=mend, needed=False)
    from importlib import metadata

    from pipelines.crops import CropBox
    from pipelines.dali_graph import DaliBackend
    from pipelines.reference import ReferenceBackend
    from pipelines.rendering import JpegFrames, RenderRequest
    from pipelines.stats import StatsRecorder

    request = RenderRequest(
        frames=JpegFrames(frames=(_jpeg(),) * 2),
        boxes=(CropBox(top=0, left=0, height=_SIZE, width=_SIZE),),
        flip=False,
        where="a picture of the doctor's",
    )
    dali = DaliBackend(num_frames=2, crop_size=_SIZE, views_per_clip=1, threads=1, stats=StatsRecorder())
    try:
        found = dali.render([request])
    finally:
        dali.close()
    expected = ReferenceBackend(crop_size=_SIZE, stats=StatsRecorder()).render([request])
    worst = int((found.int() - expected.int()).abs().max())
    version = metadata.version("nvidia-dali-cuda130")
    return Finding(
        name=name, ok=worst <= 1, what=f"DALI {version}: at most {worst} of 255 off Pillow", mend=mend, needed=False
    )


def _frames() -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    import numpy as np

    y, x = np.mgrid[:_SIZE, :_SIZE]
    return np.stack([np.stack([x * 3 + 4 * i, y * 3, x + y], axis=-1) for i in range(_NUM_FRAMES)]).astype(np.uint8)


def _encoded(encoder: str, frames: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> bytes:
    import av

    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as container:
        stream = container.add_stream(encoder, rate=25, options=_QUIET.get(encoder, {}))
        assert isinstance(stream, av.VideoStream)
        stream.width = stream.height = _SIZE
        stream.pix_fmt = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return sink.getvalue()


def _jpeg() -> bytes:
    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(_frames()[0]).save(sink, format="JPEG", quality=90)
    return sink.getvalue()
