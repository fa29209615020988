"""What a run keeps in its checkpoints, and how a later attempt goes on from them: exactly, or not at all.

`RunRecord` and `identity` say what makes two trainings the same run, `collect_state` and `read_state` how model and
optimizer become files and come back, `open_run` where an attempt starts. Only trained parameters and the buffers beside
them are kept; what is frozen lives once in the run's ``experts/``.
"""

import json
import logging
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from ca2st import __version__
from ca2st.batch import described
from ca2st.checked_json import canonical_json
from ca2st.errors import UserInputError, listed
from ca2st.training import checkpoint, journal
from ca2st.training.best import validations
from ca2st.training.errors import CheckpointMismatchError, ResumeRefusedError
from ca2st.training.journal import differences, sha256_of_document
from ca2st.training.sharded import as_held, put, whole

RECIPE_FILE = "recipe.json"
LOADER_FILE = "loader.json"
SCHEDULE_FILE = "schedule.json"
MODEL_FILE = "model.safetensors"
AVERAGE_FILE = "average.safetensors"
"""The moving average of the trained weights, of a run that keeps one."""
OPTIMIZER_FILE = "optimizer.safetensors"
OPTIMIZER_SCALARS_FILE = "optimizer.json"
_RESERVED = ("recipe", "loader", "schedule", "optimizer", "COMPLETE")
_LOSS_SCALE = "loss_scale"
_NAME = re.compile(r"[a-z0-9_-]+")
_LIBRARIES = ("torch", "accelerate", "safetensors", "numpy")
_LINE = "\n  "
_LOGGER = logging.getLogger(__name__)


def library_versions() -> dict[str, str]:
    """Return the versions that training's numbers depend on; callers add those of their loaders."""
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

    @property
    def recipe_sha256(self) -> str:
        """Return the hash of ``recipe.json``."""
        return sha256_of_document(self.recipe)


def identity(record: RunRecord, *, seed: int, global_batch_size: int) -> dict[str, Any]:
    """Return what must not change in a run's life, as one document.

    Raises:
        ValueError, TypeError: recipe or loader are no JSON; known here before the first step, not at the first save.
    """
    return {
        "seed": seed,
        "global_batch_size": global_batch_size,
        "manifests": dict(record.manifests),
        "experts": dict(record.experts),
        "start": dict(record.start),
        "loader": json.loads(canonical_json(record.loader)),
        "recipe": json.loads(canonical_json(record.recipe)),
    }


def identity_of(saved: checkpoint.Checkpoint) -> dict[str, Any]:
    """Return the identity that a checkpoint was saved under."""
    marked = ("seed", "global_batch_size", "manifests", "experts", "start")
    return {
        **{name: getattr(saved.marker, name) for name in marked},
        "loader": json.loads(saved.files[LOADER_FILE])["plan"],
        "recipe": json.loads(saved.files[RECIPE_FILE]),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStart:
    """How this attempt begins; decided on the main rank for all."""

    attempt: int
    """1 for a new run."""
    folder: Path | None
    """Checkpoint to resume, verified; None starts at step 0."""
    step: int
    damaged: tuple[str, ...]
    """Newer checkpoints passed over because their bytes are damaged: what and where."""
    changes: tuple[str, ...]
    """Versions and topology that differ from the checkpoint's."""
    cut_bytes: int
    """Bytes of a torn last journal line that were cut."""
    swept: tuple[str, ...]
    """Names of half-written checkpoint folders that were removed."""
    validations: Mapping[int, Mapping[str, float | None]]
    """Metrics of each validated step up to `step`, as the journal has them."""
    skipped: tuple[int, ...] = ()
    """Steps up to `step` that were left out."""


def open_run(
    folder: Path,
    *,
    wanted: Mapping[str, Any],
    versions: Mapping[str, str],
    topology: Mapping[str, Any],
    strict: bool = False,
) -> RunStart:
    """Tidy a run folder and find where to go on; the caller holds its lock.

    `wanted` is the identity of the run to be (`identity`); `versions` and `topology` are those of now;
    `strict` refuses damage and other versions instead of warning.

    Raises:
        ResumeRefusedError: the folder holds another run, or (strict) one of other versions.
        CheckpointDamagedError: no checkpoint is sound, or (strict) the newest is not.
    """
    root, lines = folder / checkpoint.CHECKPOINTS_NAME, folder / journal.JOURNAL_NAME
    root.mkdir(parents=True, exist_ok=True)
    cut_bytes = journal.cut_torn_end(lines)
    attempt = 1 + max(journal.last_attempt(lines), checkpoint.last_attempt_of_checkpoints(root))
    swept = tuple(path.name for path in checkpoint.sweep_partial(root))
    saved, damaged = checkpoint.newest_sound(root, checkpoint.read_checkpoint, strict=strict)
    for problem in damaged:
        _LOGGER.warning("DAMAGED CHECKPOINT passed over, an older one is used: %s", problem)
    changed: list[str] = []
    if saved is not None:
        if changed := differences(identity_of(saved), wanted):
            raise ResumeRefusedError(
                f"{saved.folder}: saved by another run:\n  {_LINE.join(changed)}\n"
                "undo the change, or train into another folder"
            )
        changed = differences(saved.marker.versions, versions)
        if changed and strict:
            raise ResumeRefusedError(
                f"saved under other versions: {'; '.join(changed)}; install those, or resume without --strict-resume"
            )
        changed += differences(saved.marker.topology, topology)
        if changed:
            _LOGGER.warning("resuming with changes, numbers will be close but may not be equal: %s", "; ".join(changed))
    step = saved.marker.step if saved else 0
    return RunStart(
        attempt=attempt,
        folder=saved.folder if saved else None,
        step=step,
        damaged=damaged,
        changes=tuple(changed),
        cut_bytes=cut_bytes,
        swept=swept,
        validations=validations(lines, until=step),
        skipped=tuple(journal.skipped_steps(lines, until=step)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedState:
    """State read back from a checkpoint, checked against model and optimizer, not yet put in place."""

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Tensor]]
    """State of each parameter by its name: ``exp_avg``, ``exp_avg_sq``, ``step``."""
    average: Mapping[str, Tensor] | None = None
    """The moving average of the trained weights, where there is one."""
    loss_scale: Mapping[str, float] | None = None
    """What the losses of a run in fp16 are scaled by."""


def collect_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    average: Mapping[str, Tensor] | None = None,
    loss_scale: Mapping[str, float] | None = None,
) -> dict[str, bytes]:
    """Return files that hold the trained state: two of tensors, one of the optimizer's scalars and settings.

    `average`, where there is one, is a third file of tensors; `loss_scale` goes to the scalars. Every rank of a sharded
    model calls it.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, parameter in _optimized(model, optimizer):
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):  # one order on all ranks: `whole`
            if isinstance(value, Tensor) and value.ndim > 0:
                tensors[f"{key}/{name}"] = _portable(value)
            else:
                scalars.setdefault(name, {})[key] = float(value)
    document: dict[str, Any] = {"state": scalars, "groups": _group_settings(optimizer)}
    if loss_scale is not None:
        document[_LOSS_SCALE] = dict(loss_scale)
    files = {
        MODEL_FILE: save({name: _portable(tensor) for name, tensor in trained_tensors(model).items()}),
        OPTIMIZER_FILE: save(tensors),
        OPTIMIZER_SCALARS_FILE: canonical_json(document),
    }
    if average is not None:
        files[AVERAGE_FILE] = save({name: _portable(tensor) for name, tensor in average.items()})
    return files


def tensors_to_use(files: Mapping[str, bytes]) -> bytes:
    """Return the file of a checkpoint whose weights are tested and predict: the average where there is one."""
    return files.get(AVERAGE_FILE, files[MODEL_FILE])


def read_state(model: nn.Module, optimizer: torch.optim.Optimizer, *, files: Mapping[str, bytes]) -> TrainedState:
    """Parse a checkpoint's tensors and check every name, shape and type before anything is changed.

    Raises:
        CheckpointMismatchError: they do not fit; lists what is missing, unexpected or of another shape.
    """
    tensors = read_model_tensors(model, data=files[MODEL_FILE])
    expected = dict(_optimized(model, optimizer))
    states: dict[str, dict[str, Tensor]] = {}
    problems = []
    for label, tensor in load(files[OPTIMIZER_FILE]).items():
        key, _, name = label.partition("/")
        states.setdefault(name, {})[key] = tensor
        if name in expected and tensor.shape != expected[name].shape:
            problems.append(_shape_problem(label, expected[name], tensor))
    document = json.loads(files[OPTIMIZER_SCALARS_FILE])
    changed = differences({"groups": document["groups"]}, {"groups": _group_settings(optimizer)})
    problems += [f"optimizer {change}" for change in changed]
    for name, scalars in document["state"].items():
        states.setdefault(name, {}).update({key: torch.tensor(value) for key, value in scalars.items()})
    problems += [f"{name}: optimizer state of a parameter that is not trained" for name in states.keys() - expected]
    _refuse(sorted(problems))
    average = read_model_tensors(model, data=files[AVERAGE_FILE]) if AVERAGE_FILE in files else None
    return TrainedState(model=tensors, optimizer=states, average=average, loss_scale=document.get(_LOSS_SCALE))


def put_state(model: nn.Module, optimizer: torch.optim.Optimizer, *, state: TrainedState) -> None:
    """Swap `state` in; nothing in here can fail half-way for data's sake, `read_state` has checked it."""
    put_model_tensors(model, tensors=state.model)
    optimizer.state.clear()
    for name, parameter in _optimized(model, optimizer):
        if name in state.optimizer:
            optimizer.state[parameter] = {
                key: as_held(value, parameter) if value.ndim > 0 else value.clone()
                for key, value in state.optimizer[name].items()
            }


def read_model_tensors(model: nn.Module, *, data: bytes) -> dict[str, Tensor]:
    """Parse ``model.safetensors`` of a checkpoint and check it against the model; raises as `read_state`."""
    tensors, expected = load(data), trained_tensors(model)
    problems = [f"{name}: missing from the checkpoint" for name in expected.keys() - tensors.keys()]
    problems += [f"{name}: in the checkpoint, not trained here" for name in tensors.keys() - expected.keys()]
    problems += [
        _shape_problem(name, expected[name], tensors[name])
        for name in expected.keys() & tensors.keys()
        if tensors[name].shape != expected[name].shape or tensors[name].dtype != expected[name].dtype
    ]
    _refuse(sorted(problems))
    return tensors


def put_model_tensors(model: nn.Module, *, tensors: Mapping[str, Tensor]) -> None:
    """Copy checked tensors into the model's trained parameters and buffers."""
    put(trained_tensors(model), tensors)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return trained parameters, and the persistent buffers of modules that train, by name.

    A buffer belongs to the nearest enclosing module that has parameters; it is kept when any of those is trained
    (running statistics of a trained BatchNorm), left out when all are frozen (they come with the expert).
    """
    tensors: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    modules = dict(model.named_modules())
    persistent = model.state_dict(keep_vars=True).keys()
    buffers = {
        name: buffer
        for name, buffer in model.named_buffers()
        if name in persistent and _is_trained(modules, name.rpartition(".")[0])
    }
    return tensors | buffers


def _is_trained(modules: Mapping[str, nn.Module], owner: str) -> bool:
    while True:
        flags = [parameter.requires_grad for parameter in modules[owner].parameters()]
        if flags or not owner:
            return any(flags)
        owner = owner.rpartition(".")[0]


def _optimized(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names[parameter], parameter


def _group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the settings of each group but its rate, which is the schedule's."""
    return [
        {key: value for key, value in group.items() if key not in ("params", "lr")} for group in optimizer.param_groups
    ]


def _portable(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).cpu().contiguous().clone()


def _shape_problem(name: str, expected: Tensor, found: Tensor) -> str:
    return f"{name}: expected {described(expected)}, found {described(found)}"


def _refuse(problems: list[str]) -> None:
    if problems:
        raise CheckpointMismatchError(
            f"checkpoint and model differ in {len(problems)} places:\n  "
            f"{listed(problems, most=20, separator=_LINE)}\nuse the model that the checkpoint names"
        )
