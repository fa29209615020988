"""What every model of the demo answered, taken apart into the factors of the synthetic world, and its report."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ca2st.errors import DataDamageError
from ray_jobs.demo.comparison import ComparisonRow, PretrainedExpert
from ray_jobs.runs.prediction import VideoPrediction
from sharding.format.index import read_parquet
from sharding.format.shard_set import Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoReport:
    """What the demo made."""

    shards: list[str]
    """Folders of shard sets, verified."""
    test_shards: str
    """The one of them on which all models were tested."""
    experts: list[PretrainedExpert]
    runs: list[ComparisonRow]
    """The comparison, read back from MLflow; the fullest model last."""
    prediction: VideoPrediction
    """What the fullest model says about one clip."""
    tracking_uri: str
    page: str
    """All of it to look at, one HTML file."""
    seconds: float


def next_steps(report: DemoReport) -> dict[str, str]:
    """Return commands to try, as a shell takes them, and what each does: from the runs side by side to own videos.

    Capitals stand for what the person has.
    """
    compare = shlex.join(["mlflow", "ui", "--backend-store-uri", report.tracking_uri])
    explain = shlex.join(["ca2st", "explain", report.runs[-1].checkpoint, report.prediction.video])
    train = "ca2st train --data-folder YOUR_VIDEOS"
    return {
        compare: "Compare the runs in a browser: every setting, every curve.",
        explain: "See what each expert listened to in this clip, or in a video of your own, layer by layer.",
        train: "Train on videos of your own, a folder per class: no recipe needed, and rerunning goes on.",
    }


FACTORS = ("space", "time", "audio")
"""Label spaces whose combination is ``holistic``, in the order of its class names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """The parts of a combined label space."""

    classes: tuple[tuple[str, ...], ...]
    """Class names of each part, in the order of `FACTORS`."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of classes of each part."""
        return tuple(map(len, self.classes))

    def parts(self, combined: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return [samples, factors] of [samples] combined classes: the last factor counts fastest."""
        return np.stack(np.unravel_index(combined, self.sizes), axis=-1).astype(np.int64)

    def labels(self, combined: int) -> tuple[str, ...]:
        """Return the class of every part, in words."""
        parts = self.parts(np.array([combined]))[0]
        return tuple(shown(classes[part]) for classes, part in zip(self.classes, parts, strict=True))


def shown(name: str) -> str:
    """Return a class name as a person writes it: ``440 Hz``, ``up left``."""
    return name.replace("_hz", " Hz").replace("_", " ")


def factors_of_set(manifest: Manifest) -> Factors:
    """Return the factors of a synthetic set; raises UserInputError where it has no such label spaces."""
    return Factors(classes=tuple(manifest.label_space(name).classes for name in FACTORS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """One model's answers on the test set."""

    model: str
    factors: Factors
    keys: tuple[str, ...]
    """Samples, in the order of all that follows."""
    labels: NDArray[np.int64]
    """[samples] true combined class."""
    chosen: NDArray[np.int64]
    """[samples] the likeliest combined class; the lower one where two are equal."""
    confidence: NDArray[np.float64]
    """[samples] its probability."""

    @property
    def is_right(self) -> NDArray[np.bool_]:
        """[samples] whether the whole answer is right."""
        return np.equal(self.labels, self.chosen)

    @property
    def right_parts(self) -> NDArray[np.bool_]:
        """[samples, factors] whether each factor is right."""
        return np.equal(self.factors.parts(self.labels), self.factors.parts(self.chosen))

    def confusion(self, number: int) -> NDArray[np.int64]:
        """Return [true, answered] counts of one factor's classes."""
        true, answered = (self.factors.parts(combined)[:, number] for combined in (self.labels, self.chosen))
        size = self.factors.sizes[number]
        return np.bincount(true * size + answered, minlength=size**2).reshape(size, size)


def read_all_answers(rows: Sequence[ComparisonRow], factors: Factors) -> list[Answers]:
    """Return the predictions that each run's test wrote, in the order of their keys.

    Raises:
        DataDamageError: the runs were not tested on the same samples.
    """
    found: list[Answers] = []
    for row in rows:
        table = read_parquet(Path(row.predictions))
        # Not by Table.sort_by, which starts threads.
        table = table.take(np.argsort(table["key"].to_numpy(zero_copy_only=False), kind="stable"))
        values = np.array(table[f"{row.target}_probabilities"].to_pylist(), dtype=np.float64)
        found.append(
            Answers(
                model=row.model,
                factors=factors,
                keys=tuple(table["key"].to_pylist()),
                labels=table[f"{row.target}_label"].to_numpy().astype(np.int64),
                chosen=values.argmax(axis=1),
                confidence=values.max(axis=1),
            )
        )
        if found[-1].keys != found[0].keys:
            raise DataDamageError(
                f"{Path(row.predictions)}: its samples are not those of {rows[0].predictions}; remove both and rerun"
            )
    return found
