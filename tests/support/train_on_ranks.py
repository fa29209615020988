"""One rank of a training of the tiny model: ``python -m torch.distributed.run ... train_on_ranks.py OPTIONS``.

Options are JSON: ``folder``; ``fault`` and ``fault_rank``; ``spoil_rank``, whose loader fails at step 6;
``poison_rank``, whose clips are not numbers at step 6; ``stop_rank``, which gets a SIGTERM after step 5; ``dropout``;
those of `SETTINGS`. Ends with the exit code that the command line would give.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor

from ca2st.batch import ClipBatch
from ca2st.durable import NO_FAULTS, FaultPoints
from ca2st.errors import CA2STError, DataDamageError
from ca2st.training.loop import train
from ca2st.training.settings import TrainingProgress
from ca2st.training.sharded import shard_model
from ca2st.training.signals import stop_on_signals
from ca2st.training.step import make_accelerator
from support.tiny_training import TinyEvaluation, TinyModel, TinySource, tiny_settings

SETTINGS = ("max_steps", "per_device_batch_size", "max_skipped_steps", "sharded", "ema_decay", "clip_grad_norm")


class Source(TinySource):
    """Fails, or gives numbers that are none, at step 6 of the run."""

    def __init__(self, *, spoilt: bool, poisoned: bool, stopped: bool, **options: int) -> None:
        super().__init__(**options)
        self.spoilt, self.poisoned, self.stopped = spoilt, poisoned, stopped

    def make(self, clips: list[dict[str, Tensor]], keys: list[str], *, epoch: int, step: int) -> ClipBatch:
        batch = super().make(clips, keys, epoch=epoch, step=step)
        if (epoch, step) == (1, 1):
            if self.spoilt:
                raise DataDamageError("shard 7, clip-3: damaged")
            if self.poisoned:
                batch.mel[0] = torch.nan
        if (epoch, step) == (1, 0) and self.stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch


def main() -> None:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    changes = {name: options[name] for name in SETTINGS if name in options}
    settings = tiny_settings(Path(options["folder"]), **changes)
    accelerator = make_accelerator(settings.config, cpu=True)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    faults = FaultPoints.parse(options["fault"]) if options.get("fault_rank") == rank else NO_FAULTS
    settings = tiny_settings(settings.folder, faults=faults, progress=show, **changes)
    source = Source(
        spoilt=options.get("spoil_rank") == rank,
        poisoned=options.get("poison_rank") == rank,
        stopped=options.get("stop_rank") == rank,
        rank=rank,
        world_size=world_size,
        seed=settings.config.seed,
    )
    model = TinyModel(dropout=options.get("dropout", 0.3))
    if settings.config.sharded:
        shard_model(model, [model.expert, *model.layers], device=accelerator.device)
    validation = TinyEvaluation(rank=rank, world_size=world_size)
    try:
        with stop_on_signals(grace_seconds=20.0) as stop:
            train(
                model,
                source,
                accelerator=accelerator,
                settings=settings,
                validation=validation,
                stop=stop,
            )
    except CA2STError as error:
        sys.stderr.write(f"rank {rank}: {type(error).__name__}: {error}\n")
        sys.stderr.flush()
        os._exit(error.exit_code)
    accelerator.end_training()


def show(state: TrainingProgress) -> None:
    sys.stdout.write(f"step {state.step}\n")


if __name__ == "__main__":
    main()
