"""The plain loop that people write first: one process, PyAV, Pillow, torchaudio, webdataset's ShardWriter.

No strict decoding, no checks, no index, no resuming: every frame as a JPEG member, the log-mel spectrogram as an npy.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sharding.manifest import AudioParameters

_JPEG_QUALITY = 85
"""About the size of the converter's quantiser 5."""


def convert_plainly(files: Sequence[Path], out: Path, *, short_side: int, audio: AudioParameters) -> int:
    """Write `files` as a WebDataset under the new folder `out`; returns its bytes."""
    from webdataset import ShardWriter

    out.mkdir()
    with ShardWriter(str(out / "plain-%06d.tar"), verbose=0) as writer:
        for number, file in enumerate(files):
            frames = {f"{i:05d}.jpg": jpeg for i, jpeg in enumerate(_jpegs(file, short_side))}
            mel = _log_mel(file, audio)
            writer.write({"__key__": f"{number:06d}", **frames, "mel.npy": mel, "json": {"source": file.name}})
    return sum(path.stat().st_size for path in out.iterdir())


def _jpegs(file: Path, short_side: int) -> list[bytes]:
    jpegs = []
    with av.open(str(file)) as container:
        for frame in container.decode(video=0):
            picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
            scale = min(1.0, short_side / min(picture.size))
            if scale < 1:
                picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BICUBIC)
            sink = io.BytesIO()
            picture.save(sink, "JPEG", quality=_JPEG_QUALITY)
            jpegs.append(sink.getvalue())
    return jpegs


def _log_mel(file: Path, audio: AudioParameters) -> np.ndarray[tuple[int, int], np.dtype[np.float16]]:
    from torchaudio.compliance.kaldi import fbank
    from torchaudio.functional import resample

    with av.open(str(file)) as container:
        if not container.streams.audio:
            return np.zeros((0, audio.num_mel_bins), np.float16)
        rate = container.streams.audio[0].rate
        blocks = [frame.to_ndarray() for frame in container.decode(audio=0)]
    wave: Float[Tensor, "1 samples"] = torch.from_numpy(np.concatenate(blocks, axis=1)).float().mean(0, keepdim=True)
    wave = resample(wave, rate, audio.sample_rate_hz)
    rows = fbank(
        wave - wave.mean(),
        sample_frequency=audio.sample_rate_hz,
        num_mel_bins=audio.num_mel_bins,
        htk_compat=True,
        use_energy=False,
        window_type="hanning",
        dither=0.0,
    )
    return np.asarray(rows.numpy(), dtype=np.float16)
