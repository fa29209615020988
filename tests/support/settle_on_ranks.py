"""Makes the same update twice on every rank and prints whether both saw the same gradients, bit for bit.

The rate is 0, so both start from the same weights. The model is wide enough for several buckets, and uses its layers
in another order than it declares them, so that DistributedDataParallel regroups its buckets.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ca2st.training.optim import LearningRateSchedule, ParameterRules, build_optimizer
from ca2st.training.ranks import Ranks
from ca2st.training.step import Stepper, make_accelerator
from support.tiny_training import TARGETS, TinyOutput, TinySource, tiny_settings


class WideModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(300, 300) for _ in range(8))
        self.head = nn.ModuleDict({name: nn.Linear(300, size) for name, size in TARGETS.items()})

    def forward(
        self, video: Tensor, mel: Tensor, intervals_seconds: Tensor, has_audio: Tensor | None = None
    ) -> TinyOutput:
        hidden = nn.functional.pad(mel.flatten(1), (0, 284))
        for index in (3, 1, 7, 0, 2, 6, 4, 5):
            hidden = torch.tanh(self.layers[index](hidden))
        return TinyOutput({name: head(hidden) for name, head in self.head.items()})


def main() -> None:
    torch.set_num_threads(1)
    settings = tiny_settings(Path("unused"), per_device_batch_size=1, layer_decay=1.0)
    accelerator = make_accelerator(settings.config, cpu=True)
    ranks = Ranks(accelerator)
    model = WideModel()
    optimizer = build_optimizer(
        model, settings.optim, rules=ParameterRules(layer_index=lambda name: None, num_layers=1)
    )
    seen: list[list[Tensor]] = []

    def record(*_: Any) -> None:
        seen.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])

    optimizer.register_step_pre_hook(record)
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    stepper = Stepper(
        prepared,
        prepared_optimizer,
        accelerator=accelerator,
        ranks=ranks,
        settings=settings,
        schedule=LearningRateSchedule(peak=1.0, minimum=0.0, warmup_steps=1, total_steps=2),
    )
    share = next(TinySource(rank=ranks.rank, world_size=ranks.world_size).batches(0))
    keys = ranks.gather(share.sample_ids)
    for _ in range(2):
        stepper.update(share, keys, step=1)
    same = all(torch.equal(one, other) for one, other in zip(*seen, strict=True))
    if ranks.is_main:
        sys.stdout.write(f"{len(seen[0])} gradients, same: {same}\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
