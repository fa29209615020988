"""What an examination says of one thing."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was tried."""

    name: str
    """What: ``python``, ``decode h264``, ``disk runs``."""
    ok: bool
    what: str
    """What was found."""
    mend: str = ""
    """What to do where it is not ok."""
    needed: bool = True
    """False where the project works without it, only slower or with less."""
    node: str | None = None
    """The cluster's node it was tried on; None: this machine, or the cluster as a whole."""


Check = Callable[[], Finding]


def tried(check: Check, *, name: str) -> Finding:
    """The finding of `check`; whatever it raises becomes a finding that is not ok."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - a broken library may raise anything, and that is what is asked
        return Finding(
            name=name,
            ok=False,
            what=f"{type(error).__name__}: {error}",
            mend="install the package again in a fresh environment (make install)",
        )
