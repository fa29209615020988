"""Trains the tiny model in forked children, each with a fault of its own: one slow import for many kills.

``python kill_zygote.py ROOT FAULT...``: for each fault ``name=point:nth`` a child trains in ``ROOT/name`` until the
fault kills it, and a second child finishes the run. Prints both exit statuses, one JSON line a fault.
"""

import json
import os
import sys
from pathlib import Path

import torch

from ca2st.durable import NO_FAULTS, FaultPoints
from ca2st.training.loop import train
from support.tiny_training import TinyEvaluation, TinyModel, TinySource, fresh_accelerator, tiny_settings


def train_in_child(folder: Path, faults: FaultPoints) -> int:
    pid = os.fork()
    if pid == 0:
        settings = tiny_settings(folder, faults=faults)
        source = TinySource(seed=settings.config.seed)
        train(
            TinyModel(), source, accelerator=fresh_accelerator(settings), settings=settings, validation=TinyEvaluation()
        )
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def import_all() -> None:
    """Let torch and Accelerate import what they import late. No backward pass: autograd's threads do not fork."""
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    fresh_accelerator(tiny_settings(Path("unused"))).prepare(model, optimizer)
    optimizer.step()


def main() -> None:
    torch.set_num_threads(1)  # no thread exists yet, so forking is safe
    import_all()
    root = Path(sys.argv[1])
    for argument in sys.argv[2:]:
        name, _, fault = argument.partition("=")
        killed = train_in_child(root / name, FaultPoints.parse(fault))
        left = sorted(str(path.relative_to(root / name)) for path in (root / name).rglob("*"))
        finished = train_in_child(root / name, NO_FAULTS)
        print(json.dumps({"name": name, "killed": killed, "finished": finished, "left": left}), flush=True)


if __name__ == "__main__":
    main()
