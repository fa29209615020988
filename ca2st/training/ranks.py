"""The few collectives of training, on top of Accelerate: gather in rank order, act on the main rank, fail together.

A rank that fails alone would leave the others waiting in a collective. Whatever may fail on one rank (a loader, a
file) runs in `together` or `on_main`: the failure travels as data and every rank raises in the same place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

from ca2st.errors import CA2STError
from ca2st.training.errors import PeerFailedError
from ca2st.training.memory import memory_fault
from ca2st.training.stages import StageClock

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RankFailure:
    """An exception of one rank, as others are told of it."""

    rank: int
    kind: str
    message: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class _Outcome:
    value: object = None
    failure: RankFailure | None = None


class Ranks:
    """This process among those that train together; `stages` is told while it waits for them."""

    def __init__(self, accelerator: Accelerator, *, stages: StageClock | None = None) -> None:
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self._stages = stages or StageClock()

    @property
    def is_main(self) -> bool:
        """True on the rank that writes journal and checkpoints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order, on every rank."""
        with self._stages.stage("gather"):
            gathered: list[T] = gather_object([value])
        return gathered

    def together(self, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank and gather the results; when one fails, all raise.

        Raises:
            PeerFailedError: the action failed on another rank (the failing rank raises its own error).
        """
        return self.gather_outcomes(*self._attempt(action))

    def gather_outcomes(self, value: T | None, error: Exception | None) -> list[T]:
        """Gather what an action gave on each rank; raises as `together`."""
        failure = None if error is None else failure_of(self.rank, error)
        outcomes = self.gather(_Outcome(value, failure))
        _raise_if_failed(outcomes, error)
        return [outcome.value for outcome in outcomes]  # type: ignore[misc]  # T on every rank that did not fail

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on the main rank only; every rank gets its result or raises.

        Raises:
            PeerFailedError: it failed (the main rank raises its own error).
        """
        value, error = self._attempt(action) if self.is_main else (None, None)
        return self.gather_outcomes(value, error)[0]

    def _attempt(self, action: Callable[[], T]) -> tuple[T | None, Exception | None]:
        try:
            return action(), None
        except Exception as caught:  # noqa: BLE001  # raised again on every rank by gather_outcomes
            error = memory_fault(caught) or caught
            if self.world_size > 1:
                error.add_note(f"on rank {self.rank}")
            return None, error


def failure_of(rank: int, error: BaseException) -> RankFailure:
    """Describe `error` for the other ranks."""
    code = error.exit_code if isinstance(error, CA2STError) else CA2STError.exit_code
    return RankFailure(rank, type(error).__name__, str(error), code)


def _raise_if_failed(outcomes: list[_Outcome], own: Exception | None) -> None:
    if own is not None:
        raise own
    for outcome in outcomes:
        if outcome.failure is not None:
            failure = outcome.failure
            raise PeerFailedError(
                f"rank {failure.rank} failed with {failure.kind}: {failure.message}", exit_code=failure.exit_code
            )
