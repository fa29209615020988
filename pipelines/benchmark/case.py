"""A loader as something that runs for a while and says how many clips it gave: ours, or the baseline."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from ca2st.batch import ClipBatch
from pipelines.benchmark.baseline import PROCESSOR, STAGES, BaselineConfig, make_dataloader
from pipelines.loader import EvaluationLoader, TrainLoader

Consumer = Callable[[ClipBatch], None]
"""What is done with a batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What one stretch of running gave."""

    clips: int
    seconds: float
    """Wall time."""
    processor_seconds: float
    """Processor time of all threads and workers: what counts where others use the machine too."""
    stage_seconds: Mapping[str, float]
    """By stage, added up over threads or workers."""
    bytes_read: int = 0

    @property
    def clips_per_second(self) -> float:
        """The rate."""
        return self.clips / self.seconds

    def stages_ms(self) -> dict[str, float]:
        """Milliseconds a clip, by stage: ``decode_ms``."""
        return {f"{name}_ms": 1000 * seconds / self.clips for name, seconds in self.stage_seconds.items()}


@runtime_checkable
class LoaderCase(Protocol):
    """Ours or the baseline."""

    def turn(self, seconds: float) -> Turn:
        """Go on for at least that long; whole passes only, so nothing runs on behind it."""
        ...


class OwnCase:
    """A loader of ours, pass after pass."""

    def __init__(self, loader: TrainLoader | EvaluationLoader, *, consumer: Consumer | None = None) -> None:
        self._loader, self._consumer, self._epoch = loader, consumer, 0

    def turn(self, seconds: float) -> Turn:
        """See `LoaderCase`; clips of padding are not counted."""
        before, begin, processor, clips = self._loader.stats, time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - begin < seconds or not clips:
            for batch in self._pass():
                clips += int((~batch.is_padding).sum())
                if self._consumer is not None:
                    self._consumer(batch)
        passed, counted = time.perf_counter() - begin, self._loader.stats - before
        stages = {name: value for name, value in counted.totals().items() if name.endswith("_seconds")}
        stages["wait_seconds"] = counted.wait_seconds
        return Turn(
            clips=clips,
            seconds=passed,
            processor_seconds=time.process_time() - processor,
            stage_seconds={name.removesuffix("_seconds"): value for name, value in stages.items()},
            bytes_read=counted.bytes_read,
        )

    def _pass(self) -> Iterator[ClipBatch]:
        if isinstance(self._loader, EvaluationLoader):
            return self._loader.batches()
        self._epoch += 1
        return self._loader.batches(self._epoch - 1)


class BaselineCase:
    """The baseline, a batch a worker at a time: when a turn ends no worker has anything left to do."""

    def __init__(self, files: Sequence[Path], config: BaselineConfig) -> None:
        self._dataloader = make_dataloader(files, config)

    def turn(self, seconds: float) -> Turn:
        """See `LoaderCase`."""
        begin, processor, clips, spent = time.perf_counter(), time.process_time(), 0, Counter[str]()
        while time.perf_counter() - begin < seconds or not clips:
            for video, seconds_of_clip in self._dataloader:
                clips += len(video)
                spent.update(dict(zip((*STAGES, PROCESSOR), seconds_of_clip.sum(dim=0).tolist(), strict=True)))
        workers = spent.pop(PROCESSOR) if self._dataloader.num_workers else 0.0  # without workers it is this process's
        return Turn(
            clips=clips,
            seconds=time.perf_counter() - begin,
            processor_seconds=time.process_time() - processor + workers,
            stage_seconds={stage: spent[stage] for stage in STAGES},
        )
