"""Keeps the clips of a step that went wrong, so that they can be looked at."""

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import save

from ca2st.batch import MIXING_FIELDS, ClipBatch
from ca2st.durable import write_bytes

FAILURES_NAME = "failures"
_MAX_CLIPS = 8


def keep_failing_clips(folder: Path, share: ClipBatch, keys: Collection[str], *, name: str) -> Path | None:
    """Write the tensors of up to eight clips of `share` that are among `keys` to ``failures/<name>.safetensors``.

    The keys are in the file's metadata, in order. A mixed clip is written as it was read, with what it kept and took
    (``mixing.*``). None when this rank has none of them.
    """
    rows = [index for index, key in enumerate(share.sample_ids) if key in keys][:_MAX_CLIPS]
    if not rows:
        return None
    index = torch.tensor(rows, device=share.labels.device)
    tensors = {
        field: getattr(share, field)[index.to(getattr(share, field).device)].cpu().contiguous()
        for field in ("video", "mel", "intervals_seconds", "labels", "has_audio")
    }
    if share.mixing is not None:
        tensors |= {f"mixing.{field}": getattr(share.mixing, field)[rows].contiguous() for field in MIXING_FIELDS}
    data = save(tensors, metadata={"sample_ids": "\n".join(share.sample_ids[row] for row in rows)})
    path = folder / FAILURES_NAME / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)
    return path
