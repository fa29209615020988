"""What makes two trainings the same run, and how a resumed one is compared with what it resumes."""

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from ca2st import __version__
from ca2st.errors import UserInputError
from ca2st.training.checkpoint import Checkpoint, CheckpointMarker
from ca2st.training.documents import canonical_json, differences, sha256_of_document
from ca2st.training.errors import ResumeRefusedError

RECIPE_FILE = "recipe.json"
LOADER_FILE = "loader.json"
_RESERVED = ("recipe", "loader", "schedule", "optimizer", "COMPLETE")
_NAME = re.compile(r"[a-z0-9_-]+")
_LIBRARIES = ("torch", "accelerate", "safetensors", "numpy")


def library_versions() -> dict[str, str]:
    """Versions that training's numbers depend on; callers add those of their loaders."""
    return {"python": platform.python_version(), "ca2st": __version__} | {name: version(name) for name in _LIBRARIES}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """What the caller knows of a run and a checkpoint must remember. All of it is plain JSON."""

    manifests: Mapping[str, str]
    """Fingerprint of each shard set's manifest, by role; must equal at resume."""
    recipe: Mapping[str, Any]
    """The resolved recipe; must equal at resume. Leave out what may change: workers, paths, cadences."""
    loader: Mapping[str, Any] = field(default_factory=dict)
    """What the order of the clips follows from (lanes, shuffle block, rules' version); must equal at resume."""
    experts: Mapping[str, str] = field(default_factory=dict)
    """sha256 of each file of frozen weights, by expert, or by what else is frozen; must equal at resume."""
    start: Mapping[str, str] = field(default_factory=dict)
    """What trained model the run began with (``sha256``); empty for none; must equal at resume."""
    versions: Mapping[str, str] = field(default_factory=library_versions)
    """Library versions; a difference at resume warns, or refuses when strict."""
    documents: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further JSON documents kept in every checkpoint as ``<name>.json``: class names, model configuration."""

    def __post_init__(self) -> None:
        wrong = [name for name in self.documents if name in _RESERVED or not _NAME.fullmatch(name)]
        if wrong:
            raise UserInputError(
                f"documents: expected names of a-z, 0-9, _ and - other than {', '.join(_RESERVED)}, found {wrong}"
            )

    def files(self) -> dict[str, bytes]:
        """The record's files in a checkpoint folder."""
        extra = {f"{name}.json": canonical_json(document) for name, document in self.documents.items()}
        return {RECIPE_FILE: canonical_json(self.recipe), **extra}

    @property
    def recipe_sha256(self) -> str:
        """Hash of ``recipe.json``."""
        return sha256_of_document(self.recipe)


def identity(record: RunRecord, *, seed: int, global_batch_size: int) -> dict[str, Any]:
    """What must not change in a run's life, as one document."""
    return {
        "seed": seed,
        "global_batch_size": global_batch_size,
        "manifests": dict(record.manifests),
        "experts": dict(record.experts),
        "start": dict(record.start),
        "loader": json.loads(canonical_json(record.loader)),
        "recipe": json.loads(canonical_json(record.recipe)),
    }


def identity_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The identity that a checkpoint was saved under."""
    marker = checkpoint.marker
    return {
        "seed": marker.seed,
        "global_batch_size": marker.global_batch_size,
        "manifests": dict(marker.manifests),
        "experts": dict(marker.experts),
        "start": dict(marker.start),
        "loader": json.loads(checkpoint.files[LOADER_FILE])["plan"],
        "recipe": json.loads(checkpoint.files[RECIPE_FILE]),
    }


def check_resumable(checkpoint: Checkpoint, wanted: Mapping[str, Any]) -> None:
    """Refuse to resume another run.

    Raises:
        ResumeRefusedError: lists each difference as ``field: was -> is``.
    """
    changed = differences(identity_of(checkpoint), wanted)
    if changed:
        listed = "\n  ".join(changed)
        raise ResumeRefusedError(
            f"{checkpoint.folder}: saved by another run:\n  {listed}\nundo the change, or train into another folder"
        )


def version_changes(marker: CheckpointMarker, versions: Mapping[str, str]) -> list[str]:
    """Libraries whose version differs from the checkpoint's, as ``name: was -> is``."""
    return differences(marker.versions, versions)
