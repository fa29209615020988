"""What a benchmark of the loaders measures."""

from dataclasses import dataclass, field

from ca2st.errors import UserInputError
from ca2st.spec import ClipSpec
from pipelines.loader_config import BackendName


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderBenchConfig:
    """A benchmark of the training and the validation loader."""

    seconds: float = 20.0
    """Measured time of each variant in training, and again in validation."""
    rounds: int = 3
    """Turns that this time is cut into: the variants take them in turn, and the median round counts."""
    batch_size: int = 8
    """Clips of a batch."""
    threads: int | None = None
    """Threads that decode, and workers of the baseline. None: the cores this process may use."""
    backend: BackendName = "auto"
    """As in a recipe."""
    rand_augment: bool = True
    """Train with RandAugment (rand-m7-n4-mstd0.5-inc1), ours and the baseline alike."""
    baseline: bool = True
    """Measure the baseline too."""
    clip: ClipSpec = field(default_factory=ClipSpec)
    """Sizes of a view. Default: 16 frames of 224 pixels, 4 s of sound."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise UserInputError(f"seconds: expected a finite number > 0, found {self.seconds}")
        for name in ("rounds", "batch_size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserInputError(f"{name}: expected at least 1, found {value}")
