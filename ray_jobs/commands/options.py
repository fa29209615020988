"""Options that several commands share."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints
from urllib.parse import urlsplit

import typer

from ca2st.errors import UserInputError

if TYPE_CHECKING:
    from sharding.datasets import SyntheticConfig


Json = Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")]
Out = Annotated[Path | None, typer.Option(help="File for the report, as JSON.")]
_Options = TypeVar("_Options")
_FIELDS = {"frame_rate": "frames_per_second"}
"""Options of the synthetic world whose setting has another name."""


def takes(options: type[_Options]) -> Callable[[Callable[[_Options], None]], Callable[..., None]]:
    """Make a command of a function of one dataclass: typer sees its fields as the options, in their order."""

    def decorate(function: Callable[[_Options], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**given: Any) -> None:
            function(options(**given))

        hints = get_type_hints(options, include_extras=True)
        command.__annotations__ = hints
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what `inspect` asks for first
            [
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
                    annotation=hints[field.name],
                )
                for field in dataclasses.fields(options)  # type: ignore[arg-type]  # a dataclass, as said
            ]
        )
        return command

    return decorate


def refuse_without_ray(*, accept_open_ray: bool, ray: bool) -> None:
    """Refuse ``--i-accept-open-ray`` of a command that does not use Ray.

    Raises:
        UserInputError: it was given without ``--ray``.
    """
    if accept_open_ray and not ray:
        raise UserInputError(
            "--i-accept-open-ray: expected --ray beside it; without, Ray is not used at all: leave it out, or add --ray"
        )


def gop_frames(gop: int | None, *, codec: str) -> int:
    """Frames from one key frame to the next: ``--gop``, or the default where it was not given.

    Raises:
        UserInputError: it was given for a codec of key frames alone.
    """
    from sharding.media.codecs import DEFAULT_GOP_FRAMES

    if gop is None:
        return DEFAULT_GOP_FRAMES
    if codec == "mjpeg":
        raise UserInputError(
            f"--gop {gop}: --codec mjpeg has none but key frames; leave it out, or choose --codec h264, hevc or vp9"
        )
    return gop


def synthetic_config(options: Mapping[str, Any], *, dataset: str) -> "SyntheticConfig":
    """Return the synthetic world of ``--num-samples``, ``--seed`` and the others; None: not given.

    Raises:
        UserInputError: one is given for another dataset, or a value is out of range.
    """
    from sharding.datasets import SyntheticConfig

    given = {name: value for name, value in options.items() if value is not None}
    if given and dataset != "synthetic":
        raise UserInputError(f"{_flag(next(iter(given)))}: --dataset {dataset} does not use it; leave it out")
    return SyntheticConfig(**{_FIELDS.get(name, name): value for name, value in given.items()})


def refuse_unused_ca_file(ca_file: Path | None, address: str) -> None:
    """Refuse ``--ca-file`` for an address without TLS.

    Raises:
        UserInputError: it was given, and the address is not https.
    """
    if ca_file is not None and urlsplit(address).scheme != "https":
        raise UserInputError(
            f"--ca-file {ca_file}: expected an https address beside it, found {address}; without TLS nothing is "
            "verified: leave it out, or give the https address"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
