"""How shards behind a URL are kept on this machine."""

from dataclasses import dataclass, field
from pathlib import Path

from ca2st.errors import UserInputError
from sharding.retry import RetryConfig

DEFAULT_CACHE = Path("~/.cache/ca2st/shards")
"""The user's own cache, on the disk of the home folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageConfig:
    """The node-local cache of remote shards, and how long their server is tried."""

    cache_dir: str | None = None
    """Folder of the cache, on a disk of this machine; shared by its workers and by all sets. None: `DEFAULT_CACHE`."""
    cache_bytes: int | None = None
    """Most bytes of shards in it, those being fetched included; None: half of what its disk has for them."""
    retry: RetryConfig = field(default_factory=RetryConfig)
    """How long a request is tried."""

    def __post_init__(self) -> None:
        if self.cache_bytes is not None and self.cache_bytes < 1:
            raise UserInputError(f"cache_bytes: expected at least 1, found {self.cache_bytes}")

    @property
    def folder(self) -> Path:
        """The cache's folder."""
        return Path(self.cache_dir or DEFAULT_CACHE).expanduser()
