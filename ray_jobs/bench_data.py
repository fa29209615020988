"""What every bench reads: files and shards, and a model's training step behind the loader."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ca2st.batch import ClipBatch
from ca2st.benchmark.case import TARGETS, model_config
from ca2st.errors import UserInputError
from ca2st.model.network import build_model, held_precision, hold_experts
from ca2st.processes import num_cores
from ca2st.spec import ClipSpec
from ca2st.training.losses import loss_per_clip
from pipelines.benchmark.clips import BenchSources, DrawnClips, draw_clips, source_list, video_files
from ray_jobs.console import convert_shown, progress
from sharding.settings import ConversionConfig

_LEARNING_RATE = 1e-4


@contextlib.contextmanager
def bench_sources(
    clips: int, *, codec: str, data: Path | None, media: Path | None, work: Path | None
) -> Iterator[BenchSources]:
    """Own shards with their originals, or files (drawn or own) and the shards made of them.

    Raises:
        UserInputError: shards without the folder of their originals, or a folder without videos.
    """
    if data is not None:
        if media is None:
            raise UserInputError("--data: expected --media too, the folder of the shards' originals for the baseline")
        yield BenchSources(data, video_files(media))
        return
    config = ConversionConfig(codec=codec, workers=num_cores(), audio_policy="optional")
    with work_folder(work) as folder:
        files = source_files(clips, media, folder)
        shards = folder / f"shards-{codec}-{len(files)}"
        convert_shown(source_list(files), shards, config)
        yield BenchSources(shards, files)


def source_files(clips: int, media: Path | None, folder: Path) -> tuple[Path, ...]:
    """Return the video files of `media`, or `clips` drawn ones under `folder`.

    Raises:
        UserInputError: `media` holds no video.
    """
    if media is not None:
        return video_files(media)
    with progress("Drawing source files", clips) as update:
        return draw_clips(DrawnClips(count=clips), folder / "sources", update=lambda done: update(done, ""))


@contextlib.contextmanager
def work_folder(work: Path | None) -> Iterator[Path]:
    """`work`, made where it is missing and kept, or a temporary folder."""
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="ca2st-bench-") as folder:
        yield Path(folder)


def training_consumer(
    kind: str, size: str, *, num_layers: int | None, clip: ClipSpec, device: torch.device | None = None
) -> tuple[Callable[[ClipBatch], None], str]:
    """Return training steps of a model with frozen experts on whatever batch comes, and what they are called.

    On a GPU in bf16 with all layers, else in fp32 with `num_layers` (None: 2); `device` None: a GPU where there is one.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    layers = num_layers or (None if on_gpu else 2)
    model = build_model(model_config(kind, size, num_layers=layers), clip, TARGETS)
    hold_experts(model, held_precision("auto", training="bf16" if on_gpu else "fp32", device=device.type))
    model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=_LEARNING_RATE)

    def consume(batch: ClipBatch) -> None:
        batch = batch.to(device)
        labels = torch.zeros_like(batch.labels[:, :1])
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on_gpu):
            logits = model(batch.normalised_video(), batch.mel, batch.intervals_seconds).logits
        loss_per_clip(logits, labels, targets=("label",), smoothing=0.1).mean().backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()

    depth = "all" if layers is None else str(layers)
    return consume, f"training step of {kind} {size}, {depth} layers, {'bf16' if on_gpu else 'fp32'} on {device.type}"
