"""The recipe: everything that decides a training run, in sections, read strictly.

An unknown key, a wrong type and a value out of range are all reported at once (`ray_jobs.config.recipe_file`). What a
recipe does not say has the default documented beside its field.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import ConfigDict, TypeAdapter

from ca2st.errors import UserInputError, check_choice
from ca2st.model.config import ExpertName, ExpertPrecision, ModelConfig, check_expert_precision, check_trainable
from ca2st.spec import ClipSpec
from ca2st.training.config import OptimConfig, TrainingConfig
from ca2st.training.journal import flatten
from pipelines.augment.config import AugmentConfig
from pipelines.config import LoaderConfig
from pipelines.order.selection import BalanceConfig, OrderConfig, SelectionConfig, TrainRemainder
from pipelines.views import EvaluationViews, SamplingConfig
from ray_jobs.console import parse_views
from ray_jobs.errors import ConflictsError
from ray_jobs.redaction import refuse_credentials
from sharding.format.remote import as_location
from sharding.synthetic.config import SyntheticConfig

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticData:
    """A small audio-visual world made by our own code, so that a recipe runs without any download."""

    num_train: int = 512
    """Clips of the training split."""
    num_validation: int = 128
    """Clips of the validation split."""
    frame_size: int = 64
    """Height and width of its frames in pixels."""
    frames_per_second: int = 16
    """Frame rate of its videos."""
    min_frames: int = 16
    """Frames of its shortest clip; all clips of ``binding`` have this many."""
    max_frames: int = 21
    """Frames of its longest clip."""
    task: str = "holistic"
    """What is labelled: ``space``, ``time``, ``audio`` or all three together, ``holistic``; or, in scenes of several
    objects, ``binding``: which of them keeps time with the sound."""
    difficulty: str = "easy"
    """``easy``, ``medium`` or ``hard``; sharding/synthetic/README.md says what each means."""
    seed: int = 0
    """Seed of the world; the splits never share a clip."""

    def __post_init__(self) -> None:
        if min(self.num_train, self.num_validation) < 1:
            raise UserInputError("num_train, num_validation: expected at least one clip each")
        self.world("train")

    def world(self, split: str, *, workers: int = 1) -> SyntheticConfig:
        """Return the settings of one split for those who make it.

        Raises:
            UserInputError: a value out of range.
        """
        return SyntheticConfig(
            num_samples=self.num_train if split == "train" else self.num_validation,
            frame_size=self.frame_size,
            frames_per_second=self.frames_per_second,
            min_frames=self.min_frames,
            max_frames=self.max_frames,
            difficulty=self.difficulty,
            binding=self.task == "binding",
            seed=self.seed,
            workers=workers,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureSet:
    """One of several shard sets that are trained on together: a ``[[data.mixture]]`` section."""

    train: str
    """Folder or URL of its shards. Every set must have the same classes for each target, in the same order."""
    weight: float | None = None
    """Its share of the samples, in parts of the sum of all weights; given for every set or for none. None: every sample
    of every set once per epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which shards, which labels, and how clips are drawn from them."""

    train: str | None = None
    """Folder or URL (s3, gs, http) of the training split's shards (``--data`` overrides it)."""
    mixture: tuple[MixtureSet, ...] = ()
    """Several shard sets in place of `train`."""
    select: SelectionConfig = field(default_factory=SelectionConfig)
    """Train on a part of the samples; validation stays whole."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Read rare classes more often in training; with weights, inside each set."""
    repeats: int = 1
    """Readings of each sample in a training batch, each with random views of its own: repeated augmentation. An epoch
    has as many times the steps; 1 is none. Source: Hoffer et al., "Augment your batch" (CVPR 2020)."""
    epoch_samples: int | None = None
    """Samples of an epoch before `repeats`; None: one pass, that is all sets' samples together."""
    remainder: TrainRemainder = "drop"
    """The end of an epoch that fills no whole batch: ``drop`` leaves it out, other samples each epoch; ``wrap`` fills
    the batch with the beginning of one more pass, so that all are read, even where they are fewer than a batch."""
    validation: str | None = None
    """Folder or URL of the validation split's shards; None: no validation."""
    split: int | None = None
    """Which of several splits of one dataset (UCF-101 has three): the number that stands for ``{split}`` in `train` and
    `validation`; the run's default folder ends in it."""
    synthetic: SyntheticData | None = None
    """Make this world's shards first, where `train` names none."""
    targets: tuple[str, ...] | None = None
    """Label spaces to learn, by name; None: the manifest's own targets."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Which frames of a clip."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random views in training."""
    views: EvaluationViews = field(default_factory=EvaluationViews)
    """Views per sample in validation while training."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """Order, threads, backend."""

    def __post_init__(self) -> None:
        mixture = [("mixture", entry.train) for entry in self.mixture]
        for name, place in [("train", self.train), ("validation", self.validation), *mixture]:
            if place is not None:
                try:
                    as_location(place)
                except UserInputError as error:  # its message holds no secret
                    raise UserInputError(f"{name}: {error}") from None
        if self.targets is not None and not self.targets:
            raise UserInputError(
                "targets: expected at least one label space, found none; leave it out for the set's own"
            )
        if repeated := [name for name, count in Counter(self.targets or ()).items() if count > 1]:
            raise UserInputError(f"targets: expected each label space once, found {', '.join(repeated)} more often")
        if self.mixture and (self.train is not None or self.synthetic is not None):
            other = "train" if self.train is not None else "synthetic"
            raise UserInputError(f"mixture: expected no data.{other} beside it; remove one of the two")
        weighted = [entry.train for entry in self.mixture if entry.weight is not None]
        if weighted and len(weighted) < len(self.mixture):
            bare = next(entry.train for entry in self.mixture if entry.weight is None)
            raise UserInputError(f"mixture: expected a weight for every set or for none, found none for {bare}")
        self.order()

    @property
    def validates(self) -> bool:
        """Return whether there is a validation split: named, or made with the world that is trained on."""
        return self.validation is not None or (self.synthetic is not None and self.train is None)

    def order(self) -> OrderConfig:
        """Return what decides which samples a training reads, beside the sets themselves."""
        weights = tuple(entry.weight for entry in self.mixture if entry.weight is not None)
        return OrderConfig(
            weights=weights or None,
            selection=self.select,
            balance=self.balance,
            repeats=self.repeats,
            epoch_samples=self.epoch_samples,
            remainder=self.remainder,
        )


Placement = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """How many processes train, where Ray puts them, and how it restarts them.

    No setting here changes the order of the samples, so each may be another one when a run is resumed.
    """

    workers: int = 1
    """Training processes; one per GPU where there are GPUs. With `min_workers` the most there may be."""
    min_workers: int | None = None
    """Under Ray: go on with as few as this many when a node is lost, and grow again up to `workers` when there is
    room. Losses then differ by rounding, the samples of every step do not. None: always `workers`."""
    threads_per_worker: int | None = None
    """Torch threads of a worker on a CPU; None: `cpus_per_worker`, or without it the machine's cores shared evenly
    among `workers`. Losses are bit-equal only at the same number."""
    cpus_per_worker: float | None = None
    """Processors that Ray sets aside for a worker; None: one where it trains on a CPU, none beside a GPU."""
    gpus_per_worker: Literal[0, 1] | None = None
    """Under Ray: GPUs of a worker; None: one where a node of the cluster has GPUs, else none."""
    accelerator_type: str | None = None
    """Under Ray: train only on nodes with this accelerator, by Ray's name for it: ``H100``, ``A100``, ..."""
    placement: Placement = "PACK"
    """Under Ray: ``PACK`` on few nodes or ``SPREAD`` over many where it can be; ``STRICT_``: or not at all."""
    max_failures: int = 3
    """Restarts of the workers by Ray before it gives up; 0: none, -1: no limit. What no restart can fix (a wrong
    setting, damaged data, numbers that are not finite) ends the run at once and counts for none."""
    max_preemptions: int = -1
    """Restarts because a node was taken away with notice, counted apart from `max_failures`; -1: no limit."""
    wait_for_resources: bool = False
    """Under Ray: wait for nodes that the cluster does not have yet (one that grows on demand). False: refuse at once
    what no node of the cluster has room for, since Ray itself would wait for ever."""
    runs_folder: str = "runs"
    """Folder of the run folders; on a cluster on storage that all nodes share."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserInputError(f"workers: expected at least 1, found {self.workers}")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise UserInputError(f"min_workers: expected 1 to workers = {self.workers}, found {self.min_workers}")
        if self.elastic and self.placement.startswith("STRICT_"):
            raise UserInputError(
                f"placement: expected PACK or SPREAD where min_workers lets the number of workers change, found "
                f"{self.placement}; Ray counts room for workers without it"
            )
        for name in ("threads_per_worker", "cpus_per_worker"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserInputError(f"{name}: expected more than 0, or none, found {value}")
        if self.accelerator_type is not None and self.gpus_per_worker == 0:
            raise UserInputError(
                f"accelerator_type: expected gpus_per_worker = 1 beside {self.accelerator_type!r}, found 0; "
                "remove one of the two"
            )
        for name in ("max_failures", "max_preemptions"):
            if getattr(self, name) < -1:
                raise UserInputError(f"{name}: expected at least 0, or -1 for no limit, found {getattr(self, name)}")
        if not self.runs_folder:
            raise UserInputError("runs_folder: expected a folder, found an empty name")

    @property
    def elastic(self) -> bool:
        """Return whether the number of workers may change while the run lasts."""
        return self.min_workers is not None and self.min_workers < self.workers

    def torch_threads(self, num_cores: int) -> int:
        """Return the torch threads of a worker on a CPU of `num_cores`, whatever the number of workers is just now."""
        if self.threads_per_worker is not None:
            return self.threads_per_worker
        if self.cpus_per_worker is not None:
            return max(1, int(self.cpus_per_worker))
        return max(1, num_cores // self.workers)


_NOT_IN_MODEL_NAMES = "/:"
_OWN_TAGS = ("ca2st.", "mlflow.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where the run is followed in MLflow."""

    uri: str | None = None
    """MLflow tracking URI; None: the environment's MLFLOW_TRACKING_URI, else ``sqlite:///runs/mlflow.db``."""
    experiment: str = "ca2st"
    """MLflow experiment: runs in one experiment are compared."""
    enabled: bool = True
    """False: only the journal is written; ``ca2st track sync`` can send it later."""
    register_model: bool = True
    """Register the finished model: a few kB that name its checkpoint, whose bytes stay where they are."""
    upload_model: bool = False
    """Copy the weights of the registered checkpoints, frozen experts included, into MLflow, so that the models stand by
    themselves. False: they name the checkpoint in the run folder."""
    registered_model: str | None = None
    """Name under which it is registered; None: the recipe's name."""
    run_name: str | None = None
    """Name of the run in MLflow; None: the run folder's name."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tags of the run in MLflow beside those that ca2st sets itself."""
    note: str | None = None
    """What MLflow shows as the run's description; Markdown."""
    system_metrics_seconds: float = 10.0
    """Time between two measurements of each node's processors, memory, GPUs, disk and network; 0: none."""

    def __post_init__(self) -> None:
        if self.system_metrics_seconds < 0:
            raise UserInputError(
                f"system_metrics_seconds: expected 0 (off) or more, found {self.system_metrics_seconds}"
            )
        name = self.registered_model
        if name is not None and (not name.strip() or any(letter in name for letter in _NOT_IN_MODEL_NAMES)):
            raise UserInputError(
                f"registered_model: expected a name without / and : (MLflow refuses them), found {name!r}"
            )
        if self.run_name is not None and not self.run_name.strip():
            raise UserInputError("run_name: expected a name, found none; leave it out for the run folder's")
        if own := sorted(name for name in self.tags if not name.strip() or name.startswith(_OWN_TAGS)):
            raise UserInputError(
                f"tags: expected names that do not begin with {' or '.join(_OWN_TAGS)}, found {own[0]!r}; "
                "these are set by ca2st and MLflow (the description by tracking.note)"
            )


def model_name(recipe_name: str, registered_model: str | None) -> str:
    """Return the name a model is registered under: as set, or the recipe's name with what MLflow refuses replaced."""
    if registered_model is not None:
        return registered_model
    return re.sub(f"[{_NOT_IN_MODEL_NAMES}]", "-", recipe_name).strip() or "ca2st"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """Where the experts' weights come from, and how those that stay as they are are held."""

    spatial: str | None = None
    """Safetensors file of the spatial expert (from ``ca2st weights import`` or an earlier run), or a public name that
    is fetched and imported when a run starts: ``hf-hub:ORG/NAME[@REVISION]``, ``open_clip:MODEL/TAG``, ``timm:NAME``;
    None: random."""
    temporal: str | None = None
    """The same for the temporal expert."""
    audio: str | None = None
    """The same for the audio expert."""
    precision: ExpertPrecision = "auto"
    """Type in which frozen weights of the experts are held: ``fp32``; ``bf16``, half the memory and the same numbers
    under ``training.precision = "bf16"``, which it needs; ``auto``: bf16 on a GPU that trains in it, else fp32."""

    def sources(self) -> dict[ExpertName, str]:
        """Return what is named, by expert: files and public names as they are written."""
        named: dict[ExpertName, str | None] = {"spatial": self.spatial, "temporal": self.temporal, "audio": self.audio}
        return {expert: source for expert, source in named.items() if source is not None}

    def files(self) -> dict[ExpertName, Path]:
        """Return the named files by expert, once public names have become files."""
        return {expert: Path(source) for expert, source in self.sources().items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class StartConfig:
    """Fine-tuning: a new run, with its own folder and schedule, that begins with the weights of a trained model."""

    checkpoint: str
    """A checkpoint folder, a run folder (its newest checkpoint), or a model file of ``ca2st weights import`` or
    ``export``. Only read when the run begins: what stays frozen is kept in the new run's folder."""
    head: Literal["keep", "new"] = "keep"
    """``keep``: label spaces of the same name must have the same classes, and keep their classifiers; others get new
    ones. ``new``: the whole head, last adapters included, is drawn anew."""
    resize_positions: bool = False
    """True: position tables of another number of frames, crop or spectrogram length are interpolated, not refused."""

    def __post_init__(self) -> None:
        check_choice("head", self.head, ("keep", "new"))  # pydantic checks files only, not settings made in Python


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedConfig:
    """What the paper reports for this training: shown beside what was reached; it changes nothing."""

    dataset: str
    """Its dataset, by the name that ``ca2st shard build --dataset`` has for it."""
    top1: float | None = None
    """Top-1 in percent, of verb and noun both right; None: the paper has no such row."""
    views: str = "2x3"
    """Clips x crops per sample of its test."""

    def __post_init__(self) -> None:
        try:
            parse_views(self.views)
        except UserInputError as error:
            raise UserInputError(str(error).removeprefix("--")) from None
        if self.top1 is not None and not 0 <= self.top1 <= 100:
            raise UserInputError(f"top1: expected 0 to 100 percent, found {self.top1}")


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class Recipe:
    """Everything that decides a training run."""

    name: str
    """Name of the training: its folder under ``runs/``, and the name its models are registered under."""
    model: ModelConfig
    clip: ClipSpec
    data: DataConfig = field(default_factory=DataConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    start: StartConfig | None = None
    """Begin with the weights of a trained model; None: with the experts' files and a random rest."""
    trainable: str | tuple[str, ...] = "added"
    """What is trained: ``added`` (what the method adds to the frozen experts, as published), ``head``, ``adapters``
    (the layers' adapters and the head), ``all``, or patterns of parameter names, each of which must match."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: TrainingConfig
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    published: PublishedConfig | None = None
    """What this training aims at; None: nothing published."""

    @property
    def folder(self) -> Path:
        """Return the run's default folder."""
        split = self.data.split
        return Path(self.launch.runs_folder) / (self.name if split is None else f"{self.name}_split{split}")

    def __post_init__(self) -> None:
        """What sections ask of each other; every message begins with the key to change."""
        if problems := list(_conflicts(self)):
            raise ConflictsError(problems)


def _conflicts(recipe: Recipe) -> Iterator[str]:
    training, augment = recipe.training, recipe.data.augment
    checks: list[Callable[[], None]] = [
        lambda: refuse_credentials(asdict(recipe)),
        lambda: check_trainable(recipe.trainable),
        lambda: check_expert_precision(recipe.experts.precision, training=training.precision),
        lambda: augment.mixing.check_even("training.global_batch_size", training.global_batch_size),
        lambda: augment.mixing.check_even("training.per_device_batch_size", training.per_device_batch_size),
        lambda: augment.spectrogram.check_rows("data.augment.spectrogram.roll_rows", recipe.clip.mel_rows),
    ]
    for check in checks:
        try:
            check()
        except UserInputError as error:
            yield str(error)
    if recipe.start is not None and (sources := recipe.experts.sources()):
        yield (
            f"start.checkpoint: brings its own experts, found files for {', '.join(sources)} under [experts] too; "
            "remove one of the two"
        )
    if recipe.trainable == "head" and recipe.optim.layer_decay != 1:
        yield (
            f"optim.layer_decay: expected 1 where only the head is trained, found {recipe.optim.layer_decay}; "
            "no layer is there to be slowed down"
        )
    ends_early = [name for name in ("early_stopping", "stop_at") if getattr(training, name) is not None]
    if ends_early and not recipe.data.validates:
        yield (
            f"training.{ends_early[0]}: expected data.validation beside it, whose results it waits for, found none; "
            "name the shards of a validation split or remove it"
        )
    if training.sharded and training.compile:
        yield "training.sharded: expected training.compile = false beside it, found true; turn one of them off"
    if recipe.optim.warmup_epochs > training.epochs:
        yield (
            f"optim.warmup_epochs: expected at most training.epochs = {training.epochs}, found "
            f"{recipe.optim.warmup_epochs}; shorten the warm-up or train longer"
        )
    yield from beyond_limits(flatten(asdict(recipe)))


_ADAPTER = TypeAdapter(Recipe)


def with_places(recipe: Recipe, change: Callable[[str, str], str]) -> Recipe:
    """Return `recipe` with each path, URL and public name that it reads from replaced by ``change(key, place)``."""
    data, experts, start = recipe.data, recipe.experts, recipe.start

    def changed(key: str, place: str | None) -> str | None:
        return None if place is None else change(key, place)

    mixture = [
        replace(one, train=change(f"data.mixture[{index}].train", one.train)) for index, one in enumerate(data.mixture)
    ]
    return replace(
        recipe,
        data=replace(
            data,
            train=changed("data.train", data.train),
            mixture=tuple(mixture),
            validation=changed("data.validation", data.validation),
            loader=replace(data.loader, cache_dir=changed("data.loader.cache_dir", data.loader.cache_dir)),
        ),
        experts=replace(
            experts,
            spatial=changed("experts.spatial", experts.spatial),
            temporal=changed("experts.temporal", experts.temporal),
            audio=changed("experts.audio", experts.audio),
        ),
        start=None if start is None else replace(start, checkpoint=change("start.checkpoint", start.checkpoint)),
    )


def recipe_from_document(document: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a parsed TOML or JSON document; pydantic's ValidationError lists every mistake."""
    return _ADAPTER.validate_json(json.dumps(document))


def recipe_document(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain JSON values; `recipe_from_document` is its inverse."""
    document: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return document


_NOT_IDENTITY = (
    "name",
    "tracking.",
    "launch.",
    "published",
    "data.train",
    "data.mixture",
    "data.split",
    "data.validation",
    "data.synthetic",
    "data.loader.fetch_threads",
    "data.loader.decode_threads",
    "data.loader.prefetch_steps",
    "data.loader.stall_timeout_seconds",
    "data.loader.verify",
    "data.loader.cache_",
    "data.loader.retry",
    "data.loader.on_error",
    "data.loader.quarantine_",
    "experts.spatial",
    "experts.temporal",
    "experts.audio",
    "experts.precision",
    "start.checkpoint",
    "training.checkpoint_every_steps",
    "training.keep_checkpoints",
    "training.keep_best",
    "training.best_metric",
    "training.validate_every_steps",
    "training.early_stopping",
    "training.least_improvement",
    "training.stop_at",  # and stop_at_fit
    "training.max_hours",
    "training.max_skipped_steps",
    "training.profile_steps",
    "training.deterministic",
    "training.attention",
    "training.activation_checkpointing",
    "training.sharded",
    "training.compile",
    "training.collective_timeout_seconds",
)


_LATER: Mapping[str, Any] = {"training.ema_decay": None}
"""Settings that came after the first runs, and the value that does what was done before there were any. Where they have
it they are no part of the identity, so older runs can be resumed."""


def identity_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings a resumed run must share: those that change the numbers.

    Left out: paths (data, experts and the checkpoint to start from count by their hashes, a mixture's weights by the
    loader's record), tracking, how many processes train, threads, how often checkpoints are kept and validated, when a
    run ends early, and what saves memory or time at equal numbers up to rounding.
    """
    flat = flatten(recipe_document(recipe))
    return {
        name: value
        for name, value in flat.items()
        if not name.startswith(_NOT_IDENTITY) and not (name in _LATER and value == _LATER[name])
    }


_MOST_OF_ANY = 10**12
_UNBOUNDED = ("seed", "_seed", "_bytes")
"""Keys that end so may hold any number that their own section takes."""
MOST: Mapping[str, int] = {
    "clip.num_frames": 4_096,
    "clip.crop_size": 8_192,
    "clip.mel_rows": 1_000_000,
    "clip.num_mel_bins": 8_192,
    "data.augment.erasing.most_boxes": 100,
    "data.augment.spectrogram.frequency_masks": 100,
    "data.augment.spectrogram.time_masks": 100,
    "data.epoch_samples": 1_000_000_000,
    "data.loader.decode_threads": 4_096,
    "data.loader.fetch_threads": 4_096,
    "data.loader.prefetch_steps": 1_000,
    "data.loader.retry.attempts": 1_000,
    "data.repeats": 1_000,
    "data.sampling.frame_stride": 10_000,
    "data.views.clips": 1_000,
    "data.views.crops": 1_000,
    "launch.threads_per_worker": 4_096,
    "launch.workers": 100_000,
    "model.depth": 1_000,
    "model.dim": 65_536,
    "model.num_heads": 1_024,
    "training.epochs": 1_000_000,
    "training.global_batch_size": 10_000_000,
    "training.keep_checkpoints": 1_000_000,
    "training.per_device_batch_size": 1_000_000,
}
"""Most of each count, far above anything that has been trained."""


def beyond_limits(leaves: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with numbers among a recipe's settings by dotted path, one text per key."""
    for path, value in leaves.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or path.endswith(_UNBOUNDED):
            continue
        most = MOST.get(path, 10**9 if path.endswith("_seconds") else _MOST_OF_ANY)  # timers overflow beyond that
        if not abs(value) <= most:  # as nan is not
            yield f"{path}: expected at most {most:,}, found {value}; a number beyond that is a slip"
