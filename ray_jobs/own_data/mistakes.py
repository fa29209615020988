"""How good a model is on the validation videos: against guessing, and which files it got wrong."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ray_jobs.inference.evaluation import score
from ray_jobs.inference.trained import load_trained
from ray_jobs.own_data.listing import OwnVideos
from ray_jobs.running.worker import Outcome
from sharding.keys import sample_key
from sharding.shard_set import read_shard_set


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
