"""Trying again, bounded, with growing pauses: for storage that fails now and then."""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from ca2st.errors import UserInputError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryConfig:
    """How long a read from remote storage is tried; only errors that may pass are tried again."""

    attempts: int = 6
    """Tries of one request, the first included."""
    total_seconds: float = 300.0
    """No further try of a request begins later than this after its first."""
    first_pause_seconds: float = 0.5
    """Longest pause after the first failure; it doubles from try to try. The pause itself is drawn evenly from the
    upper half below it, so that workers do not come back all at once."""
    longest_pause_seconds: float = 30.0
    """Where the doubling ends."""
    request_seconds: float = 60.0
    """A request (at most 16 MiB) without an answer is given up after this, and counts as a failure."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise UserInputError(f"retry.attempts: expected at least 1, found {self.attempts}")
        for name in ("total_seconds", "first_pause_seconds", "longest_pause_seconds"):
            if getattr(self, name) < 0:
                raise UserInputError(f"retry.{name}: expected at least 0, found {getattr(self, name)}")
        if self.request_seconds <= 0:
            raise UserInputError(f"retry.request_seconds: expected more than 0, found {self.request_seconds}")

    def pause_seconds(self, failures: int, fraction: float) -> float:
        """The pause after that many failures; `fraction` in [0, 1) is the draw."""
        longest = min(self.longest_pause_seconds, self.first_pause_seconds * 2.0 ** (failures - 1))
        return longest * (1 + fraction) / 2


class RetriesSpentError(Exception):
    """Every try failed; the last error is the cause. Never leaves this package: its callers name the file."""

    def __init__(self, attempts: int, seconds: float, last: Exception) -> None:
        super().__init__(f"{attempts} tries in {seconds:.0f} s, the last: {described(last)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Retrier:
    """Calls again what failed in passing; clock, sleep and chance are arguments, so that tests need no time."""

    config: RetryConfig = field(default_factory=RetryConfig)
    on_retry: Callable[[], None] = lambda: None
    """Called before each further try: counts them."""
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    chance: Callable[[], float] = random.random

    def call(self, work: Callable[[], T], *, is_passing: Callable[[Exception], bool]) -> T:
        """The result of `work`.

        Raises:
            RetriesSpentError: attempts or time are used up; any error that `is_passing` denies is raised as it is.
        """
        start = self.clock()
        for failures in self._failures():
            try:
                return work()
            except Exception as error:
                if not is_passing(error):
                    raise
                pause = self.config.pause_seconds(failures, self.chance())
                spent = self.clock() - start
                if failures == self.config.attempts or spent + pause > self.config.total_seconds:
                    raise RetriesSpentError(failures, spent, error) from error
                self.on_retry()
                self.sleep(pause)
        raise AssertionError("the loop returns or raises")

    def _failures(self) -> Iterator[int]:
        yield from range(1, self.config.attempts + 1)


def described(error: BaseException) -> str:
    """An error in one line: its text, or its kind where it has none."""
    text = " ".join(str(error).split())
    return text if text and isinstance(error, OSError) else f"{type(error).__name__}{f': {text}' if text else ''}"
