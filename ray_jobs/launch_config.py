"""``[launch]``: which processes train, and how often they are started again."""

from dataclasses import dataclass

from ca2st.errors import UserInputError


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """How many processes train, and how Ray restarts them."""

    workers: int = 1
    """Training processes; one a GPU where there are GPUs."""
    threads_per_worker: int | None = None
    """Torch threads of a worker on a CPU; None: the machine's cores shared evenly. Losses are bit-equal only at
    the same number."""
    max_failures: int = 3
    """Restarts of the worker group by Ray before it gives up."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserInputError(f"workers: expected at least 1, found {self.workers}")
