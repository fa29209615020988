"""A model of a few hundred weights and sources of made-up clips: training's tests without model or pipelines."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from ca2st.batch import ClipBatch
from ca2st.training.config import OptimConfig, TrainingConfig
from ca2st.training.optim import ParameterRules
from ca2st.training.resume import RunRecord
from ca2st.training.settings import TrainingSettings
from ca2st.training.step import make_accelerator

TARGETS = {"verb": 5, "noun": 7}
WIDTH = 8


class TinyOutput(NamedTuple):
    logits: dict[str, Tensor]


class TinyModel(nn.Module):
    """A frozen expert, two trained layers with dropout, a position table, running statistics, one head per target."""

    def __init__(self, *, seed: int = 0, classes: dict[str, int] = TARGETS, dropout: float = 0.3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.expert = nn.Linear(6, WIDTH)
            self.expert.register_buffer("table", torch.randn(WIDTH))
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
            self.positions = nn.Parameter(torch.randn(1, WIDTH) * 0.1)
            self.norm = nn.LayerNorm(WIDTH)
            self.norm.register_buffer("count", torch.zeros(1))
            self.head = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in classes.items()})
        self.dropout = nn.Dropout(dropout)
        self.expert.requires_grad_(False)

    def forward(
        self, video: Tensor, mel: Tensor, intervals_seconds: Tensor, has_audio: Tensor | None = None
    ) -> TinyOutput:
        parts = [video.mean(dim=(2, 3, 4)), mel.mean(dim=1)[:, :2], intervals_seconds[:, 0, :1]]
        hidden = self.expert(torch.cat(parts, dim=1)) + self.positions + self.expert.table * 0
        for layer in self.layers:
            hidden = hidden + self.dropout(torch.tanh(layer(hidden)))
        hidden = self.norm(hidden)
        if self.training:
            self.norm.count += 1
        return TinyOutput({name: head(hidden) for name, head in self.head.items()})


def tiny_rules() -> ParameterRules:
    def layer_index(name: str) -> int | None:
        parts = name.split(".")
        return int(parts[1]) if parts[0] == "layers" else None

    return ParameterRules(layer_index=layer_index, num_layers=2, no_weight_decay={"positions"})


def clip(key: str, *, epoch: int = 0, view: int = 0) -> dict[str, Tensor]:
    """A clip that is a function of its key, its epoch's draw and its view."""
    digest = hashlib.sha256(f"{key}/{epoch}/{view}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    number = int(key.rpartition("-")[2])
    return {
        "video": torch.randint(0, 256, (3, 2, 4, 4), generator=generator, dtype=torch.uint8),
        "mel": torch.randn(4, 4, generator=generator),
        "intervals_seconds": torch.rand(2, 2, generator=generator),
        "labels": torch.tensor([number % size for size in TARGETS.values()]),
        "has_audio": torch.tensor(True),
    }


def batch_of(clips: list[dict[str, Tensor]], keys: list[str], *, padding: int = 0) -> ClipBatch:
    columns = {name: torch.stack([one[name] for one in clips]) for name in clips[0]}
    is_padding = torch.arange(len(keys)) >= len(keys) - padding
    return ClipBatch(**columns, sample_ids=tuple(keys), is_padding=is_padding)


class TinySource:
    """Clips in an order keyed by (seed, epoch); rank r of W takes positions floor(rB/W) .. floor((r+1)B/W)."""

    def __init__(
        self, *, num_samples: int = 26, global_batch_size: int = 6, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        self.keys = [f"clip-{index}" for index in range(num_samples)]
        self.global_batch_size, self.rank, self.world_size, self.seed = global_batch_size, rank, world_size, seed
        self.open_iterators = 0

    @property
    def steps_per_epoch(self) -> int:
        return len(self.keys) // self.global_batch_size

    def keys_of_step(self, epoch: int, step: int) -> list[str]:
        order = torch.randperm(len(self.keys), generator=torch.Generator().manual_seed(1000 * self.seed + epoch))
        positions = order[step * self.global_batch_size : (step + 1) * self.global_batch_size]
        return [self.keys[position] for position in positions.tolist()]

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[ClipBatch]:
        self.open_iterators += 1
        try:
            for step in range(first_step, self.steps_per_epoch):
                keys = self.keys_of_step(epoch, step)
                size, world = self.global_batch_size, self.world_size
                own = keys[self.rank * size // world : (self.rank + 1) * size // world]
                yield self.make([clip(key, epoch=epoch) for key in own], own, epoch=epoch, step=step)
        finally:
            self.open_iterators -= 1

    def make(self, clips: list[dict[str, Tensor]], keys: list[str], *, epoch: int, step: int) -> ClipBatch:
        """Where a test's source spoils a batch."""
        return batch_of(clips, keys)


class TinyEvaluation:
    """Every sample by two views, dealt to ranks in turn; the last batches are padded to equal numbers."""

    def __init__(self, *, num_samples: int = 11, rank: int = 0, world_size: int = 1) -> None:
        self.keys = tuple(f"val-{index}" for index in range(num_samples))
        self.rank, self.world_size = rank, world_size

    @property
    def num_samples(self) -> int:
        return len(self.keys)

    def sample_ids(self) -> tuple[str, ...]:
        return self.keys

    def batches(self) -> Iterator[ClipBatch]:
        steps = -(-len(self.keys) // self.world_size)
        for step in range(steps):
            index = step * self.world_size + self.rank
            real = index < len(self.keys)
            key = self.keys[index if real else 0]
            views = [clip(key, view=view) for view in range(2)]
            yield batch_of(views, [key, key], padding=0 if real else 2)


def tiny_settings(folder: Path, **changes: object) -> TrainingSettings:
    """Settings of a run of two epochs of four steps; `changes` go to TrainingConfig, OptimConfig or the settings."""
    config = TrainingConfig(epochs=2, global_batch_size=6, per_device_batch_size=4, checkpoint_every_steps=3, seed=5)
    optim = OptimConfig(base_lr=0.5, min_lr=0.001, warmup_epochs=0.5, layer_decay=0.75)
    settings = TrainingSettings(
        folder=folder,
        config=replace(config, **{k: v for k, v in changes.items() if k in TrainingConfig.__slots__}),
        optim=replace(optim, **{k: v for k, v in changes.items() if k in OptimConfig.__slots__}),
        rules=tiny_rules(),
        targets=TARGETS,
        record=RunRecord(
            manifests={"train": "a" * 64}, recipe={"model": "tiny", "data": {"fold": 1}}, versions={"torch": "x"}
        ),
        lock_wait_seconds=0.0,
    )
    return replace(settings, **{k: v for k, v in changes.items() if k in TrainingSettings.__slots__})


def fresh_accelerator(settings: TrainingSettings) -> Accelerator:
    """As a new process would make it: Accelerate keeps its state in the class, torch its threads."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    return make_accelerator(settings.config, cpu=True)
