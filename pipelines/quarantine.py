"""Damaged samples left out of training, and what fills their places, so that every step keeps its size on every rank.

Each is one small JSON file, in a folder that all ranks and attempts of a run share; its name follows from the sample.
So two ranks that find the same damage write the same file, a kill leaves no half of one, the number of files is the
number that the budget bounds, and a resumed run leaves the samples out without touching them.

The place of a damaged sample is filled with the sample that the plan puts at the same position, hence in the same lane,
one step later; where that one is damaged too, two steps later, and so on around the epoch; finally with the step's
other positions. So the filling follows from the plan and from what is damaged: not from ranks, threads, or when damage
was found.
"""

import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, TypeVar

from ca2st.checked_json import DocumentError, canonical_json, read_json
from ca2st.durable import write_bytes
from ca2st.errors import DataDamageError, EnvironmentFault, listed
from pipelines.errors import QuarantineBudgetError, SampleDamageError
from pipelines.order.plan import PlannedSample, SamplePlan
from pipelines.storage.shard_sets import SetReaders
from pipelines.threads import StatsRecorder

OnError = Literal["fail", "quarantine"]
FOLDER_NAME = "quarantine"
"""Its folder in the run's folder."""
_FILE_NAME = re.compile(r"[0-9a-f]{16}\.[A-Za-z0-9_-]+\.\d{6,}\.json")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuarantinedSample:
    """A sample that is left out from now on."""

    fingerprint: str
    """Of its set's manifest."""
    shard: str
    row: int
    key: str
    """Its key; empty where the index itself is wrong."""
    what: str
    step: int
    """Step of the epoch at which it was found."""
    rank: int

    @property
    def place(self) -> tuple[str, str, int]:
        """Which sample it is."""
        return self.fingerprint, self.shard, self.row

    @property
    def file_name(self) -> str:
        """Name of its file."""
        return f"{self.fingerprint[:16]}.{self.shard.removesuffix('.tar')}.{self.row:06d}.json"


class Quarantine:
    """The quarantine of one run as one rank sees it; safe to use from several threads."""

    def __init__(self, folder: Path | None, *, most: int) -> None:
        """Read what earlier attempts found; `folder` None keeps it in memory alone, `most` is the budget.

        Raises:
            QuarantineBudgetError: more are in it than the budget allows.
            EnvironmentFault: the folder cannot be read.
        """
        self._folder, self._most = folder, most
        self._lock = threading.Lock()
        self._samples: dict[tuple[str, str, int], QuarantinedSample] = {}
        self._read_all()
        self._require_budget()

    def __contains__(self, place: tuple[str, str, int]) -> bool:
        """Return whether the sample of (fingerprint, shard name, row) is to be left out."""
        return place in self._samples

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, sample: QuarantinedSample) -> None:
        """Leave a sample out from now on.

        Raises:
            QuarantineBudgetError: that is one more than the budget allows, over all ranks and attempts; names some.
            EnvironmentFault: it cannot be written down.
        """
        with self._lock:
            if sample.place not in self._samples:
                _log.warning("quarantined: %s", sample.what)
                self._samples[sample.place] = sample
                if self._folder is not None:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    write_bytes(self._folder / sample.file_name, canonical_json(asdict(sample)))
            self._read_all()
            self._require_budget()

    def _read_all(self) -> None:
        if self._folder is None or not self._folder.is_dir():
            return
        for path in sorted(self._folder.iterdir()):
            if _FILE_NAME.fullmatch(path.name):
                try:
                    sample = read_json(path, QuarantinedSample)
                except (OSError, EnvironmentFault, DocumentError) as error:
                    raise EnvironmentFault(f"{path}: not a quarantined sample ({error}); remove it") from error
                self._samples.setdefault(sample.place, sample)

    def _require_budget(self) -> None:
        if len(self._samples) > self._most:
            names = [f"{sample.shard} {sample.key or f'row {sample.row}'}" for sample in self._samples.values()]
            raise QuarantineBudgetError(
                f"{len(self._samples)} samples are damaged, more than the {self._most} that "
                "data.loader.quarantine_budget and data.loader.quarantine_percent allow: "
                f"{listed(names)}; repair the data (`ca2st shard verify` lists all damage), "
                "or raise the budget"
            )


def quarantine_limit(*, budget: int, percent: float, num_samples: int) -> int:
    """Return how many samples may be in quarantine: the smaller of `budget` and `percent` of all, rounded down."""
    return min(budget, int(num_samples * percent / 100))


T = TypeVar("T")


def replacements(plan: SamplePlan, epoch: int, step: int, position: int) -> Iterator[PlannedSample]:
    """Yield candidates for `position` of the global batch of `step`, in the order in which they are tried."""
    order, batch = plan.epoch(epoch), plan.record.global_batch_size
    later = (((step + ahead) % order.num_steps, position) for ahead in range(1, order.num_steps))
    beside = ((step, (position + ahead) % batch) for ahead in range(1, batch))
    for number, other in chain(later, beside):
        yield from order.samples(number, range(other, other + 1))


class DamageGuard:
    """Keeps damaged samples out of training batches, within the quarantine's budget."""

    def __init__(self, quarantine: Quarantine, *, sets: SetReaders, stats: StatsRecorder, rank: int) -> None:
        self._quarantine, self._sets, self._stats, self._rank = quarantine, sets, stats, rank

    def read(
        self, planned: PlannedSample, others: Iterable[PlannedSample], read: Callable[[PlannedSample], T], *, step: int
    ) -> T:
        """Return what `read` makes of the planned sample, or of the first of its replacements that is not damaged.

        Raises:
            DataDamageError: the budget is exceeded, or every replacement is damaged.
        """
        for tried in chain([planned], others):
            if self._place(tried) in self._quarantine:
                continue
            try:
                made = read(tried)
            except SampleDamageError as error:
                self.reject(tried, error, step=step)
                continue
            if tried is not planned:
                self._stats.add("quarantined", 1)
            return made
        raise DataDamageError(f"step {step}: no undamaged sample is left to fill a place of the batch; repair the data")

    def reject(self, sample: PlannedSample, error: SampleDamageError, *, step: int) -> None:
        """Put a sample into quarantine; raises as `Quarantine.add`."""
        reader, shard = self._sets.find(sample.shard)
        try:
            key = reader.indexes.entry(shard, sample.row).key
        except SampleDamageError:
            key = ""
        fingerprint, name, row = self._place(sample)
        self._quarantine.add(
            QuarantinedSample(
                fingerprint=fingerprint, shard=name, row=row, key=key, what=str(error), step=step, rank=self._rank
            )
        )

    def _place(self, sample: PlannedSample) -> tuple[str, str, int]:
        reader, shard = self._sets.find(sample.shard)
        return reader.fingerprint, reader.shard_set.shards[shard].name, sample.row
