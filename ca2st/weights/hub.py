"""Public checkpoints by name: `hf-hub:ORG/NAME[@REVISION]`, `open_clip:MODEL/TAG`, `timm:NAME`; fetched, never loaded.

Names are worked out by the tables of open_clip and timm; neither package is ever asked to load a file. What comes is a
foreign file like any other: the importer reads it. A repository also tells what no tensor shows, the activation that
weights were trained with and their network: the wrong one loads, and gives wrong features.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ca2st.checked_json import read_json
from ca2st.errors import CA2STError, EnvironmentFault, UserInputError, did_you_mean
from ca2st.model.config import EncoderName
from ca2st.weights.tensor_files import WeightsMismatchError

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
    repository: str
    """ORG/NAME."""
    revision: str | None
    """Branch, tag or commit; None: the repository's main branch."""
    files: tuple[str, ...]
    """The first of these that the repository has is taken."""
    architecture: str = ""
    """The network in timm's words; empty where only the repository tells."""


def is_hub_name(text: str) -> bool:
    """Return whether `text` names a public checkpoint rather than a file."""
    return text.partition(":")[0] in _SCHEMES and ":" in text


def resolve_hub_name(name: str) -> HubSource:
    """Return the repository that a name stands for.

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
    source = HubSource(name=name, repository=settings.get("hf_hub", ""), revision=None, files=_OPEN_CLIP_FILES)
    return _checked(source, quick_gelu=settings.get("quick_gelu", False), url=settings.get("url", ""))


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
    files = (settings.hf_hub_filename,) if settings.hf_hub_filename else _TIMM_FILES
    repository = settings.hf_hub_id or ""
    source = HubSource(name=name, repository=repository, revision=None, files=files, architecture=architecture)
    return _checked(source, quick_gelu=is_quick_gelu(f"{architecture}.{settings.tag}"), url=settings.url or "")


def _checked(source: HubSource, *, quick_gelu: bool, url: str) -> HubSource:
    """Refuse a registry's entry that is of no use; its repository may be `NAME`, `ORG/NAME/` or `ORG/NAME/FILE`."""
    if not quick_gelu:
        raise UserInputError(
            f"{source.name}: expected weights that were trained with QuickGELU, as the spatial expert has it, found "
            "GELU; take those of openai, metaclip_400m or dfn2b"
        )
    parts = source.repository.strip("/").split("/", 2)
    if not parts[0]:
        told = f"; fetch {url} and give the file's path" if url else ""
        raise UserInputError(f"{source.name}: expected weights in a repository of the hub, found none{told}")
    return replace(source, repository="/".join(parts[:2]), files=tuple(parts[2:]) or source.files)


def is_quick_gelu(full_name: str) -> bool:
    """Return whether timm's `ARCHITECTURE.TAG` is fit for an expert with QuickGELU; what is no CLIP passes.

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a foreign file comes from, as reports and the header of the imported file tell it."""

    source: str
    """The name or path that was given."""
    repository: str = ""
    """Repository of the hub; empty for a file of this machine."""
    revision: str = ""
    """Commit of the repository, however it was named."""
    file: str = ""
    activation: str = ""
    """The activation that the repository names (`quick_gelu`, `gelu`); empty where it names none."""
    architecture: str = ""
    """The network in timm's words, by the name that was given or by the repository; empty where neither tells."""


CONFIG_FILES = ("config.json", "open_clip_config.json")
"""Where repositories say it, in the order they are asked."""
ACTIVATIONS: dict[EncoderName, str] = {"clip": "quick_gelu", "videomae": "gelu", "ast": "gelu"}
"""What our experts compute, in transformers' words."""
_ARCHITECTURES: dict[EncoderName, str] = {"resnet50": "resnet50"}
"""In timm's words, where other networks have the same tensors: ResNets with a blur before each stride, for one."""


def architecture_of(config: object) -> str:
    """Return the network that one of `CONFIG_FILES` names in timm's words; empty where it names none."""
    named = config.get("architecture") if isinstance(config, Mapping) else None
    return named if isinstance(named, str) else ""


def activation_of(config: object, *, repository: str) -> str:
    """Return the activation that one of `CONFIG_FILES` names, in transformers' words; empty where it names none.

    transformers writes `hidden_act`, of CLIP's visual half below `vision_config`; open_clip writes `quick_gelu`, and
    leaves it out where it is false; timm's CLIPs have it in their `architecture`, or by their tag in timm's list. The
    tag is below `pretrained_cfg`, or at the end of the name of `repository`.
    """
    if not isinstance(config, Mapping):
        return ""
    if "_clip_" in (architecture := architecture_of(config)):
        pretrained = config.get("pretrained_cfg")
        tag = pretrained.get("tag") if isinstance(pretrained, Mapping) else None
        tag = tag or repository.partition("/")[2].partition(".")[2]
        return "quick_gelu" if is_quick_gelu(f"{architecture}.{tag}") else "gelu"
    model = config.get("model_cfg")
    if isinstance(model, Mapping):
        return "quick_gelu" if model.get("quick_gelu") else "gelu"
    vision = config.get("vision_config")
    named = vision.get("hidden_act") if isinstance(vision, Mapping) else config.get("hidden_act")
    return named if isinstance(named, str) else ""


def check_origin(origin: Origin, encoder: EncoderName) -> None:
    """Raise WeightsMismatchError for another activation or network than our expert's, which tensors do not show.

    An activation that is not known passes. A network that is not known passes for a plain file alone: other public
    checkpoints have the names and shapes of ours.
    """
    expected = ACTIVATIONS.get(encoder, "")
    if origin.activation and expected and origin.activation != expected:
        raise WeightsMismatchError(
            f"{origin.source}: expected weights trained with {expected}, as our {encoder} computes, found "
            f"{origin.activation}; they would load and give wrong features: take others"
        )
    expected, found = _ARCHITECTURES.get(encoder, ""), origin.architecture
    if (origin.repository or found) and expected and found != expected:
        raise WeightsMismatchError(
            f"{origin.source}: expected the architecture {expected}, found {found or 'none in its config.json'}; "
            "other networks have the same tensors and give other features: take another, or give the path of a file "
            "that you know"
        )


_MAX_CONFIG_BYTES = 2**24
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True, slots=True)
class HubAccess:
    """Which hub is asked, and where its files are kept. What is None is as huggingface_hub has it."""

    endpoint: str | None = None
    cache_folder: Path | None = None
    """Folder of downloads; a file is fetched once."""
    answer_seconds: float = 10.0
    """Longest wait for an answer. Nothing is asked twice, so a command ends at once where there is no network; only a
    file whose transfer breaks off is gone on with, five times, some seconds in all."""


def fetch(name: str, access: HubAccess) -> tuple[Path, Origin]:
    """Resolve a public name and bring the weights among the repository's files here: the file, and where it is from.

    Raises:
        UserInputError: an unknown name, repository or revision, or a repository without a file that is looked for.
        EnvironmentFault: the hub cannot be reached, or refuses; the message says how to do without it.
    """
    from huggingface_hub import HfApi, hf_hub_download

    source = resolve_hub_name(name)
    api = HfApi(endpoint=access.endpoint)
    with _told(source, api.endpoint):
        info = api.model_info(source.repository, revision=source.revision, timeout=access.answer_seconds)
        found = [sibling.rfilename for sibling in info.siblings or ()]
        file = next((wanted for wanted in source.files if wanted in found), None)
        commit = info.sha or ""
        if not _COMMIT.fullmatch(commit):
            raise UserInputError(
                f"{name}: expected {api.endpoint} to name a commit of {source.repository}, found {info.sha!r}; "
                "is it a hub?"
            )
        if file is None:
            listed = ", ".join(sorted(found)[:12]) or "no files"
            raise UserInputError(
                f"{name}: expected one of {', '.join(source.files)} in {source.repository}, found {listed}"
            )
        bring = partial(
            hf_hub_download,
            source.repository,
            revision=commit,
            endpoint=access.endpoint,
            cache_dir=access.cache_folder,
            etag_timeout=access.answer_seconds,
        )
        configs = [json.loads(Path(bring(config)).read_bytes()) for config in CONFIG_FILES if config in found]
        path = Path(bring(file))
    origin = Origin(source=name, repository=source.repository, revision=commit, file=file)
    return path, with_told(replace(origin, architecture=source.architecture), configs)


def configs_beside(file: Path) -> list[dict[str, Any]]:
    """Return the configurations that lie in the folder of a checkpoint, as a repository's does.

    Raises:
        DocumentError: one of them is no JSON object.
    """
    paths = [file.parent / name for name in CONFIG_FILES]
    return [read_json(path, dict[str, Any], most_bytes=_MAX_CONFIG_BYTES) for path in paths if path.is_file()]


def with_told(origin: Origin, configs: Sequence[object]) -> Origin:
    """The origin with what its name (already there) and the configs beside the weights tell; the first counts."""
    activations = (activation_of(config, repository=origin.repository) for config in configs)
    architectures = (origin.architecture, *(architecture_of(config) for config in configs))
    return replace(
        origin, activation=next(filter(None, activations), ""), architecture=next(filter(None, architectures), "")
    )


@contextmanager
def _told(source: HubSource, endpoint: str) -> Iterator[None]:
    """Turn whatever goes wrong with a hub into one line that says what to do."""
    from httpx2 import HTTPError  # huggingface_hub's own client
    from huggingface_hub import errors

    at = f"{source.repository} (revision {source.revision or 'main'})"
    elsewhere = (
        f"fetch {' or '.join(source.files)} from {endpoint}/{source.repository} where there is a network, "
        "bring the file here and give its path instead of the name"
    )
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise UserInputError(f"{source.name}: {endpoint} has no {at}; check the revision") from error
    except errors.GatedRepoError as error:
        raise EnvironmentFault(f"{source.name}: {endpoint} gives {at} to accounts only; {elsewhere}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserInputError(f"{source.name}: {endpoint} has no {at}, or not for everyone; check the name") from error
    except CA2STError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # the last: an answer that is no hub's
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise EnvironmentFault(f"{source.name}: cannot get {at} from {endpoint} ({why}); {elsewhere}") from error
