"""Events of a journal, and the state of what was sent.

What is kept of tracking in a run folder: what the run is called, and how much of it MLflow has.

Two files with one writer each, so that nobody waits: ``tracking.json`` by who trains, ``tracking_progress.json`` by
whoever sends and holds the sender's lock.

From journal lines to the numbers that MLflow gets: pure, but for reading the files.
"""

import json
import logging
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ca2st.checked_json import DocumentError, encoded, read_json
from ca2st.durable import open_itself, take_lock, write_bytes
from ca2st.errors import UserInputError
from ca2st.training.journal import JOURNAL_NAME, parse_event, read_events
from ray_jobs.errors import TrackingUnavailableError

_LOGGER = logging.getLogger(__name__)
STATE_NAME = "tracking.json"
PROGRESS_NAME = "tracking_progress.json"
LOCK_NAME = "tracking.lock"
FOLDER_TAG, COPY_TAG = "ca2st.run_dir", "ca2st.copied_from"
"""Where the run lives; and, of a run whose folder was copied, where the folder was that it is a copy of."""
_BLOCK_BYTES = 65_536


class SenderBusyError(TrackingUnavailableError):
    """Another process is sending this run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How much of a run MLflow has."""

    run_id: str | None = None
    """MLflow's run, made at the first sync."""
    attempt: int = 0
    """The newest whose start was sent."""
    sent_bytes: int = 0
    """Length of the journal's prefix that MLflow has."""
    last_step: int = -1
    """Highest step sent: a resumed attempt's repeated steps are not sent again."""
    last_evals: Mapping[str, int] = field(default_factory=dict)
    """The same of evaluations, by split."""
    params: Mapping[str, str] = field(default_factory=dict)
    """Settings as MLflow has them: it takes a param once."""
    system_bytes: Mapping[str, int] = field(default_factory=dict)
    """Length sent of each node's file of system metrics."""
    pending: tuple[str, ...] = ()
    """Names of the extras (inputs, artefacts, registered model) whose time has come and that MLflow lacks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingState:
    """What a run is called in MLflow, and how much of it MLflow has."""

    uri: str
    """MLflow tracking URI without credentials: ``sqlite:///path`` or a server's address."""
    experiment: str
    run_name: str
    params: Mapping[str, str]
    """Settings of the newest attempt."""
    tags: Mapping[str, str]
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """A tag of the run in MLflow, by which it is found when the answer to its making was lost."""
    progress: Progress = Progress()

    @property
    def run_id(self) -> str | None:
        """MLflow's run; None before the first sync."""
        return self.progress.run_id


def open_tracking(run_dir: Path, state: TrackingState) -> TrackingState:
    """Keep `state` beside the journal; of a run that is resumed the names stay, settings and tags are the new ones."""
    kept = None
    try:
        if (run_dir / STATE_NAME).exists():
            separate_copy(run_dir)
            kept = read_state(run_dir)
    except DocumentError as error:
        _LOGGER.warning("DAMAGED %s; it is written anew, and MLflow may get a new run", error)
    if kept is not None:
        state = replace(kept, uri=state.uri, params=state.params, tags={**kept.tags, **state.tags})
    document = asdict(state)
    del document["progress"]
    _write(run_dir / STATE_NAME, document)
    return state


def separate_copy(run_dir: Path) -> Path | None:
    """Give a run folder that was copied a run of its own in MLflow, which gets the journal from its start.

    A copy is known by the folder that its run lives in, while that is there and still has the same run; a folder that
    was moved keeps its run.

    Returns:
        The folder it was copied from; None where it is no copy.
    """
    kept = read_state(run_dir)
    origin = Path(kept.tags.get(FOLDER_TAG, run_dir))
    try:
        is_copy = not origin.samefile(run_dir) and read_state(origin).key == kept.key
    except (OSError, UserInputError, DocumentError):  # moved, or of another machine
        return None
    if not is_copy:
        return None
    write_progress(run_dir, Progress())  # before the new key: killed in between it is still seen to be a copy
    document = asdict(kept) | {
        "key": uuid.uuid4().hex,
        "tags": {**kept.tags, FOLDER_TAG: str(run_dir.resolve()), COPY_TAG: str(origin)},
    }
    del document["progress"]
    _write(run_dir / STATE_NAME, document)
    return origin


def read_state(run_dir: Path) -> TrackingState:
    """The tracking state of a run folder.

    Raises:
        UserInputError: the folder has none: no training with tracking was started there.
        DocumentError: it is not what was written; the next start in the folder writes it anew.
    """
    path = run_dir / STATE_NAME
    if run_dir.exists() and not run_dir.is_dir():
        raise UserInputError(f"{run_dir}: expected the folder of a training run, found a file")
    progress = _read_progress(run_dir)
    try:
        return replace(read_json(path, TrackingState), progress=progress)
    except FileNotFoundError:
        raise UserInputError(f"{path}: no such file; expected the folder of a training run") from None
    except DocumentError as error:
        raise DocumentError(f"{error}; rerun the training's command, which writes the file anew") from error


def write_progress(run_dir: Path, progress: Progress) -> None:
    """Keep what MLflow has; the caller holds the sender's lock."""
    _write(run_dir / PROGRESS_NAME, asdict(progress))


def unsent_bytes(run_dir: Path) -> int:
    """Length of the journal's whole lines that MLflow does not have; 0 while there is no journal.

    A torn last line, left by a killed writer, is none of them: nobody sends it, and the next start cuts it off.
    """
    journal = run_dir / JOURNAL_NAME
    if not journal.exists():
        return 0
    sent = _read_progress(run_dir).sent_bytes
    with journal.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > sent:
            begin = max(sent, end - _BLOCK_BYTES)
            file.seek(begin)
            newline = file.read(end - begin).rfind(b"\n")
            if newline >= 0:
                return begin + newline + 1 - sent
            end = begin
    return 0


@contextmanager
def one_sender(run_dir: Path, *, wait_seconds: float) -> Iterator[None]:
    """Hold the sender's lock of a run: two at once would make two MLflow runs.

    The follower of a killed attempt outlives it by a last sync. The kernel releases the lock when its holder ends,
    however it ends.

    Raises:
        SenderBusyError: another process still holds it after `wait_seconds`.
        UserInputError: no training with tracking was started there.
    """
    read_state(run_dir)
    with open_itself(run_dir / LOCK_NAME, "ab") as file:
        if not take_lock(file, wait_seconds=wait_seconds):
            raise SenderBusyError(
                f"{run_dir}: another process is sending this run to MLflow; wait for it and run "
                f"`ca2st track sync {run_dir}` again"
            )
        yield


def _read_progress(run_dir: Path) -> Progress:
    """How far it is; of a damaged file nothing, since what is sent twice MLflow keeps once."""
    path = run_dir / PROGRESS_NAME
    try:
        return read_json(path, Progress)
    except FileNotFoundError:
        return Progress()
    except DocumentError as error:
        _LOGGER.warning("DAMAGED %s; it is set aside, and all of the journal is sent to MLflow again", error)
        with suppress(OSError):
            path.replace(path.with_name(f"{PROGRESS_NAME}.damaged"))
        return Progress()


def _write(path: Path, document: Mapping[str, object]) -> None:
    write_bytes(path, encoded(json.dumps(document, indent=1, ensure_ascii=False) + "\n"), point="tracking")


_BATCH_VALUES = 500  # MLflow takes at most 1000 metrics a call
_NOT_METRICS = frozenset({"event", "attempt", "step", "time", "sample_ids_hash"})
WORLD_SIZE = "train/world_size"
"""Training processes of the steps that follow: an elastic run has more and fewer."""
SYSTEM_PREFIX = "system/"
"""Of what is measured on a node, beside the run and not of it."""


class Value(NamedTuple):
    """One number of a metric."""

    name: str
    value: float
    milliseconds: int
    """Since 1970."""
    step: int


def step_values(event: Mapping[str, Any]) -> Iterator[Value]:
    """Numbers of a line: ``train/loss``, ``stage/decode_seconds``, ``validation/top1``, ``train/world_size``.

    A metric of an evaluation that was not finite, which the journal holds by name only, is NaN.
    """
    if event["event"] == "step":
        named = {f"train/{name}": value for name, value in event.items() if name not in _NOT_METRICS}
        for times in ("stages", "loader"):
            named |= {_stage_name(name): value for name, value in event.get(times, {}).items()}
    elif event["event"] == "eval":
        metrics = event["metrics"] | dict.fromkeys(event.get("not_finite", ()), math.nan)
        named = {f"{event['split']}/{name}": value for name, value in metrics.items()}
    elif event["event"] == "start":
        named = {WORLD_SIZE: event.get("topology", {}).get("world_size")}
    else:
        return
    for name, value in named.items():
        if _is_number(value):
            yield Value(name, float(value), milliseconds(event), event["step"])


def system_values(line: Mapping[str, Any], node: str) -> Iterator[Value]:
    """Numbers of a line of ``system/<node>.jsonl`` as ``system/<node>/<name>``."""
    for name, value in line["metrics"].items():
        if _is_number(value):
            yield Value(f"{SYSTEM_PREFIX}{node}/{name}", float(value), milliseconds(line), int(line["step"]))


def read_batches(path: Path, offset: int, *, kind: type | None = None) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Whole lines behind `offset`, in batches small enough for one call, with the offset behind each.

    Damaged lines are left out with a warning; `kind` as for `parse_event`.
    """
    if not path.exists():
        return
    batch: list[dict[str, Any]] = []
    num_values, begin = 0, offset
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                break
            event = parse_event(line, where=f"{path}: line at byte {offset}", kind=kind)
            if event is None:
                offset += len(line)
                continue
            size = len(event) + sum(len(value) for value in event.values() if isinstance(value, dict))
            if batch and num_values + size > _BATCH_VALUES:
                yield batch, offset
                batch, num_values, begin = [], 0, offset
            batch.append(event)
            num_values += size
            offset += len(line)
    if batch or offset > begin:
        yield batch, offset


def begin_milliseconds(journal: Path) -> int | None:
    """When the first line was written, since 1970; None while there is no whole one."""
    first = next(read_events(journal), None)
    return None if first is None else milliseconds(first)


def milliseconds(line: Mapping[str, Any]) -> int:
    """When a line was written, since 1970."""
    return int(float(line["time"]) * 1000)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _stage_name(name: str) -> str:
    """Times of the step and of the loader's threads side by side; what the loader counts is ``data/bytes_read``."""
    return f"stage/{name}" if name.endswith("_seconds") else f"data/{name}"
