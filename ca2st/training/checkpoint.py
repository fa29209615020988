"""Checkpoint folders: complete or not there. A kill at any moment leaves the newest complete one usable.

``step-<n>.attempt-<a>/`` holds safetensors and JSON, never pickle. Each file follows the write protocol of
`ca2st.durable`; ``COMPLETE.json`` is written last and names every file by size and sha256, the run it belongs to,
and its own hash. A folder without it does not exist for readers and is swept at the next start.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ca2st.checked_json import DocumentError, checked
from ca2st.durable import NO_FAULTS, FaultPoints, fsync_folder, write_bytes
from ca2st.errors import CA2STError, EnvironmentFault, UserInputError
from ca2st.training.errors import CheckpointDamagedError
from ca2st.training.journal import open_sealed_json, sealed_json

MARKER_NAME = "COMPLETE.json"
CHECKPOINTS_NAME = "checkpoints"
FORMAT_VERSION = 1
MAX_FAILED_SAVES = 3
"""Saves in a row that may fail before the run stops: by then more than two cadences of work are at risk."""
_FOLDER_PATTERN = re.compile(r"step-(\d+)\.attempt-(\d+)")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointMarker:
    """Contents of ``COMPLETE.json``."""

    step: int
    attempt: int
    seed: int
    global_batch_size: int
    manifests: Mapping[str, str]
    """Fingerprint of each shard set's manifest, by role (``train``, ``validation``)."""
    recipe_sha256: str
    topology: Mapping[str, Any]
    """World size, device, micro-batch, CPU threads: bit-equal numbers are promised on the same topology only."""
    versions: Mapping[str, str]
    experts: Mapping[str, str] = field(default_factory=dict)
    """sha256 of each file of frozen weights in ``experts/`` of the run folder, by expert, or by what else is frozen."""
    start: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the trained model that the run began with; empty for none."""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """``size`` and ``sha256`` of every other file in the folder."""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint read and verified: what was hashed is what is held."""

    folder: Path
    marker: CheckpointMarker
    files: Mapping[str, bytes]


def checkpoint_name(step: int, attempt: int) -> str:
    """Return the folder name of a checkpoint; unique to the attempt, so nothing is ever overwritten."""
    return f"step-{step}.attempt-{attempt}"


def save_checkpoint(
    root: Path, files: Mapping[str, bytes], marker: CheckpointMarker, *, faults: FaultPoints = NO_FAULTS
) -> Path:
    """Write a new checkpoint folder below `root`, the marker last.

    Fault points: ``checkpoint.folder``, ``checkpoint.<file>.written`` and ``.renamed`` for every file
    (``checkpoint.COMPLETE.json.written`` ...). When a file cannot be written the half-made folder is removed.

    Raises:
        EnvironmentFault: no space, no permission; earlier checkpoints are untouched.
    """
    folder = root / checkpoint_name(marker.step, marker.attempt)
    named = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    document = {**asdict(marker), "files": named}
    try:
        folder.mkdir(parents=True)
        fsync_folder(root)
        faults.reach("checkpoint.folder")
        for name, data in files.items():
            write_bytes(folder / name, data, faults=faults, point=f"checkpoint.{name}")
        write_bytes(folder / MARKER_NAME, sealed_json(document), faults=faults, point=f"checkpoint.{MARKER_NAME}")
    except (OSError, EnvironmentFault) as error:
        if not (folder / MARKER_NAME).exists():
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, EnvironmentFault):
            raise
        raise EnvironmentFault(f"cannot write checkpoint {folder}: {error.strerror}; free space") from error
    return folder


def list_checkpoints(root: Path) -> list[Path]:
    """Return complete checkpoint folders below `root`, newest first: by attempt, then by step.

    A later attempt started from what an earlier one left, so its checkpoints are the run's present.
    """
    return [path for _, _, path in sorted(_folders(root), reverse=True) if (path / MARKER_NAME).exists()]


def step_of_checkpoint(folder: Path) -> int:
    """Return the step in a checkpoint folder's name."""
    match = _FOLDER_PATTERN.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def last_attempt_of_checkpoints(root: Path) -> int:
    """Return the highest attempt number of any checkpoint folder, complete or not; 0 when there is none."""
    return max((attempt for attempt, _, _ in _folders(root)), default=0)


def sweep_partial(root: Path) -> list[Path]:
    """Remove folders whose writer or remover was killed; the caller holds the run's lock."""
    partial = [path for _, _, path in _folders(root) if not (path / MARKER_NAME).exists()]
    for path in partial:
        shutil.rmtree(path, ignore_errors=True)
    return partial


def remove_checkpoint(folder: Path, *, faults: FaultPoints = NO_FAULTS) -> None:
    """Delete a checkpoint, its marker first, so that a kill half-way leaves a partial folder, not a damaged one.

    Fault points: ``checkpoint.unmarked``, ``checkpoint.removed``.
    """
    (folder / MARKER_NAME).unlink()
    fsync_folder(folder)
    faults.reach("checkpoint.unmarked")
    shutil.rmtree(folder)
    faults.reach("checkpoint.removed")


def read_marker(folder: Path) -> CheckpointMarker:
    """Read and check ``COMPLETE.json`` alone.

    Raises:
        UserInputError: not a checkpoint, or one of a format this version does not read.
        CheckpointDamagedError: its bytes are not what was written.
    """
    path = folder / MARKER_NAME
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserInputError(
            f"{folder}: expected a checkpoint folder with {MARKER_NAME}, found none ({error.strerror}); "
            "name a folder step-N.attempt-A"
        ) from error
    except OSError as error:
        raise CheckpointDamagedError(f"{path}: cannot be read ({error.strerror})") from error
    document = open_sealed_json(data, str(path))
    if document.get("format_version") != FORMAT_VERSION:
        raise UserInputError(
            f"{path}: checkpoint format {document.get('format_version')}, this ca2st reads {FORMAT_VERSION}; "
            "use a matching release"
        )
    try:
        return checked(document, CheckpointMarker, where=str(path))
    except DocumentError as error:
        raise CheckpointDamagedError(str(error)) from error


def read_checkpoint_file(folder: Path, name: str) -> bytes | None:
    """Return one file of a checkpoint, verified, or None where it has none; raises as `verify_checkpoint`."""
    facts = read_marker(folder).files.get(name)
    return None if facts is None else _verified(folder / name, facts)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a whole checkpoint and verify every byte before anything uses it; raises as `verify_checkpoint`."""
    marker = read_marker(folder)
    return Checkpoint(folder=folder, marker=marker, files=dict(_verified_files(folder, marker)))


def verify_checkpoint(folder: Path) -> CheckpointMarker:
    """Check every byte of a checkpoint without keeping it.

    Raises:
        UserInputError: as `read_marker`.
        CheckpointDamagedError: names the file that is missing, changed, or not of this checkpoint.
    """
    marker = read_marker(folder)
    for _ in _verified_files(folder, marker):
        pass
    return marker


def newest_sound(root: Path, read: Callable[[Path], T], *, strict: bool = False) -> tuple[T | None, tuple[str, ...]]:
    """Return what `read` gives of the newest checkpoint below `root` that is sound, and what is wrong with newer ones.

    `read` is `read_checkpoint` or `verify_checkpoint`. (None, ()) where there is no checkpoint.

    Raises:
        CheckpointDamagedError: there are checkpoints and none is sound, or (strict) the newest is not.
    """
    damaged: list[str] = []
    for folder in list_checkpoints(root):
        try:
            return read(folder), tuple(damaged)
        except CheckpointDamagedError as error:
            if strict:
                raise
            damaged.append(str(error))
    if damaged:
        raise CheckpointDamagedError(
            f"{root}: no sound checkpoint is left ({'; '.join(damaged)}); restore one, or train into another folder"
        )
    return None, ()


def _verified_files(folder: Path, marker: CheckpointMarker) -> Iterator[tuple[str, bytes]]:
    """Yield each file of a checkpoint, one at a time in memory; refuse files beside them."""
    strangers = sorted({path.name for path in folder.iterdir()} - set(marker.files) - {MARKER_NAME})
    if strangers:
        raise CheckpointDamagedError(f"{folder}: files that {MARKER_NAME} does not name: {strangers}; remove them")
    for name, facts in marker.files.items():
        yield name, _verified(folder / name, facts)


def _verified(path: Path, facts: Mapping[str, Any]) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointDamagedError(f"{path}: named by {MARKER_NAME} but not readable ({error.strerror})") from error
    found = hashlib.sha256(data).hexdigest()
    if len(data) != facts["size"] or found != facts["sha256"]:
        raise CheckpointDamagedError(
            f"{path}: expected {facts['size']} bytes with sha256 {facts['sha256'][:12]}..., "
            f"found {len(data)} with {found[:12]}..."
        )
    return data


def _folders(root: Path) -> list[tuple[int, int, Path]]:
    """Return attempt, step and path of every checkpoint folder, complete or not."""
    if not root.is_dir():
        return []
    named = [(_FOLDER_PATTERN.fullmatch(path.name), path) for path in root.iterdir()]
    return [(int(match[2]), int(match[1]), path) for match, path in named if match and path.is_dir()]


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveOutcome:
    """What came of a save."""

    folder: Path | None
    """The new checkpoint, or None when it could not be written."""
    problems: tuple[str, ...] = ()
    """Why it could not, or what could not be cleared away; training goes on."""
    num_failed: int = 0
    """Failed saves in a row, this one included."""


class CheckpointKeeper:
    """Writes checkpoints below one folder and keeps the newest and the best few. Lives on the main rank."""

    def __init__(self, root: Path, *, keep: int, faults: FaultPoints, keep_best: int = 0) -> None:
        self._root = root
        self._keep, self._keep_best = keep, keep_best
        self._faults = faults
        self._num_failed = 0

    def save(
        self,
        files: Mapping[str, bytes],
        marker: CheckpointMarker,
        *,
        best: Sequence[int] = (),
        before: Callable[[], None] = lambda: None,
    ) -> SaveOutcome:
        """Write a checkpoint, then clear old ones away once the new one is verified. A full disk is an outcome.

        `best`: validated steps, the best first. `before` makes durable what must not be older than the checkpoint: the
        journal.
        """
        try:
            before()
            folder = self._root / checkpoint_name(marker.step, marker.attempt)
            if folder.exists() and folder not in list_checkpoints(self._root):  # a failed save's, that kept it then
                shutil.rmtree(folder, ignore_errors=True)
            save_checkpoint(self._root, files, marker, faults=self._faults)
        except EnvironmentFault as error:
            self._num_failed += 1
            return SaveOutcome(folder=None, problems=(str(error),), num_failed=self._num_failed)
        self._num_failed = 0
        return SaveOutcome(folder=folder, problems=tuple(self.prune(best=best)))

    def prune(self, *, best: Sequence[int]) -> list[str]:
        """Remove what is neither among the newest nor among the best; returns what went wrong.

        Nothing is removed while the newest checkpoint is not sound.
        """
        folders = list_checkpoints(self._root)
        kept = {*folders[: self._keep], *folders_of_steps(folders, best)[: self._keep_best]}
        old = [folder for folder in folders if folder not in kept]
        if not old:
            return []
        # a disk that kept less than it said must not cost the older checkpoints too
        try:
            verify_checkpoint(folders[0])
        except CA2STError as error:
            return [f"kept {len(old)} old checkpoints, the new one is not sound: {error}"]
        problems = []
        for folder in old:
            try:
                remove_checkpoint(folder, faults=self._faults)
            except OSError as error:
                problems.append(f"cannot remove old checkpoint {folder}: {error.strerror}")
        return problems


def folders_of_steps(folders: Sequence[Path], steps: Sequence[int]) -> list[Path]:
    """Return the checkpoints of `steps`, in their order, that are among `folders`; of one step the newest attempt's.

    `folders` as `list_checkpoints` gives them.
    """
    newest = {step_of_checkpoint(folder): folder for folder in reversed(folders)}
    return [newest[step] for step in steps if step in newest]
