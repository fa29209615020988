"""Shards of a folder of videos.

How good a model is on the validation videos: against guessing, and which files it got wrong.

Shards of somebody's own videos: made once beside the runs, kept by what the folder holds, and read for facts.
"""

import re
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ca2st.checked_json import sha256_of_json
from ca2st.errors import UserInputError
from ca2st.processes import num_cores
from ray_jobs.conversion import convert_shown
from ray_jobs.own_data.listing import OwnVideos
from ray_jobs.runs.inference import load_trained, score
from ray_jobs.runs.worker import Outcome
from sharding.errors import RejectBudgetError
from sharding.folder import REJECTS_NAME, read_rejects
from sharding.format.index import decode_index, sample_key
from sharding.format.shard_set import AudioParameters, read_shard_set
from sharding.settings import ConversionConfig, RejectBudget, conversion_identity
from sharding.source import SILENT_SOUND, SourceList, SourceSample


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """A validation video that was taken for another class."""

    video: str
    """Its file."""
    label: str
    """Its class."""
    said: str
    """The class it was taken for."""
    probability: float
    """Of the class that was said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """The validation videos under one view each."""

    num_videos: int
    """Videos that were judged."""
    num_right: int
    """Videos whose class was the likeliest."""
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
    likeliest = probabilities.max(dim=1)
    rows = zip(scored.sample_ids, labels, likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
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
"""One unreadable video in so many is left out and told, and one in any case; more stop the training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """A video that cannot be read."""

    video: str
    """``class/name``."""
    reason: str
    """A key of `sharding.media.probe.REASONS`."""
    what: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnShards:
    """The shard sets of a folder and what they hold."""

    sets: Mapping[str, Path]
    """By split; without ``validation`` where nothing validates."""
    num_clips: int
    """Training clips."""
    num_with_sound: int
    """How many of them have sound that is not silent."""
    num_silent: int
    """How many have digital silence for sound."""
    median_seconds: float
    """Median duration of the training clips."""
    left_out: tuple[LeftOut, ...]
    """Of both splits."""


def conversion_config(*, short_side: int, num_mel_bins: int, heard: AudioParameters | None = None) -> ConversionConfig:
    """How the videos are stored; sound is kept wherever there is some, so that every kind of model can read them.

    `heard`: what the model to start from was trained on, which decides the sample rate; None: the usual one.
    """
    config = ConversionConfig(short_side=short_side, num_mel_bins=num_mel_bins, audio_policy="optional")
    return config if heard is None else replace(config, sample_rate_hz=heard.sample_rate_hz)


def shards_folder(videos: OwnVideos, config: ConversionConfig, runs_root: Path) -> Path:
    """Where the shards lie: by the folder's name, and the hash of its files' names, sizes and times and the settings.

    So the same command finds them again, and a changed folder gets new ones.
    """
    states = [(sample.path.stat().st_size, sample.path.stat().st_mtime_ns) for sample in _samples(videos)]
    identities = [conversion_identity(videos.source(split), config) for split in _splits(videos)]
    return runs_root / DATA_FOLDER / f"{run_name(videos.folder)}-{sha256_of_json([identities, states])[:12]}"


def run_name(folder: Path) -> str:
    """A plain name for a run on `folder`."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", folder.resolve().name).strip("-")[:40] or "videos"


def make_shards(videos: OwnVideos, config: ConversionConfig, folder: Path) -> OwnShards:
    """Convert both splits under `folder`, or finish what was begun there.

    Raises:
        RejectBudgetError: too many videos cannot be read; the message lists the first.
        UserInputError: a class is left without a training video.
    """
    sets = {}
    for split in _splits(videos):
        source = videos.source(split)
        try:
            convert_shown(source, folder / split, _for(config, source))
        except RejectBudgetError as error:
            error.add_note(
                f"--data-folder leaves out one unreadable video in {REJECTS_SHARE}; move or repair the others, or make "
                "shards with `ca2st shard build` and train by a recipe"
            )
            raise
        sets[split] = folder / split
    return _facts(videos, sets)


def _for(config: ConversionConfig, source: SourceList) -> ConversionConfig:
    """With what follows from the number of videos and is no part of the shards."""
    num_videos = len(source.samples)
    budget = RejectBudget(count=max(1, num_videos // REJECTS_SHARE))
    return replace(config, max_rejects=budget, workers=min(num_cores(), num_videos))


def _facts(videos: OwnVideos, sets: Mapping[str, Path]) -> OwnShards:
    sounds, durations, labels = [], [], set()
    shard_set = read_shard_set(sets["train"])
    for shard in shard_set.shards:
        rows = decode_index((shard_set.root / shard.index_name).read_bytes()).to_pydict()
        sounds += rows["has_audio"]
        durations += rows["duration_seconds"]
        labels |= {label for (label,) in rows["labels"]}
    if missing := [name for label, name in enumerate(videos.classes) if label not in labels]:
        raise UserInputError(
            f"{videos.folder}: expected a readable training video in every class, found none in {', '.join(missing)}; "
            f"see {sets['train'] / REJECTS_NAME}, repair or replace them and run again"
        )
    return OwnShards(
        sets=sets,
        num_clips=len(sounds),
        num_with_sound=sum(sounds),
        num_silent=shard_set.manifest.notes.get(SILENT_SOUND, 0),
        median_seconds=statistics.median(durations),
        left_out=tuple(reject for root in sets.values() for reject in _left_out(root)),
    )


def _left_out(root: Path) -> list[LeftOut]:
    return [LeftOut(video=one.sample_id, reason=one.reason, what=one.what) for one in read_rejects(root)]


def _splits(videos: OwnVideos) -> tuple[str, ...]:
    return ("train", "validation") if videos.validation else ("train",)


def _samples(videos: OwnVideos) -> list[SourceSample]:
    return [sample for split in _splits(videos) for sample in videos.source(split).samples]
