"""The result of every model, and what of it each factor explains."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ca2st.model.structure import EXPERTS
from ray_jobs.config.recipe import Recipe, stored_recipe
from ray_jobs.running.launch import RECIPE_NAME
from ray_jobs.synthetic.comparison import COMPARED, ComparisonRow
from ray_jobs.synthetic.demo_page.answers import Answers, Factors, shown
from sharding.synthetic.ceilings import ceilings

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
    says: str
    """What it is."""
    given: str
    """``frames + sound``."""
    orders_frames: bool
    """Whether it has no expert for motion, and yet can tell the order of frames."""
    factors: list[FactorScore]

    @property
    def out_of_reach(self) -> list[str]:
        """What it is not given, in words."""
        return [
            _OUT_OF_REACH[score.factor, score.ceiling > 1 / len(score.classes)]
            for score in self.factors
            if score.ceiling < 1
        ]


def model_results(rows: Sequence[ComparisonRow], answers: Sequence[Answers], factors: Factors) -> list[ModelResult]:
    """One entry a run, in order."""
    return [_result(row, one, factors) for row, one in zip(rows, answers, strict=True)]


def recipe_of_run(row: ComparisonRow) -> Recipe:
    """The recipe by which a run was trained."""
    path = Path(row.run_dir) / RECIPE_NAME
    return stored_recipe(json.loads(path.read_text()), where=str(path))


def _result(row: ComparisonRow, answers: Answers, factors: Factors) -> ModelResult:
    recipe, compared = recipe_of_run(row), COMPARED[row.model]
    experts = EXPERTS[recipe.model.kind]
    return ModelResult(
        name=MODEL_NAMES[row.model],
        row=row,
        says=compared.says,
        given=" + ".join(GIVEN[expert] for expert in experts),
        orders_frames="temporal" in compared.senses and "temporal" not in experts,
        factors=[_score(recipe, compared.senses, answers, factors, number) for number in range(len(factors.names))],
    )


def _score(recipe: Recipe, senses: str, answers: Answers, factors: Factors, number: int) -> FactorScore:
    world = recipe.data.synthetic
    assert world is not None  # the contest has a world
    factor, counts = factors.names[number], answers.confusion(factors, number)
    return FactorScore(
        factor=factor,
        top1=float(answers.right_parts(factors)[:, number].mean()),
        ceiling=ceilings(factor, world.world("train"))[senses],
        classes=[shown(name) for name in factors.classes[number]],
        shares=[[float(count) / max(1, int(of_class.sum())) for count in of_class] for of_class in counts],
    )
