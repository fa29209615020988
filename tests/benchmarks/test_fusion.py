"""``make bench-fusion``: what it trains, what it says of the seeds, and the table it leaves."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import fusion as fusion_bench
from benchmarks.fusion import (
    ABLATIONS,
    FUSION_TASKS,
    FusionBenchConfig,
    FusionReport,
    app,
    fusion_facts,
    run_fusion_bench,
    separated,
    summarise,
)
from ca2st.errors import UserInputError
from ray_jobs.cli import main
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.demo.comparison import COMPARED, ComparisonRow, Contest, PretrainedExpert, recipe_of
from ray_jobs.demo.demo import LESSONS
from ray_jobs.runs.data import synthetic_classes
from ray_jobs.runs.model import make_model
from sharding.synthetic.factors import SENSE_SETS


def row(model: str, seed: int, top1: float) -> ComparisonRow:
    return ComparisonRow(
        model=model,
        target="holistic",
        seed=seed,
        run_id="r",
        top1=top1,
        ceiling=1.0,
        chance=1 / 64,
        trainable=1234,
        clips_per_second=50.0 + seed,
        seconds=9.0,
        run_dir="/here/run",
        checkpoint="/here/run/step",
        predictions="/here/run/p.parquet",
    )


ROWS = (row("cast", 0, 0.25), row("ca2st", 0, 0.75), row("cast", 1, 0.5), row("ca2st", 1, 0.625), row("audio", 0, 0.5))


@pytest.fixture
def report() -> FusionReport:
    summaries = summarise(ROWS, COMPARED)
    return FusionReport(
        task="holistic",
        difficulty="easy",
        experts=(PretrainedExpert(expert="audio", factor="audio", top1=1.0, file="/here/a.safetensors"),),
        rows=ROWS,
        summaries=summaries,
        separated=tuple(separated(summaries)),
    )


def test_a_model_has_mean_and_range_over_its_seeds_and_the_best_mean_comes_first() -> None:
    found = summarise(ROWS, COMPARED)
    assert [(one.model, one.seeds) for one in found] == [("ca2st", (0, 1)), ("audio", (0,)), ("cast", (0, 1))]
    assert (found[0].top1.mean, found[0].top1.lowest, found[0].top1.highest) == (0.6875, 0.625, 0.75)
    assert found[2].clips_per_second.mean == 50.5
    assert found[0].says == COMPARED["ca2st"].says


def test_models_are_separated_where_the_worst_seed_of_one_beats_the_best_of_the_other() -> None:
    assert list(separated(summarise(ROWS, COMPARED))) == [("ca2st", "cast")]


def test_equal_ends_of_two_ranges_overlap() -> None:
    rows = (*ROWS, row("cast", 2, 0.625))
    assert list(separated(summarise(rows, COMPARED))) == []


def test_a_single_seed_separates_nothing() -> None:
    rows = [one for one in ROWS if one.seed == 0]
    assert list(separated(summarise(rows, COMPARED))) == []


def test_the_table_holds_every_row_with_versions_and_command_but_no_place_of_this_machine(report: FusionReport) -> None:
    facts = fusion_facts(report, command="make bench-fusion")
    assert [(one["model"], one["seed"], one["top1"]) for one in facts["rows"]] == [
        (one.model, one.seed, one.top1) for one in ROWS
    ]
    assert facts["command"] == "make bench-fusion"
    assert facts["date"].endswith("Z")
    assert "torch" in facts["versions"]
    assert facts["separated"] == (("ca2st", "cast"),)
    assert "/here" not in json.dumps(facts)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"task": "binding", "models": ("cava", "late_ad")}, r"models: .*found 'late_ad' \(did you mean 'late_add'"),
        ({"task": "holistic", "models": ("lateral",)}, r"models: expected one of .*, found 'lateral'"),
        ({"task": "bind"}, r"task: expected one of holistic, binding, found 'bind' \(did you mean 'binding'"),
        ({"task": "binding", "num_seeds": 0}, r"seeds: expected at least 1, found 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UserInputError, match=said):
        FusionBenchConfig(**settings)  # type: ignore[arg-type]  # some of it is wrong on purpose


def test_an_unknown_difficulty_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"difficulty: expected one of easy, medium, hard, found 'esay'"):
        run_fusion_bench(FusionBenchConfig(task="binding", difficulty="esay"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", FUSION_TASKS)
def test_every_model_of_a_task_builds_and_names_what_it_is_given(task: str) -> None:
    plan = FUSION_TASKS[task]
    recipe = load_recipe(plan.recipe)
    classes = synthetic_classes(recipe)
    assert classes is not None
    contest = Contest(
        recipe=recipe, train=Path("t"), test=Path("v"), experts={}, out=Path(), views=plan.views, models=plan.models
    )
    for name, compared in plan.models.items():
        assert compared.senses in SENSE_SETS
        make_model(recipe_of(contest, name, 0), classes, is_outline=True)


def test_every_ablation_is_another_model_than_cava_and_than_the_others() -> None:
    base = load_recipe("binding_cava").model
    models = [replace(base, **ablation.changes) for ablation in ABLATIONS.values()]
    assert len({repr(model) for model in (base, *models)}) == len(models) + 1


@pytest.mark.parametrize("task", FUSION_TASKS)
def test_experts_learn_label_spaces_of_the_world_with_the_sizes_of_the_models_that_take_them(task: str) -> None:
    plan = FUSION_TASKS[task]
    expert, recipe = load_recipe(plan.expert_recipe), load_recipe(plan.recipe)
    assert expert.clip == recipe.clip
    sizes = ("dim", "depth", "num_heads", "patch_size", "audio_stride")
    assert [getattr(expert.model, size) for size in sizes] == [getattr(recipe.model, size) for size in sizes]
    for lesson in (*plan.lessons, *(LESSONS if task == "holistic" else ())):
        learned = replace(recipe, data=replace(recipe.data, targets=lesson.targets))
        assert set(synthetic_classes(learned) or ()) == set(lesson.targets)


def test_ablations_run_with_one_seed_and_the_others_with_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[tuple[int, ...], list[str]]] = []

    def contest_rows(contest: Contest, names: list[str]) -> list[ComparisonRow]:
        asked.append((contest.seeds, names))
        assert contest.experts == {"audio": "a.safetensors"}
        return [replace(ROWS[0], model=name, seed=seed) for name in names for seed in contest.seeds]

    expert = PretrainedExpert(expert="audio", factor="rhythm", top1=1.0, file="a.safetensors")
    monkeypatch.setattr(fusion_bench, "make_split", lambda _world, split, folder: folder / split)
    monkeypatch.setattr(fusion_bench, "pretrain", lambda *_, **__: [expert])
    monkeypatch.setattr(fusion_bench, "run_contest", contest_rows)
    config = FusionBenchConfig(task="binding", num_seeds=2, models=("last_layer", "cava", "late_add"))
    report = run_fusion_bench(config, tmp_path)
    assert asked == [((0, 1), ["cava", "late_add"]), ((0,), ["last_layer"])]
    assert [(one.model, one.seed) for one in report.rows] == [
        ("cava", 0), ("cava", 1), ("late_add", 0), ("late_add", 1), ("last_layer", 0)
    ]  # fmt: skip
    assert (report.task, report.difficulty, report.experts) == ("binding", "easy", (expert,))


class _Bench:
    """Stands for the bench: keeps what it was asked for."""

    def __init__(self, report: FusionReport) -> None:
        self.report = report
        self.asked: list[tuple[FusionBenchConfig, Path]] = []

    def __call__(self, config: FusionBenchConfig, out: Path) -> FusionReport:
        self.asked.append((config, out))
        return self.report


@pytest.fixture
def bench(report: FusionReport, monkeypatch: pytest.MonkeyPatch) -> _Bench:
    stub = _Bench(report)
    monkeypatch.setattr(fusion_bench, "run_fusion_bench", stub)
    return stub


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fusion", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main(app)
    return int(ended.value.code or 0)


def test_the_command_prints_and_keeps_the_same_table(
    bench: _Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.json"
    asked = ("--task", "holistic", "--seeds", 2, "--models", "cast, ca2st", "--out", tmp_path / "runs")
    assert run(monkeypatch, *asked, "--table", table, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == json.loads(table.read_text())
    assert facts["command"] == "make bench-fusion ARGS='--task holistic --seeds 2 --models cast,ca2st'"
    config = FusionBenchConfig(task="holistic", num_seeds=2, models=("cast", "ca2st"))
    assert bench.asked == [(config, tmp_path / "runs")]


def test_a_person_reads_the_ranges_the_ceiling_and_who_is_separated(
    bench: _Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--task", "holistic") == 0
    out = capsys.readouterr().out
    assert "holistic, easy: top-1 over 2 seed(s), chance 1.6%" in out
    assert "ca2st                  68.8%   62.5%   75.0%   100.0%     1,234       50" in out
    assert "  ca2st > cast" in out
    assert "audio 100.0% on audio" in out
    assert bench.asked[0][1] == Path("runs/fusion-holistic")


def test_a_table_that_could_not_be_written_is_refused_before_the_bench_runs(
    bench: _Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--task", "binding", "--table", tmp_path / "no" / "table.json") == 2
    assert "--table: expected a file in a folder that exists" in capsys.readouterr().err
    assert bench.asked == []
