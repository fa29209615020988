"""A set of any number of made-up samples, scored in parts and joined, each in a process of its own.

``python -m support.score_many FOLDER NUM_SAMPLES WORLD_SIZE [LOSE]``: one process per rank scores its part into FOLDER,
another joins and measures them. LOSE: number of a sample that its rank does not score. Prints JSON: ``peaks``, the most
bytes that each process held, and of the join ``metrics`` and ``num_samples``, or the ``error``. The processes are
forked from one that has only imported, which takes longer than the scoring.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ca2st.batch import ClipBatch
from ca2st.errors import CA2STError
from ca2st.training.evaluate import scored_batches
from ray_jobs.evaluation.predictions import ExpectedKeys, PredictionFacts, join_parts, writing_part
from ray_jobs.evaluation.protocols import measure
from support.tiny_training import TinyModel, fresh_accelerator, tiny_settings

CLASSES = {"label": 12}
FACTS = PredictionFacts(
    targets={"label": [f"class {index}" for index in range(12)]}, labelled=("label",), dataset="vgg_sound"
)
BATCH = 8192


def peak_bytes() -> int:
    """The most memory this process held; getrusage would count what its parent held when it was started."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]  # Linux has the line


def key_of(number: int) -> str:
    return f"video-{number:08d}-0123456789abcdef"


class ManySamples:
    """One run of the samples, as a rank reads it."""

    def __init__(self, samples: range, num_samples: int, *, lose: int) -> None:
        self._samples, self._lose, self.num_samples = samples, lose, num_samples

    def batches(self) -> Iterator[ClipBatch]:
        for first in range(self._samples.start, self._samples.stop, BATCH):
            numbers = [n for n in range(first, min(first + BATCH, self._samples.stop)) if n != self._lose]
            values = torch.tensor(numbers)
            count = len(numbers)
            yield ClipBatch(
                video=(values % 251).to(torch.uint8).view(-1, 1, 1, 1, 1).expand(-1, 3, 2, 1, 1),
                mel=torch.sin(values.float()).view(-1, 1, 1).expand(-1, 4, 4),
                intervals_seconds=torch.zeros(count, 2, 2),
                labels=(values % 12).view(-1, 1),
                sample_ids=tuple(map(key_of, numbers)),
                has_audio=torch.ones(count, dtype=torch.bool),
                is_padding=torch.zeros(count, dtype=torch.bool),
            )


def score(folder: Path, total: int, world_size: int, *, rank: int, lose: int) -> dict[str, object]:
    """Write the part of one rank."""
    source = ManySamples(range(rank * total // world_size, (rank + 1) * total // world_size), total, lose=lose)
    accelerator, model = fresh_accelerator(tiny_settings(folder)), TinyModel(classes=CLASSES)
    with writing_part(folder / f"part-{rank}", facts_of(total)) as add:
        for scored in scored_batches(
            model, source, accelerator=accelerator, targets=CLASSES, per_device_batch_size=BATCH
        ):
            add(scored)
    return {}


def join(folder: Path, total: int, world_size: int) -> dict[str, object]:
    """Join the parts and measure the whole."""
    parts = [folder / f"part-{rank}" for rank in range(world_size)]
    expected = ExpectedKeys(lambda: map(key_of, range(total)), total)
    try:
        join_parts(parts, folder / "all.parquet", facts_of(total), expected, num_views=1)
        found = measure(folder / "all.parquet")
    except CA2STError as error:
        return {"error": str(error)}
    return {"metrics": found.metrics, "num_samples": found.facts.num_samples}


def facts_of(total: int) -> PredictionFacts:
    return replace(FACTS, num_samples=total)


def forked(work: Callable[[], dict[str, object]]) -> int:
    """Start `work` in a process whose answer, with its peak, can be read from the descriptor that is returned."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, json.dumps(work() | {"peak_bytes": peak_bytes()}).encode())
        os._exit(0)
    os.close(writer)
    return reader


def answer_at(reader: int) -> dict[str, Any]:
    """Wait for a forked process and return its answer."""
    with open(reader) as answer:
        found: dict[str, Any] = json.loads(answer.read())
    return found


def main() -> None:
    folder, total, world_size, lose = Path(sys.argv[1]), *map(int, [*sys.argv[2:], "-1"][:3])
    running = [forked(partial(score, folder, total, world_size, rank=rank, lose=lose)) for rank in range(world_size)]
    answers = list(map(answer_at, running))
    answers.append(answer_at(forked(partial(join, folder, total, world_size))))
    print(json.dumps(answers[-1] | {"peaks": [one["peak_bytes"] for one in answers]}))


if __name__ == "__main__":
    main()
