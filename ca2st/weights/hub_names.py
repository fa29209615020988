"""Names of public checkpoints: `hf-hub:ORG/NAME[@REVISION]`, `open_clip:MODEL/TAG`, `timm:NAME`.

Only names are worked out here, by the tables of open_clip and timm: nothing is fetched, and neither package is ever
asked to load a file.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ca2st.errors import UserInputError, did_you_mean

PLAIN_FILES = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")
"""Files that are looked for in a repository, in this order."""
_OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors")
_TIMM_FILES = ("model.safetensors", "pytorch_model.bin")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_REVISION = re.compile(r"[\w./-]+")
_STEPS = {"", ".", ".."}
"""Parts of a path that lead elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSource:
    """A repository of a hub, and which of its files may be the weights."""

    name: str
    """As it was given."""
    repository: str
    """ORG/NAME."""
    revision: str | None
    """Branch, tag or commit; None: the repository's main branch."""
    files: tuple[str, ...]
    """The first of these that the repository has is taken."""
    architecture: str = ""
    """The network in timm's words; empty where only the repository tells."""


def is_hub_name(text: str) -> bool:
    """Whether `text` names a public checkpoint rather than a file."""
    return text.partition(":")[0] in _SCHEMES and ":" in text


def resolve_hub_name(name: str) -> HubSource:
    """The repository that a name stands for.

    Raises:
        UserInputError: the name is unknown, has no repository, or its weights are of another network than ours.
    """
    scheme, _, rest = name.partition(":")
    if scheme not in _SCHEMES:
        raise UserInputError(f"{name}: expected {', '.join(f'{known}:...' for known in _SCHEMES)}, or a file's path")
    return _SCHEMES[scheme](name, rest)


def _hugging_face(name: str, rest: str) -> HubSource:
    repository, at, revision = rest.partition("@")
    wanders = not _STEPS.isdisjoint(repository.split("/")) or bool(at and not _STEPS.isdisjoint(revision.split("/")))
    if wanders or not _REPOSITORY.fullmatch(repository) or (at and not _REVISION.fullmatch(revision)):
        raise UserInputError(f"{name}: expected hf-hub:ORGANISATION/NAME or hf-hub:ORGANISATION/NAME@REVISION")
    return HubSource(name=name, repository=repository, revision=revision or None, files=PLAIN_FILES)


def _open_clip(name: str, rest: str) -> HubSource:
    from open_clip import pretrained  # type: ignore[import-untyped]  # it ships no types

    model, slash, tag = rest.rpartition("/")
    models = [known for known, _ in pretrained.list_pretrained()]
    if not slash or model not in models:
        raise UserInputError(
            f"{name}: expected open_clip:MODEL/TAG with a model that open_clip knows, found {model or rest!r}"
            f"{did_you_mean(model or rest, models)}"
        )
    settings: dict[str, Any] = pretrained.get_pretrained_cfg(model, tag)
    if not settings:
        tags = pretrained.list_pretrained_tags_by_model(model)
        raise UserInputError(f"{name}: expected one of the tags {', '.join(tags)}, found {tag!r}")
    if not settings.get("quick_gelu", False):
        raise UserInputError(_other_activation(name))
    repository, file = _split_file(settings.get("hf_hub", ""))
    if not repository:
        raise UserInputError(_no_repository(name, settings.get("url", "")))
    return HubSource(name=name, repository=repository, revision=None, files=(file,) if file else _OPEN_CLIP_FILES)


def _timm(name: str, rest: str) -> HubSource:
    from timm.models import get_pretrained_cfg, list_pretrained

    known = list_pretrained()
    if not any(rest in (full, full.partition(".")[0]) for full in known):
        near = did_you_mean(rest, known)
        raise UserInputError(
            f"{name}: expected timm:NAME with a pretrained model that timm knows, found {rest!r}{near}"
        )
    settings: Any = get_pretrained_cfg(rest)  # one of the known names has them
    architecture = rest.partition(".")[0]
    if not is_quick_gelu(f"{architecture}.{settings.tag}"):
        raise UserInputError(_other_activation(name))
    repository, file = _split_file(settings.hf_hub_id or "")
    if not repository:
        raise UserInputError(_no_repository(name, settings.url or ""))
    file = file or settings.hf_hub_filename
    files = (file,) if file else _TIMM_FILES
    return HubSource(name=name, repository=repository, revision=None, files=files, architecture=architecture)


def is_quick_gelu(full_name: str) -> bool:
    """Whether timm's `ARCHITECTURE.TAG` is fit for an expert with QuickGELU; what is no CLIP passes.

    Weights of CLIP that were trained with it are listed under an architecture of that name too.
    """
    from timm.models import list_pretrained

    if "_clip_" not in full_name or "_clip_quickgelu_" in full_name:
        return True
    return full_name.replace("_clip_", "_clip_quickgelu_") in list_pretrained()


_SCHEMES: dict[str, Callable[[str, str], HubSource]] = {
    "hf-hub": _hugging_face,
    "open_clip": _open_clip,
    "timm": _timm,
}


def _split_file(text: str) -> tuple[str, str]:
    """`ORG/NAME/` or `ORG/NAME/FILE` as the registries write it."""
    parts = text.strip("/").split("/", 2)
    return "/".join(parts[:2]), parts[2] if len(parts) > 2 else ""


def _other_activation(name: str) -> str:
    return (
        f"{name}: expected weights that were trained with QuickGELU, as the spatial expert has it, found GELU; "
        "take those of openai, metaclip_400m or dfn2b"
    )


def _no_repository(name: str, url: str) -> str:
    told = f"; fetch {url} and give the file's path" if url else ""
    return f"{name}: expected weights in a repository of the hub, found none{told}"
