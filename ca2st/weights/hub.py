"""Fetching a public checkpoint. What comes is a foreign file like any other: the importer reads it, no hub does."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ca2st.checked_json import read_json
from ca2st.errors import CA2STError, EnvironmentFault, UserInputError
from ca2st.weights.hub_config import CONFIG_FILES, activation_of, architecture_of
from ca2st.weights.hub_names import HubSource, resolve_hub_name

ANSWER_SECONDS = 10.0
"""Longest wait for a hub's answer. Nothing is asked twice, so a command ends at once where there is no network; only a
file whose transfer breaks off is gone on with, five times, some seconds in all."""
_MAX_CONFIG_BYTES = 2**24
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True, slots=True)
class HubAccess:
    """Which hub is asked, and where its files are kept. What is None is as huggingface_hub has it."""

    endpoint: str | None = None
    """Address of the hub."""
    cache_folder: Path | None = None
    """Folder of downloads; a file is fetched once."""
    answer_seconds: float = ANSWER_SECONDS
    """Longest wait for an answer."""


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
    """The file in the repository."""
    activation: str = ""
    """The activation that the repository names (`quick_gelu`, `gelu`); empty where it names none."""
    architecture: str = ""
    """The network in timm's words, by the name that was given or by the repository; empty where neither tells."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchedFile:
    """A file of a hub, on this machine."""

    path: Path
    """Where it is kept."""
    origin: Origin
    """Where it comes from."""


def fetch(name: str, access: HubAccess) -> FetchedFile:
    """Resolve a public name, find the weights among the repository's files, and bring them here.

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
    return FetchedFile(path=path, origin=with_told(replace(origin, architecture=source.architecture), configs))


def configs_beside(file: Path) -> list[dict[str, Any]]:
    """The configurations that lie in the folder of a checkpoint, as a repository's does.

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
