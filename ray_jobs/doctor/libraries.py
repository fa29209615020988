"""Are the installed packages those that the project was made for?"""

import contextlib
import platform
from collections.abc import Iterable
from importlib import metadata
from typing import TYPE_CHECKING

from ray_jobs.doctor.finding import Finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_INSTALL = "make install, or pip install --require-hashes -r requirements.lock"


def check_packages() -> Finding:
    """Every direct dependency is there, in a version that ours asks for."""
    from packaging.requirements import Requirement

    asked = [Requirement(text) for text in metadata.requires("ca2st") or ()]
    wanted = [one for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = [problem for one in wanted if (problem := _problem(one))]
    name = "packages"
    if wrong:
        return Finding(name=name, ok=False, what="; ".join(wrong), mend=_INSTALL)
    return Finding(name=name, ok=True, what=f"Python {platform.python_version()}, all of {len(wanted)} as asked for")


def _problem(wanted: "Requirement") -> str | None:
    try:
        found = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return f"{wanted.name}: expected {wanted.specifier or 'any version'}, found none"
    if wanted.specifier.contains(found, prereleases=True):
        return None
    return f"{wanted.name}: expected {wanted.specifier}, found {found}"


def check_torch_family() -> Finding:
    """torch, torchvision and torchaudio import together and were built for one CUDA version."""
    import torch
    import torchaudio
    import torchvision

    found = ", ".join(f"{one.__name__} {one.__version__}" for one in (torch, torchvision, torchaudio))
    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)  # fails where the builds do not fit
    return Finding(name="torch", ok=True, what=f"{found}, CUDA {torch.version.cuda or 'none'}")


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those of `packages` that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
