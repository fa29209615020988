"""Where a shard set is: a folder, or a URL that fsspec reads."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ca2st.errors import UserInputError, did_you_mean

SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "memory": "fsspec"}
"""Kinds of URLs, and the package that reads each."""
EXTRAS = {"s3": "s3", "gs": "gs", "http": "http", "https": "http"}
"""The optional dependency of ca2st that installs it."""


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """A folder behind a URL, without a slash at its end; never holds a secret."""

    url: str

    @property
    def scheme(self) -> str:
        """``s3``, ``gs``, ``http``, ``https`` or ``memory``."""
        return self.url.partition("://")[0]

    def file(self, name: str) -> str:
        """The URL of a file in it."""
        return f"{self.url}/{name}"

    def __str__(self) -> str:
        return self.url


Location = Path | RemoteFolder
"""Where a shard set is."""


def as_location(place: str | Path | RemoteFolder) -> Location:
    """The folder or URL that `place` names; anything without ``://`` is a path.

    Raises:
        UserInputError: a kind of URL that is not read, one without a bucket or host, or one that carries a secret:
            those come from the environment, never from a recipe.
    """
    if not isinstance(place, str) or "://" not in place:
        return place if isinstance(place, RemoteFolder) else Path(place)
    scheme = place.partition("://")[0]
    if scheme not in SCHEMES:
        hint = did_you_mean(scheme, [*SCHEMES])
        raise UserInputError(f"URL of shards: expected one of {', '.join(SCHEMES)}, found {scheme!r}{hint}")
    parts = urlsplit(place)
    shown = f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserInputError(
            f"URL of shards: expected {shown} alone, found a user, password, query or fragment with it; give secrets "
            "in the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS or fsspec's "
            "configuration)"
        )
    if not parts.netloc:
        raise UserInputError(f"URL of shards: expected a bucket or host behind {scheme}://, found {shown!r}")
    return RemoteFolder(shown.rstrip("/"))
