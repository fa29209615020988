"""Compares gradients of whole models with those of the same models spread over ranks; rank 0 prints a line per model.

``largest_difference`` is relative to each gradient's largest value; ``held`` the share of the weights on one rank.
"""

import json
import sys
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from ca2st.model.network import HolisticModel, hold_experts
from ca2st.training.config import TrainingConfig
from ca2st.training.sharded import shard_model, whole
from ca2st.training.step import make_accelerator
from ray_jobs.runs.worker import units_of
from support.models import inputs_for, tiny_model, wake


def models() -> Iterator[tuple[str, HolisticModel]]:
    for kind in ("cast", "cava", "ca2st"):
        yield kind, tiny_model(kind)
    yield "resnet50", tiny_model("cast", spatial_encoder="resnet50", depth=4)
    checkpointed = tiny_model("ca2st")
    checkpointed.activation_checkpointing = True
    yield "checkpointed", checkpointed
    held = tiny_model("ca2st")
    hold_experts(held, "bf16")
    yield "bf16", held


def gradients(model: HolisticModel, accelerator: Accelerator, *, low: bool) -> dict[str, Tensor]:
    """The mean over ranks, each of which has a clip and a mask of its own."""
    rank, found = accelerator.process_index, dict[str, Tensor]()
    torch.manual_seed(rank)
    model.train()
    for _ in range(2):  # a second micro-batch is added
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits = model(*inputs_for(seed=rank)).logits
        sum(values.float().square().sum() for values in logits.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = whole(parameter.grad)
            if not isinstance(parameter, DTensor):
                gradient = accelerator.reduce(gradient, reduction="mean")
            found[name] = gradient
            parameter.grad = None
    return found


def main() -> None:
    torch.set_num_threads(1)
    accelerator = make_accelerator(TrainingConfig(), cpu=True)
    for name, model in models():
        wake(model.layers)
        wake(model.head)
        count = sum(parameter.numel() for parameter in model.parameters())
        expected = gradients(model, accelerator, low=name == "bf16")
        shard_model(model, units_of(model), device=accelerator.device)
        found = gradients(model, accelerator, low=name == "bf16")
        assert found.keys() == expected.keys()
        differences = [
            float((found[key] - value).abs().max() / value.abs().max().clamp(min=1e-12))
            for key, value in expected.items()
        ]
        held = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)) / count
        if accelerator.is_main_process:
            told = {"model": name, "largest_difference": max(differences), "held": held}
            sys.stdout.write(json.dumps(told) + "\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
