"""The page of the demo: one HTML file with results, factors, losses, confusions and clips of the test."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from ca2st import __version__
from ca2st.durable import write_bytes
from ca2st.model.config import EXPERTS
from ca2st.training.journal import JOURNAL_NAME, run_sequence
from ca2st.training.resume import RECIPE_FILE
from ray_jobs.config.recipe import Recipe
from ray_jobs.config.recipe_file import stored_recipe
from ray_jobs.demo.answers import (
    FACTORS,
    Answers,
    DemoReport,
    Factors,
    factors_of_set,
    next_steps,
    read_all_answers,
    shown,
)
from ray_jobs.demo.comparison import COMPARED, ComparisonRow
from ray_jobs.pages import charts
from sharding.format.index import sample_key
from sharding.format.shard_set import read_manifest, read_shard_set
from sharding.synthetic.factors import ceilings

MODEL_NAMES = {
    "spatial": "Spatial expert",
    "temporal": "Temporal expert",
    "audio": "Audio expert",
    "cast": "CAST",
    "cava": "CAVA",
    "late_add": "Late sum",
    "late_concat": "Late concatenation",
    "ca2st": "CA\N{SUPERSCRIPT TWO}ST",
}
_OUT_OF_REACH = {
    ("space", False): "the shape, as it sees nothing",
    ("time", False): "the motion, as it sees nothing",
    ("time", True): "which way along its line the shape moves, as frames without their order look alike both ways",
    ("audio", False): "the tone, as it hears nothing",
}
"""By factor, and whether a part of it can be known."""
GIVEN = {"spatial": "frames", "temporal": "motion", "audio": "sound"}
"""What an expert reads, in a word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FactorScore:
    """How often one factor of the answer was right."""

    factor: str
    top1: float
    ceiling: float
    """The best that anybody could reach with what the model is given."""
    classes: list[str]
    shares: list[list[float]]
    """[true, answered]: of the clips of a true class, the part that was answered so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelResult:
    """One model as the page shows it."""

    name: str
    row: ComparisonRow
    given: str
    """``frames + sound``."""
    orders_frames: bool
    """Whether it has no expert for motion, and yet can know the order of frames."""
    factors: list[FactorScore]

    @property
    def out_of_reach(self) -> list[str]:
        """What it is not given, in words."""
        return [
            _OUT_OF_REACH[score.factor, score.ceiling > 1 / len(score.classes)]
            for score in self.factors
            if score.ceiling < 1
        ]


def model_results(rows: Sequence[ComparisonRow], answers: Sequence[Answers]) -> list[ModelResult]:
    """Return one entry per run, in order."""
    found = []
    for row, own in zip(rows, answers, strict=True):
        recipe, senses = recipe_of_run(row), COMPARED[row.model].senses
        experts, world = EXPERTS[recipe.model.kind], recipe.data.synthetic
        assert world is not None  # the contest has a world
        scores = []
        for number, (factor, classes) in enumerate(zip(FACTORS, own.factors.classes, strict=True)):
            counts = own.confusion(number)
            scores.append(
                FactorScore(
                    factor=factor,
                    top1=float(own.right_parts[:, number].mean()),
                    ceiling=ceilings(factor, world.world("train"))[senses],
                    classes=[shown(name) for name in classes],
                    shares=(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).tolist(),
                )
            )
        found.append(
            ModelResult(
                name=MODEL_NAMES[row.model],
                row=row,
                given=" + ".join(GIVEN[expert] for expert in experts),
                orders_frames="temporal" in senses and "temporal" not in experts,
                factors=scores,
            )
        )
    return found


def recipe_of_run(row: ComparisonRow) -> Recipe:
    """Return the recipe by which a run was trained."""
    path = Path(row.run_dir) / RECIPE_FILE
    return stored_recipe(json.loads(path.read_text()), where=str(path))


SIDE, MARGIN = 640.0, 64.0
KINDS = {
    "right": "all right",
    "space": "shape wrong",
    "time": "motion wrong",
    "audio": "tone wrong",
    "several": "more than one wrong",
}
_ARROWS = {
    "up": "↑",
    "down": "↓",
    "left": "←",
    "right": "→",
    "up_left": "↖",
    "up_right": "↗",
    "down_left": "↙",
    "down_right": "↘",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A pair of true and answered class that occurred."""

    x: float
    """Centre; answers to the right."""
    y: float
    """Centre; true classes downwards."""
    kind: str
    """What went wrong, a key of `KINDS`."""
    count: int
    label: str
    """The pair in words."""

    @property
    def opacity(self) -> float:
        """Fuller for what happened more often."""
        return min(1.0, 0.55 + 0.15 * self.count)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfusionChart:
    """All answers of one model, classes sorted by factor."""

    cells: list[Cell]
    kinds: Mapping[str, int]
    """Clips that were answered in each way, by its key."""
    blocks: list[charts.Mark]
    """Classes of the first factor."""
    inner: list[charts.Mark]
    """Classes of the second within each."""
    step: float
    """Side of a cell."""
    block_lines: list[float]
    inner_lines: list[float]
    side: float = SIDE
    margin: float = MARGIN


def confusion_chart(answers: Answers) -> ConfusionChart:
    """Return where `answers` lie in the table of true by answered class."""
    factors = answers.factors
    step = SIDE / math.prod(factors.sizes)
    kinds = [_kind(row) for row in answers.right_parts.tolist()]
    counts = Counter(zip(answers.labels.tolist(), answers.chosen.tolist(), kinds, strict=True))
    first, second = factors.sizes[:2]
    return ConfusionChart(
        cells=[
            Cell(
                x=step * (chosen + 0.5),
                y=step * (label + 0.5),
                kind=kind,
                count=count,
                label=_pair(factors, label, chosen, count=count),
            )
            for (label, chosen, kind), count in sorted(counts.items())
        ],
        kinds=Counter(kinds),
        blocks=[
            charts.Mark(at=SIDE * (index + 0.5) / first, label=shown(name))
            for index, name in enumerate(factors.classes[0])
        ],
        inner=[
            charts.Mark(
                at=SIDE * (block * second + index + 0.5) / (first * second), label=_ARROWS.get(name, shown(name))
            )
            for block in range(first)
            for index, name in enumerate(factors.classes[1])
        ],
        step=step,
        block_lines=[SIDE * index / first for index in range(first + 1)],
        inner_lines=[SIDE * index / (first * second) for index in range(first * second) if index % second],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One model's answer about one clip."""

    model: str
    parts: list[tuple[str, bool]]
    """The answered class of each factor, and whether it is right."""
    confidence: float
    is_right: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleClip:
    """One clip of the page."""

    key: str
    truth: tuple[str, ...]
    """The true class of each factor."""
    answers: list[Answer]
    alike: int
    """Clips of the test set, this one included, on which the same models were right."""
    pictures: charts.Pictures


def choose_clips(answers: Sequence[Answers], *, most: int = 6) -> list[tuple[int, int]]:
    """Return (sample, how many are alike) of up to `most` clips.

    One of every pattern of right and wrong models, the commonest first; then a second of each, and so on.
    """
    patterns = [tuple(column) for column in np.stack([one.is_right for one in answers], axis=1).tolist()]
    counts = Counter(patterns)
    samples = {
        pattern: [i for i, found in enumerate(patterns) if found == pattern] for pattern, _ in counts.most_common()
    }
    turns = max(counts.values())
    ordered = [(group[turn], len(group)) for turn in range(turns) for group in samples.values() if turn < len(group)]
    return ordered[:most]


def sample_clips(answers: Sequence[Answers], shards: Path) -> list[SampleClip]:
    """Return some clips of the test set in `shards` with every model's answer.

    Raises:
        DataDamageError: the shards are not what was written.
    """
    chosen, keys, factors = choose_clips(answers), answers[0].keys, answers[0].factors
    pictures = charts.read_pictures(read_shard_set(shards), [keys[sample] for sample, _ in chosen])
    right_parts = [one.right_parts for one in answers]
    return [
        SampleClip(
            key=keys[sample],
            truth=factors.labels(int(answers[0].labels[sample])),
            answers=[
                Answer(
                    model=one.model,
                    parts=list(zip(factors.labels(int(one.chosen[sample])), right[sample].tolist(), strict=True)),
                    confidence=float(one.confidence[sample]),
                    is_right=bool(one.is_right[sample]),
                )
                for one, right in zip(answers, right_parts, strict=True)
            ],
            alike=alike,
            pictures=own,
        )
        for (sample, alike), own in zip(chosen, pictures, strict=True)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossChart:
    """The losses of all runs, with their figures."""

    chart: charts.Chart
    guess: float
    """The loss of a model that knows nothing."""
    least: Mapping[str, float]
    """The least possible loss by model."""
    final: dict[str, float]
    """The smoothed loss of the last step by model."""


def least_loss(ceiling: float, *, num_classes: int, smoothing: float) -> float:
    """Return the lowest cross-entropy in nats that can be expected on clips never seen, by what a model is given.

    A model whose best accuracy is `ceiling` cannot tell 1 / `ceiling` equally likely classes apart. The best it can do
    is to answer the mean of their targets, smoothed labels; what is left is the entropy of that mean.
    """
    group = 1 / ceiling
    off = smoothing / num_classes
    on = (1 - smoothing) / group + off
    return -group * on * math.log(on) - (num_classes - group) * (off * math.log(off) if off else 0.0)


def smoothed(values: Sequence[float], *, reach: int) -> list[float]:
    """Return the mean of each value and up to `reach` on both sides, as many on the one as on the other."""
    found = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        window = values[index - near : index + near + 1]
        found.append(sum(window) / len(window))
    return found


def loss_chart(
    losses: Mapping[str, Sequence[tuple[int, float]]], floors: Mapping[str, float], *, num_classes: int
) -> LossChart:
    """Return the curves of (step, loss) by model; `floors` are their least losses."""
    guess = math.log(num_classes)
    last = max((step for steps in losses.values() for step, _ in steps), default=1)
    highest = max([guess, *(loss for steps in losses.values() for _, loss in steps)])
    top = 0.5 * math.ceil(highest / 0.5 + 1e-9)
    frame = charts.Frame(x_range=(0, last), y_range=(0, top), height=360)
    faint, strong, final = list[charts.Line](), list[charts.Line](), dict[str, float]()
    for model, steps in losses.items():
        mean = smoothed([loss for _, loss in steps], reach=max(1, len(steps) // 20))
        of_steps = tuple((step, loss) for (step, _), loss in zip(steps, mean, strict=True))
        faint.append(_line(frame, model, tuple(steps), is_faint=True))
        strong.append(_line(frame, model, of_steps))
        final[model] = mean[-1]
    levels = [charts.Level(css="guess", y=frame.y(guess), left=frame.left, right=frame.right, text="knows nothing")]
    for place, model in enumerate(reversed([*losses]), start=1):  # short marks at the right end, side by side
        left, title = frame.right - 20 * place, f"{MODEL_NAMES[model]}: least loss {floors[model]:.2f}"
        levels.append(charts.Level(css=f"m-{model}", y=frame.y(floors[model]), left=left, right=left + 17, title=title))
    chart = charts.Chart(
        title="Loss",
        says="Training loss by step, a line per model",
        x_label="training step",
        y_label="loss (nats)",
        frame=frame,
        lines=[*faint, *strong],
        x_marks=[charts.Mark(at=frame.x(step), label=f"{step:g}") for step in charts.places(0, last, whole=True)],
        y_marks=[charts.Mark(at=frame.y(loss), label=str(loss)) for loss in range(math.floor(top) + 1)],
        levels=levels,
    )
    return LossChart(chart=chart, guess=guess, least=floors, final=final)


PAGE_NAME = "index.html"
_FACTOR_NAMES = {"space": "Shape", "time": "Motion", "audio": "Tone"}
_EXPERT_FACTORS = {"space": "shapes", "time": "motions", "audio": "tones"}


def write_demo_page(report: DemoReport, out: Path) -> Path:
    """Write `index.html` into the folder `out` and return its path.

    Raises:
        DataDamageError: shards or predictions are not what was written.
    """
    page = out / PAGE_NAME
    write_bytes(page, render_demo_page(report).encode())
    return page


def render_demo_page(report: DemoReport) -> str:
    """Return the whole page; it asks nothing of any network."""
    manifest = read_manifest(Path(report.test_shards))
    factors = factors_of_set(manifest)
    answers = read_all_answers(report.runs, factors)
    recipe = recipe_of_run(report.runs[-1])
    assert recipe.data.train is not None  # the contest names its shards
    num_classes, smoothing = math.prod(factors.sizes), recipe.optim.label_smoothing
    journals = {row.model: run_sequence(Path(row.run_dir) / JOURNAL_NAME) for row in report.runs}
    losses = loss_chart(
        {model: [(step["step"], step["loss"]) for step in steps] for model, steps in journals.items()},
        {row.model: least_loss(row.ceiling, num_classes=num_classes, smoothing=smoothing) for row in report.runs},
        num_classes=num_classes,
    )
    environment = charts.page_environment()
    environment.filters["shown"] = shown
    return environment.get_template("demo.html").render(
        version=__version__,
        report=report,
        num_train=read_manifest(Path(recipe.data.train)).num_samples,
        num_test=manifest.num_samples,
        epochs=recipe.training.epochs,
        video_name=PurePath(report.prediction.video).name,
        video_truth=_truth(answers[-1], report.prediction.video),
        results=model_results(report.runs, answers),
        losses=losses,
        confusion=confusion_chart(answers[-1]),
        clips=sample_clips(answers, Path(report.test_shards)),
        steps=next_steps(report),
        kind_names=KINDS,
        model_names=MODEL_NAMES,
        factor_names=_FACTOR_NAMES,
        expert_factors=_EXPERT_FACTORS,
    )


def _kind(right_parts: list[bool]) -> str:
    """Return the key in `KINDS` of an answer whose parts are right or wrong."""
    wrong = [factor for factor, is_right in zip(FACTORS, right_parts, strict=True) if not is_right]
    if not wrong:
        return "right"
    return wrong[0] if len(wrong) == 1 else "several"


def _pair(factors: Factors, label: int, chosen: int, *, count: int) -> str:
    true, said = ", ".join(factors.labels(label)), ", ".join(factors.labels(chosen))
    clips = "1 clip" if count == 1 else f"{count} clips"
    return f"{clips} of {true}: right" if label == chosen else f"{clips} of {true}: answered {said}"


def _line(frame: charts.Frame, model: str, values: charts.Curve, *, is_faint: bool = False) -> charts.Line:
    points = frame.points(charts.thinned(values), lambda step, loss: f"step {step:g}: {loss:.2f}")
    return charts.Line(css=f"m-{model}", name=MODEL_NAMES[model], points=points, is_faint=is_faint)


def _truth(answers: Answers, video: str) -> str | None:
    """Return the true class of a video of the test set, in words; None where it is another."""
    split, _, number = PurePath(video).stem.partition("-")
    key = sample_key(f"{split}/{number}")  # as the synthetic world names its samples and their files
    if key not in answers.keys:
        return None
    return " · ".join(answers.factors.labels(int(answers.labels[answers.keys.index(key)])))
