"""Settings of the loaders: the section `[data.loader]` of a recipe."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from ca2st.errors import UserInputError
from pipelines.errors import require_one_of
from pipelines.quarantine import OnError
from pipelines.storage.shard_files import Verify
from sharding.format.remote import RetryConfig, StorageConfig

BackendName = Literal["auto", "dali", "reference"]
DecodeOn = Literal["auto", "cpu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderConfig:
    """How batches are made; nothing here but `num_lanes` and `shuffle_block` changes what is in them."""

    num_lanes: int | None = None
    """Parallel runs through the shards in training; None: the largest divisor of the global batch up to 64. Part of
    the order."""
    shuffle_block: int = 4096
    """Samples shuffled together inside a lane: about a dozen shards of 1 GB. Part of the order of training."""
    fetch_threads: int = 4
    """Threads that read bytes; more hide slower storage."""
    decode_threads: int | None = None
    """Threads of the decoding backend; None: the processor cores this process may use."""
    prefetch_steps: int = 2
    """Finished batches kept ready; 0 makes each one when it is asked for, without a thread."""
    backend: BackendName = "auto"
    """``dali``, ``reference`` (slow, the oracle), or ``auto``: dali where it is installed."""
    decode_on: DecodeOn = "auto"
    """``auto``: dali runs on the rank's GPU where that decodes the codec of the shards, and on the CPU elsewhere;
    ``cpu``: always on the CPU, which leaves the GPU's memory and video engines alone."""
    verify: Verify = "size"
    """``size``: file sizes at the start. ``sha256``: also every shard's hash at its first use. Frames and
    spectrograms are compared with their own checksums in any case."""
    index_cache_bytes: int = 1 << 30
    """Memory for shard indexes; about 1 MB a shard of 300 clips of 10 s."""
    stall_timeout_seconds: float = 300.0
    """A step that waits this long while nothing at all moves in the loader ends the run and names where it hangs: more
    than any read or retry takes, less than the ten minutes after which other ranks give up. Needs `prefetch_steps`."""

    cache_dir: str | None = None
    """Shards of a URL: folder that keeps them on this machine, shared by its workers; None: ``~/.cache/ca2st/shards``.
    Better a fast local disk."""
    cache_bytes: int | None = None
    """Most bytes in it, shards being fetched included; the least recently used go first. Enough is a shuffle block of
    every lane this machine reads; less works, and fetches shards several times. None: half of what its disk has."""
    retry: RetryConfig = field(default_factory=RetryConfig)
    """How long a server that fails is tried."""
    on_error: OnError = "fail"
    """A sample whose bytes are damaged: ``fail`` ends the run with its name; ``quarantine`` leaves it out from then on
    and fills its place with another sample of its lane. Training only: evaluation always fails."""
    quarantine_budget: int = 100
    """Samples that may be in quarantine, over all ranks and attempts of the run, before it fails after all."""
    quarantine_percent: float = 0.1
    """The same in percent of the samples read; the smaller of the two counts."""

    @property
    def storage(self) -> StorageConfig:
        """How shards of a URL are kept on this machine."""
        return StorageConfig(cache_dir=self.cache_dir, cache_bytes=self.cache_bytes, retry=self.retry)

    def __post_init__(self) -> None:
        require_one_of("loader.backend", self.backend, get_args(BackendName))
        require_one_of("loader.decode_on", self.decode_on, get_args(DecodeOn))
        require_one_of("loader.on_error", self.on_error, get_args(OnError))
        require_one_of("loader.verify", self.verify, get_args(Verify))
        least = {"num_lanes": 1, "shuffle_block": 1, "fetch_threads": 1, "decode_threads": 1, "prefetch_steps": 0}
        least |= {"cache_bytes": 1, "quarantine_budget": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserInputError(f"loader.{name}: expected at least {low}, found {value}")
        if not self.stall_timeout_seconds > 0:
            raise UserInputError(f"loader.stall_timeout_seconds: expected > 0, found {self.stall_timeout_seconds}")
        if not 0 <= self.quarantine_percent <= 100:
            raise UserInputError(f"loader.quarantine_percent: expected 0 to 100, found {self.quarantine_percent}")
