"""Tells a loader that stands still from one that is slow."""

import time

from pipelines.errors import LoaderStalledError
from pipelines.stats import StatsRecorder

_MOST_NAMED = 4


class StallWatch:
    """Raises when, while the consumer waits, no stage of any thread has begun or ended for too long.

    Slow storage with a stage that ends now and then is slow, not stalled, however long a batch takes.
    """

    def __init__(self, stats: StatsRecorder, *, timeout_seconds: float) -> None:
        self._stats, self._timeout = stats, timeout_seconds
        self.poll_seconds = min(1.0, timeout_seconds / 4)
        """How often to look."""
        self.has_tripped = False
        """Whether a stall was found: its thread may hold locks for ever, so nothing may wait for it any more."""

    def is_stalled(self, waiting_since: float) -> bool:
        """Whether nothing has moved since `waiting_since` (on `time.monotonic`) for longer than the timeout."""
        return time.monotonic() - max(waiting_since, self._stats.last_change) > self._timeout

    def check(self, waiting_since: float) -> None:
        """Look once.

        Raises:
            LoaderStalledError: a stall; names the stages that threads stand in, and on what.
        """
        if self.is_stalled(waiting_since):
            raise self.stalled(f"no batch, and no stage begun or ended, for {self._timeout:g} s")

    def stalled(self, what: str) -> LoaderStalledError:
        """The error of a loader that will give no more batches."""
        self.has_tripped = True
        return LoaderStalledError(
            f"the loader stands still: {what}; {self._where()}; look at that storage or file, or raise "
            "data.loader.stall_timeout_seconds where it is only slow, and rerun to resume"
        )

    def _where(self) -> str:
        now = time.monotonic()
        stages = [stage for stage in self._stats.active() if stage.stage != "wait"]
        told = [
            f"{stage.stage} for {now - stage.since:.1f} s{f' ({stage.where})' if stage.where else ''} in {stage.thread}"
            for stage in stages[:_MOST_NAMED]
        ]
        more = f" and {len(stages) - _MOST_NAMED} more" if len(stages) > _MOST_NAMED else ""
        return f"it stands in: {', '.join(told)}{more}" if told else "none of its threads is in a stage that is timed"
