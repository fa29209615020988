"""How much is measured: everything on a GPU, or as little as possible, to try the program itself."""

from dataclasses import dataclass, field
from typing import Literal

from ca2st.errors import EnvironmentFault
from ca2st.spec import ClipSpec
from pipelines.benchmark.drawn_clips import DrawnClips
from pipelines.hardware.mp4_damage import DAMAGES
from sharding.codecs import STORED_CODECS

PartName = Literal["device", "limits", "parity", "speed", "damage", "model"]
BUDGETS: dict[PartName, float] = {
    "device": 40.0,
    "limits": 40.0,
    "parity": 70.0,
    "speed": 190.0,
    "damage": 100.0,
    "model": 150.0,
}
"""Seconds that a part may take, its process's start included; together less than ten minutes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuCheckSettings:
    """Sizes of a run."""

    device: Literal["cuda", "cpu"] = "cuda"
    """``cpu``: a dry run, by the backends for the CPU; its numbers say nothing of a GPU."""
    clip: ClipSpec = field(default_factory=ClipSpec)
    """A view: 16 frames of 224 pixels."""
    codecs: tuple[str, ...] = tuple(STORED_CODECS)
    """Those that are tried."""
    drawn: DrawnClips = field(default_factory=lambda: DrawnClips(count=8, width=340, height=256, num_frames=96))
    """Different clips in each codec: the short side that shards have, and more than the engines' smallest pictures."""
    batch: int = 32
    """Clips of a step."""
    seconds_per_case: float = 2.5
    """Measured time of each case of speed."""
    gops: tuple[int, ...] = (4, 8, 16, 32)
    """Frames from key frame to key frame."""
    threads: tuple[int, ...] = (1, 4, 7, 8)
    """Threads that feed the decoders: Hopper has 7 video engines."""
    usual_gop: int = 8
    """The converter's default."""
    usual_threads: int = 7
    encoding_threads: int = 16
    """Clips that are encoded at once."""
    copy_bytes: int = 1 << 28
    product_size: int | None = None
    """Rows of the matrix product; None: 8192 on a GPU."""
    damages: tuple[str, ...] = tuple(DAMAGES)
    damage_seconds: float = 45.0
    """Time for one damaged clip, with the start of its process; longer is a hang."""
    damages_at_once: int = 6
    models: tuple[str, ...] = ("cast", "cava", "ca2st")
    model_size: str = "vit_b"
    num_layers: int | None = None
    """Layers of every expert; None: all."""
    model_batch: int = 24
    """Clips of a pass of the model."""
    model_seconds: float | None = 6.0
    """For each model's forward pass, and again for its training step; None: two passes."""

    @property
    def is_dry(self) -> bool:
        """Whether no GPU is measured."""
        return self.device == "cpu"


def dry_settings() -> GpuCheckSettings:
    """The smallest sizes that every part still works with."""
    return GpuCheckSettings(
        device="cpu",
        clip=ClipSpec(num_frames=4, crop_size=32, mel_rows=32, num_mel_bins=32),
        drawn=DrawnClips(count=2, width=80, height=64, num_frames=20),
        batch=2,
        seconds_per_case=0.01,
        gops=(4, 8),
        threads=(1,),
        usual_threads=1,
        encoding_threads=2,
        copy_bytes=1 << 16,
        product_size=128,
        damages=("none", "half"),
        damages_at_once=2,
        models=("cast",),
        model_size="vit_s",
        num_layers=1,
        model_batch=1,
        model_seconds=None,
    )


def gpu_settings() -> GpuCheckSettings:
    """Everything, on the GPU that torch takes first.

    Raises:
        EnvironmentFault: there is none that torch can use.
    """
    import torch

    if not torch.cuda.is_available():
        raise EnvironmentFault(
            "bench gpu: expected a CUDA device that torch can use, found none; run it where there is one, or try the "
            "program itself with --dry-run"
        )
    return GpuCheckSettings()
