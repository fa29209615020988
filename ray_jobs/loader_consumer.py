"""What stands behind the loader when ``ca2st bench loader`` asks whether data or compute is the limit."""

from collections.abc import Callable

import torch

from ca2st.batch import ClipBatch
from ca2st.benchmark.case import TARGETS
from ca2st.benchmark.config import model_config
from ca2st.model.build import build_model
from ca2st.model.precision import held_precision, hold_experts
from ca2st.spec import ClipSpec
from ca2st.training.losses import loss_per_clip

_RATE = 1e-4


def training_consumer(
    kind: str, size: str, *, num_layers: int | None, clip: ClipSpec
) -> tuple[Callable[[ClipBatch], None], str]:
    """Training steps of a model with frozen experts on whatever batch comes, and what they are called.

    On a GPU in bf16 with all layers, else in fp32 with `num_layers` (None: 2).
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    layers = num_layers or (None if on_gpu else 2)
    model = build_model(model_config(kind, size, num_layers=layers), clip, TARGETS)
    hold_experts(model, held_precision("auto", training="bf16" if on_gpu else "fp32", device=device.type))
    model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=_RATE)

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
