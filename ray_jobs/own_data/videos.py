"""A folder of somebody's own videos: classes and splits, the shards made of them, and how a model does on them."""

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from ca2st.checked_json import sha256_of_json
from ca2st.errors import UserInputError
from ca2st.processes import num_cores
from ray_jobs.console import convert_shown
from ray_jobs.own_data.choices import Facts
from ray_jobs.runs.inference import load_trained, score
from ray_jobs.runs.worker import Outcome
from sharding.datasets.folder import ClassFolders, list_class_folders, visible_entries
from sharding.datasets.label_spaces import with_label_notes
from sharding.datasets.request import VIDEO_SUFFIXES
from sharding.errors import AnnotationError, RejectBudgetError
from sharding.folder import REJECTS_NAME
from sharding.format.index import decode_index, sample_key
from sharding.format.shard_set import LabelSpace, read_shard_set
from sharding.settings import ConversionConfig, RejectBudget, conversion_identity
from sharding.source import LEFT_ASIDE, SILENT_SOUND, SourceList, SourceSample

VALIDATION_SHARE = 5
"""One in so many videos of a class validates, and at least one where there are two."""
_SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
_FORM = "DIR/<class>/*.mp4, or DIR/train/<class>/*.mp4 with DIR/val/<class>/*.mp4 beside it"


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnVideos:
    """The videos of a folder, each in one split."""

    folder: Path
    """As it was given."""
    classes: tuple[str, ...]
    """Names of the class folders, sorted: the labels."""
    train: tuple[SourceSample, ...]
    """By class and then by name."""
    validation: tuple[SourceSample, ...]
    """The same; empty where no class has a second video."""
    only_trained: tuple[str, ...] = ()
    """Classes of which nothing validates: with a single video, or not in the folder's own validation split."""
    left_aside: tuple[str, ...] = ()
    """Files that are no videos, a test split, which a training must not see, and folders beside the splits; relative to
    the folder."""
    splits_given: bool = False
    """Whether the folder's own validation split is used."""
    follow_links: bool = False
    """Whether links were allowed to lead outside."""

    def source(self, split: str) -> SourceList:
        """Return the list of ``train`` or ``validation`` for the converter."""
        source = SourceList(
            dataset="folder",
            split=split,
            label_spaces=(LabelSpace(name="label", classes=self.classes),),
            targets=("label",),
            samples=self.train if split == "train" else self.validation,
            notes={LEFT_ASIDE: self.left_aside} if self.left_aside and split == "train" else {},
        )
        return with_label_notes(source)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have videos."""
        return ("train", "validation") if self.validation else ("train",)

    def count(self, split: str) -> dict[str, int]:
        """Return the number of videos of each class in a split."""
        labels = [sample.labels[0] for sample in (self.train if split == "train" else self.validation)]
        return {name: labels.count(label) for label, name in enumerate(self.classes)}


def list_videos(folder: Path, *, follow_links: bool = False) -> OwnVideos:
    """List a folder of class folders, or of splits of class folders.

    Without a validation split of its own, `validation_names` of each class validate. A split of its own may lack
    classes, which are then only trained on. `follow_links`: links may lead outside.

    Raises:
        UserInputError: no such folder.
        AnnotationError: fewer than two classes, a class without a training video, a class that only validates, a
            folder inside a class, or a file that leads outside.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise UserInputError(f"--data-folder {folder}: expected a folder, found {found}; its form is {_FORM}")
    splits = _split_folders(folder)
    train = _listed(splits["train"], None, follow_links=follow_links)
    if train.empty:
        raise AnnotationError(
            f"{folder}: expected videos ({' '.join(sorted(VIDEO_SUFFIXES))}) of every class to train on, found none of "
            f"the class {', '.join(map(repr, train.empty))}; add some, or remove the folder"
        )
    beside = () if splits["train"] == folder else visible_entries(folder)
    read = (splits["train"], splits.get("validation"))
    aside = [f"{entry.name}{'/' * entry.is_dir()}" for entry in beside if entry not in read]
    aside += train.left_aside
    if "validation" in splits:
        given_names = {entry.name for entry in visible_entries(splits["validation"]) if entry.is_dir()}
        if extra := sorted(given_names - set(train.classes)):
            raise AnnotationError(
                f"{folder}: expected no class in {splits['validation'].name} that is not in {splits['train'].name}, "
                f"found {', '.join(map(repr, extra))}; nothing would be trained to name them: complete or move them"
            )
        given = _listed(splits["validation"], train.classes, follow_links=follow_links)
        trained_on, validation, only_trained = train.samples, given.samples, given.empty
        aside += given.left_aside
    else:
        names = [[sample.sample_id for sample in of_class] for of_class in train.videos.values()]
        validates = frozenset[str]().union(*map(validation_names, names))
        trained_on = tuple(sample for sample in train.samples if sample.sample_id not in validates)
        validation = tuple(sample for sample in train.samples if sample.sample_id in validates)
        only_trained = tuple(name for name, of_class in train.videos.items() if len(of_class) == 1)
    return OwnVideos(
        folder=folder,
        classes=train.classes,
        train=trained_on,
        validation=validation,
        only_trained=only_trained,
        left_aside=tuple(aside),
        splits_given="validation" in splits,
        follow_links=follow_links,
    )


def validation_names(names: Sequence[str]) -> frozenset[str]:
    """Return which videos of one class validate: the fifth whose names have the smallest hashes, none of a single one.

    Other classes have no influence, and another video in this class changes at most who is last among them.
    """
    if len(names) < 2:
        return frozenset()
    ranked = sorted(names, key=lambda name: (xxhash.xxh3_64_intdigest(name.encode()), name))
    return frozenset(ranked[: max(1, len(names) // VALIDATION_SHARE)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """A validation video (its file) of the class `label` that was taken for `said`, and how probable that was said."""

    video: str
    label: str
    said: str
    probability: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """The validation videos under one view each."""

    num_videos: int
    num_right: int
    commonest: str
    """The class of most of the validation videos."""
    chance: float
    """Share that always saying `commonest` would get right: what a model has to beat."""
    mistakes: tuple[Mistake, ...]
    """The surest first."""

    @property
    def top1(self) -> float:
        """Share of videos whose class was the likeliest."""
        return self.num_right / self.num_videos


def judge(outcome: Outcome, videos: OwnVideos, validation: Path) -> Judgement:
    """Score every validation video with the trained model, in the view that validation while training takes.

    Raises:
        DataDamageError: checkpoint or shards are damaged.
    """
    trained = load_trained(Path(outcome.checkpoint))
    scored = score(trained, read_shard_set(validation), trained.recipe.data.views)
    files = {sample_key(sample.sample_id): sample.path for sample in videos.validation}
    (probabilities,), labels = scored.probabilities.values(), scored.labels[:, 0].tolist()
    answers, surest = probabilities.argmax(axis=1).tolist(), probabilities.max(axis=1).tolist()
    rows = zip(scored.sample_ids, labels, answers, surest, strict=True)
    mistakes = [
        Mistake(video=str(files[key]), label=videos.classes[label], said=videos.classes[said], probability=probability)
        for key, label, said, probability in rows
        if said != label
    ]
    commonest, count = Counter(labels).most_common(1)[0]
    return Judgement(
        num_videos=len(labels),
        num_right=len(labels) - len(mistakes),
        commonest=videos.classes[commonest],
        chance=count / len(labels),
        mistakes=tuple(sorted(mistakes, key=lambda mistake: -mistake.probability)),
    )


DATA_FOLDER = "data"
"""Beside the runs: shards that were made for them."""
REJECTS_SHARE = 10
"""One unreadable video in so many is left out and named, and one in any case; more stop the training."""


def shards_folder(videos: OwnVideos, config: ConversionConfig, runs_root: Path) -> Path:
    """Return where the shards lie: by the folder's name and a hash of its files' names, sizes, times and the settings.

    So the same command finds them again, and a changed folder gets new ones.
    """
    files = [sample.path.stat() for sample in (*videos.train, *videos.validation)]
    states = [(file.st_size, file.st_mtime_ns) for file in files]
    identities = [conversion_identity(videos.source(split), config) for split in videos.splits]
    return runs_root / DATA_FOLDER / f"{run_name(videos.folder)}-{sha256_of_json([identities, states])[:12]}"


def run_name(folder: Path) -> str:
    """Return a plain name for a run on `folder`."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", folder.resolve().name).strip("-")[:40] or "videos"


def make_shards(videos: OwnVideos, config: ConversionConfig, folder: Path) -> dict[str, Path]:
    """Convert both splits under `folder`, or finish what was begun there; returns the sets by split.

    Raises:
        RejectBudgetError: too many videos cannot be read; the message lists the first.
    """
    sets = {}
    for split in videos.splits:
        source = videos.source(split)
        num_videos = len(source.samples)
        budget = RejectBudget(count=max(1, num_videos // REJECTS_SHARE))
        fitting = replace(config, max_rejects=budget, workers=min(num_cores(), num_videos))
        try:
            convert_shown(source, folder / split, fitting)
        except RejectBudgetError as error:
            error.add_note(
                f"--data-folder leaves out one unreadable video in {REJECTS_SHARE}; move or repair the others, or make "
                "shards with `ca2st shard build` and train by a recipe"
            )
            raise
        sets[split] = folder / split
    return sets


def with_stored(facts: Facts, folder: Path, train: Path) -> Facts:
    """Return the facts with what the training shards of the videos in `folder` show.

    Raises:
        UserInputError: a class is left without a training video.
    """
    sounds, durations, labels = [], [], set()
    shard_set = read_shard_set(train)
    for shard in shard_set.shards:
        rows = decode_index((shard_set.root / shard.index_name).read_bytes()).to_pydict()
        sounds += rows["has_audio"]
        durations += rows["duration_seconds"]
        labels |= {label for (label,) in rows["labels"]}
    if missing := [name for label, name in enumerate(facts.classes) if label not in labels]:
        raise UserInputError(
            f"{folder}: expected a readable training video in every class, found none in {', '.join(missing)}; "
            f"see {train / REJECTS_NAME}, repair or replace them and run again"
        )
    return replace(
        facts,
        num_clips=len(sounds),
        num_with_sound=sum(sounds),
        num_silent=shard_set.manifest.notes.get(SILENT_SOUND, 0),
        median_seconds=statistics.median(durations),
    )


def _listed(folder: Path, classes: Sequence[str] | None, *, follow_links: bool) -> ClassFolders:
    return list_class_folders(
        folder,
        classes=classes,
        follow_links=follow_links,
        option="--data-folder",
        form=f"a folder per class, in the form {_FORM}",
    )


def _split_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of splits by split; where the folders are classes, `folder` itself is ``train``."""
    found = [entry for entry in visible_entries(folder) if entry.name.lower() in _SPLITS and entry.is_dir()]
    found = [entry for entry in found if any(inner.is_dir() for inner in visible_entries(entry))]
    if not found:
        return {"train": folder}
    splits: dict[str, Path] = {}
    for entry in found:
        split = _SPLITS[entry.name.lower()]
        if split in splits:
            raise AnnotationError(
                f"{folder}: expected one folder for {split}, found {splits[split].name} and {entry.name}; join them"
            )
        splits[split] = entry
    if "train" not in splits:
        names = ", ".join(path.name for path in splits.values())
        raise AnnotationError(f"{folder}: expected a folder train beside {names}, found none; the form is {_FORM}")
    return splits
