"""How long a store in trouble is left alone, and how often its trouble is told."""

from dataclasses import dataclass

from ray_jobs.tracking.complaints import Complaint, StoreError
from ray_jobs.tracking.run_record import Say

_LONGEST_SECONDS = 60.0
_REFUSED_SECONDS = 60.0
_LONGEST_ASKED_SECONDS = 600.0


def pause_seconds(failures: int, *, interval_seconds: float, complaint: Complaint | None = None) -> float:
    """Until the next try, after so many failures in a row: doubling up to a minute, or as long as the store asks.

    Credentials that are refused do not mend themselves: they wait the minute at once. More than ten minutes are not
    granted.
    """
    if failures == 0:
        return interval_seconds
    longest = max(interval_seconds, _LONGEST_SECONDS)
    pause = min(interval_seconds * 2.0 ** min(failures, 30), longest)
    if complaint is None:
        return pause
    if complaint.kind == "refused":
        return max(pause, _REFUSED_SECONDS)
    return max(pause, min(complaint.retry_after_seconds or 0.0, _LONGEST_ASKED_SECONDS))


@dataclass(kw_only=True, slots=True)
class TroubleLog:
    """Tells a trouble once, how often it came back when it changes, and its end."""

    say: Say
    _signature: tuple[str, str] | None = None
    failures: int = 0
    """In a row, of whatever kind."""
    _repeats: int = 0

    def failed(self, error: StoreError) -> None:
        """A try failed."""
        self.failures += 1
        if error.complaint.signature == self._signature:
            self._repeats += 1
            return
        self._tell_repeats()
        self.say(str(error))
        self._signature, self._repeats = error.complaint.signature, 0

    def succeeded(self) -> None:
        """A try went well."""
        if self.failures:
            self._tell_repeats()
            self.say(f"MLflow answers again, after {self.failures} tries in vain")
        self._signature, self.failures, self._repeats = None, 0, 0

    def close(self) -> None:
        """No try follows."""
        self._tell_repeats()

    def _tell_repeats(self) -> None:
        if self._repeats:
            self.say(f"(the same {self._repeats} times more)")
        self._repeats = 0
