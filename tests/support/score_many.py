"""A set of any number of made-up samples, scored in parts and joined, each in a process of its own.

``python -m support.score_many OPTIONS``, JSON: ``folder``, ``num_samples``, ``world_size``; ``rank`` scores that rank's
part, without it the parts are joined and measured. ``lose``: number of a sample that its rank does not score. Prints
JSON: ``peak_bytes`` and, of the join, ``metrics`` and ``num_samples``, or the ``error``.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

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


def main() -> None:
    options = json.loads(sys.argv[1])
    folder, total, world_size = Path(options["folder"]), options["num_samples"], options["world_size"]
    facts = PredictionFacts(**{name: getattr(FACTS, name) for name in FACTS.__slots__} | {"num_samples": total})
    answer: dict[str, object] = {}
    if (rank := options.get("rank")) is not None:
        own = range(rank * total // world_size, (rank + 1) * total // world_size)
        source = ManySamples(own, total, lose=options.get("lose", -1))
        accelerator = fresh_accelerator(tiny_settings(folder))
        model = TinyModel(classes=CLASSES)
        with writing_part(folder / f"part-{rank}", facts) as add:
            for scored in scored_batches(
                model, source, accelerator=accelerator, targets=CLASSES, per_device_batch_size=BATCH
            ):
                add(scored)
    else:
        parts = [folder / f"part-{rank}" for rank in range(world_size)]
        expected = ExpectedKeys(lambda: map(key_of, range(total)), total)
        try:
            join_parts(parts, folder / "all.parquet", facts, expected, num_views=1)
            found = measure(folder / "all.parquet")
            answer |= {"metrics": found.metrics, "num_samples": found.num_samples}
        except CA2STError as error:
            answer["error"] = str(error)
    print(json.dumps(answer | {"peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
