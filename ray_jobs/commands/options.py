"""Options that several commands share."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from ca2st.errors import UserInputError

Json = Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")]
Out = Annotated[Path | None, typer.Option(help="File for the report, as JSON.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: section.key=value.")]
RayAddress = Annotated[
    str, typer.Option("--ray-address", help="With --ray: auto, or HEAD:6379; default: a Ray of our own.")
]
OpenRay = Annotated[bool, typer.Option("--i-accept-open-ray", help="Join a cluster without a token.")]
TrackingStore = Annotated[str | None, typer.Option(help="MLflow store; default: as a training takes it.")]
_Options = TypeVar("_Options")


def takes(options: type[_Options]) -> Callable[[Callable[[_Options], None]], Callable[..., None]]:
    """Make a command of a function of one dataclass: typer sees its fields as the options, in their order."""

    def decorate(function: Callable[[_Options], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**given: Any) -> None:
            function(options(**given))

        command.__annotations__ = get_type_hints(options, include_extras=True)
        command.__signature__ = inspect.signature(options)  # type: ignore[attr-defined]  # `inspect` asks for it first
        return command

    return decorate


def refuse_without_ray(*, ray: bool, ray_address: str = "local", accept_open_ray: bool) -> None:
    """Refuse what is said of a Ray that a command does not use.

    Raises:
        UserInputError: ``--ray-address`` or ``--i-accept-open-ray`` was given without ``--ray``.
    """
    if ray_address != "local" and not ray:
        raise UserInputError(f"--ray-address {ray_address}: expected --ray beside it; without, Ray is not used at all")
    if accept_open_ray and not ray:
        raise UserInputError(
            "--i-accept-open-ray: expected --ray beside it; without, Ray is not used at all: leave it out, or add --ray"
        )
