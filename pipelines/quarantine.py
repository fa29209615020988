"""Samples whose bytes proved damaged while training: remembered with the run, counted against a budget.

One small JSON file a sample, in a folder that all ranks and attempts of a run share; its name follows from the
sample. So two ranks that find the same damage write the same file, a kill leaves no half of one, the number of
files is the number that the budget bounds, and a resumed run leaves the samples out without touching them.
"""

import json
import logging
import re
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ca2st.checked_json import DocumentError, read_json
from ca2st.durable import write_bytes
from ca2st.errors import EnvironmentFault
from pipelines.errors import QuarantineBudgetError

OnError = Literal["fail", "quarantine"]
FOLDER_NAME = "quarantine"
"""Its folder in the run's folder."""
_FILE_NAME = re.compile(r"[0-9a-f]{16}\.[A-Za-z0-9_-]+\.\d{6,}\.json")
_MOST_NAMED = 5
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuarantinedSample:
    """A sample that is left out from now on."""

    fingerprint: str
    """Of its set's manifest."""
    shard: str
    """File name of its shard."""
    row: int
    """Its row in the shard's index."""
    key: str
    """Its key; empty where the index itself is wrong."""
    what: str
    """The damage, in words."""
    step: int
    """Step of the epoch at which it was found."""
    rank: int
    """Rank that found it."""

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
            EnvironmentFault: the folder cannot be read.
            QuarantineBudgetError: more are in it than the budget allows.
        """
        self._folder, self._most = folder, most
        self._lock = threading.Lock()
        self._samples: dict[tuple[str, str, int], QuarantinedSample] = {}
        self._read_all()
        self._require_budget()

    def __contains__(self, place: tuple[str, str, int]) -> bool:
        """Whether the sample of (fingerprint, shard name, row) is to be left out."""
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
                    data = json.dumps(asdict(sample), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
                    write_bytes(self._folder / sample.file_name, data.encode())
            self._read_all()
            self._require_budget()

    def _read_all(self) -> None:
        if self._folder is None or not self._folder.is_dir():
            return
        for path in sorted(self._folder.iterdir()):
            if _FILE_NAME.fullmatch(path.name):
                sample = _read(path)
                self._samples.setdefault(sample.place, sample)

    def _require_budget(self) -> None:
        if len(self._samples) > self._most:
            raise QuarantineBudgetError(
                f"{len(self._samples)} samples are damaged, more than the {self._most} that "
                "data.loader.quarantine_budget and data.loader.quarantine_percent allow: "
                f"{_named(self._samples.values())}; repair the data (`ca2st shard verify` lists all damage), or raise "
                "the budget"
            )


def quarantine_limit(*, budget: int, percent: float, num_samples: int) -> int:
    """Samples that may be in quarantine: the smaller of `budget` and `percent` of `num_samples`, rounded down."""
    return min(budget, int(num_samples * percent / 100))


def _read(path: Path) -> QuarantinedSample:
    try:
        return read_json(path, QuarantinedSample)
    except (OSError, EnvironmentFault, DocumentError) as error:
        raise EnvironmentFault(f"{path}: not a quarantined sample ({error}); remove it") from error


def _named(samples: Iterable[QuarantinedSample]) -> str:
    told = [f"{sample.shard} {sample.key or f'row {sample.row}'}" for sample in samples]
    more = f" and {len(told) - _MOST_NAMED} more" if len(told) > _MOST_NAMED else ""
    return f"{', '.join(told[:_MOST_NAMED])}{more}"
