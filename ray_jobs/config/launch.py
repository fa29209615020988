"""``[launch]``: which processes train, what each of them gets, and how often they are started again."""

from dataclasses import dataclass
from typing import Literal

from ca2st.errors import UserInputError

Placement = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """How many processes train, where Ray puts them, and how it restarts them.

    No setting here changes the order of the samples, so each may be another one when a run is resumed.
    """

    workers: int = 1
    """Training processes; one a GPU where there are GPUs. With `min_workers` the most there may be."""
    min_workers: int | None = None
    """Under Ray: go on with as few as this many when a node is lost, and grow again up to `workers` when there is
    room. Losses then differ by rounding, the samples of every step do not. None: always `workers`."""
    threads_per_worker: int | None = None
    """Torch threads of a worker on a CPU; None: `cpus_per_worker`, or without it the machine's cores shared evenly
    among `workers`. Losses are bit-equal only at the same number."""
    cpus_per_worker: float | None = None
    """Processors that Ray sets aside for a worker; None: one where it trains on a CPU, none beside a GPU."""
    gpus_per_worker: Literal[0, 1] | None = None
    """Under Ray: GPUs of a worker; None: one where a node of the cluster has GPUs, else none."""
    accelerator_type: str | None = None
    """Under Ray: train only on nodes with this accelerator, by Ray's name for it: ``H100``, ``A100``, ..."""
    placement: Placement = "PACK"
    """Under Ray: ``PACK`` on few nodes or ``SPREAD`` over many where it can be; ``STRICT_``: or not at all."""
    max_failures: int = 3
    """Restarts of the workers by Ray before it gives up; 0: none, -1: no limit. What no restart can mend (a wrong
    setting, damaged data, numbers that are not finite) ends the run at once and counts for none."""
    max_preemptions: int = -1
    """Restarts because a node was taken away with notice, counted apart from `max_failures`; -1: no limit."""
    wait_for_resources: bool = False
    """Under Ray: wait for nodes that the cluster does not have yet (one that grows on demand). False: refuse at once
    what no node of the cluster has room for, since Ray itself would wait for ever."""
    runs_folder: str = "runs"
    """Folder of the run folders; on a cluster on storage that all nodes share."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserInputError(f"workers: expected at least 1, found {self.workers}")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise UserInputError(f"min_workers: expected 1 to workers = {self.workers}, found {self.min_workers}")
        if self.elastic and self.placement.startswith("STRICT_"):
            raise UserInputError(
                f"placement: expected PACK or SPREAD where min_workers lets the number of workers change, found "
                f"{self.placement}; Ray counts room for workers without it"
            )
        for name in ("threads_per_worker", "cpus_per_worker"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserInputError(f"{name}: expected more than 0, or none, found {value}")
        if self.accelerator_type is not None and self.gpus_per_worker == 0:
            raise UserInputError(
                f"accelerator_type: expected gpus_per_worker = 1 beside {self.accelerator_type!r}, found 0; "
                "remove one of the two"
            )
        for name in ("max_failures", "max_preemptions"):
            if getattr(self, name) < -1:
                raise UserInputError(f"{name}: expected at least 0, or -1 for no limit, found {getattr(self, name)}")
        if not self.runs_folder:
            raise UserInputError("runs_folder: expected a folder, found an empty name")

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change while the run lasts."""
        return self.min_workers is not None and self.min_workers < self.workers

    def torch_threads(self, num_cores: int) -> int:
        """Torch threads of a worker on a CPU of `num_cores`: the same whatever the number of workers is just now."""
        if self.threads_per_worker is not None:
            return self.threads_per_worker
        if self.cpus_per_worker is not None:
            return max(1, int(self.cpus_per_worker))
        return max(1, num_cores // self.workers)
