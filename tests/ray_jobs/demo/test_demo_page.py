"""The demo's page shows the report's own numbers, the models' own answers and the shards' own pictures, alone."""

import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ca2st.errors import DataDamageError
from ca2st.training.losses import smoothed_targets
from ray_jobs.commands.machine import _demo_lines
from ray_jobs.config.recipe import recipe_document
from ray_jobs.demo.answers import Answers, DemoReport, Factors, factors_of_set, next_steps, read_all_answers, shown
from ray_jobs.demo.comparison import COMPARED, ComparisonRow, PretrainedExpert
from ray_jobs.demo.page import (
    MODEL_NAMES,
    choose_clips,
    confusion_chart,
    least_loss,
    loss_chart,
    model_results,
    render_demo_page,
    smoothed,
    write_demo_page,
)
from ray_jobs.pages.charts import read_pictures
from ray_jobs.runs.prediction import Prediction, VideoPrediction
from sharding.format.shard_set import read_manifest, read_shard_set
from sharding.synthetic.factors import labels_of
from support.tiny_world import WORLD, make_world_set, tiny_recipe, world_key

MODELS = ("spatial", "cava", "cast", "ca2st")
CEILINGS = {"spatial": 1 / 8, "cava": 1.0, "cast": 1 / 4, "ca2st": 1.0}
WRONG = {"spatial": range(8), "cava": (1, 2, 3), "cast": (0, 1, 2, 4, 5), "ca2st": (1,)}
"""Samples that each model answers wrongly."""
VIDEO = "my videos/<b>it's.mp4"


class Page(HTMLParser):
    """Open tags that must be closed, tags with their attributes, and the text of each."""

    _VOID = ("meta", "img", "rect", "circle", "line", "path", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.tags, self.open, self.texts = html, [], [], []
        self.feed(html)
        assert self.open == [], "tags left open"

    def handle_starttag(self, tag: str, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self._VOID:
            self.open.append((tag, len(self.texts)))
            self.texts.append([tag, dict(attrs), ""])

    def handle_startendtag(self, tag: str, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop()[0] == tag, f"</{tag}> closes another"

    def handle_data(self, data: str) -> None:
        for _, index in self.open:
            self.texts[index][2] += data

    def all(self, tag: str, **wanted: str) -> list[str]:
        """Text of every such element."""
        return [
            " ".join(text.split())
            for name, attrs, text in self.texts
            if name == tag and all(attrs.get(key.replace("_", "-")) == value for key, value in wanted.items())
        ]

    def table(self, name: str) -> dict[str, list[str]]:
        """Text of the cells of the table of that class, by model."""
        found: dict[str, list[str]] = {}
        inside = row = ""
        for tag, attrs, text in self.texts:
            inside = attrs.get("class", "") if tag == "table" else inside
            row = attrs.get("data-model", "") if tag == "tr" else row
            if inside == name and row and tag in ("td", "th"):
                found.setdefault(row, []).append(" ".join(text.split()))
        return found


def answer_of(sample: int, label: int, model: str) -> int:
    """Wrong models miss the tone; CA2ST's only mistake is the shape."""
    if sample not in WRONG[model]:
        return label
    return (label + 16) % 64 if model == "ca2st" else 4 * (label // 4) + (label + 1) % 4


def write_predictions(path: Path, model: str) -> None:
    labels = [labels_of(WORLD.world("validation"), "validation", index)[3] for index in range(8)]
    probabilities = np.full((8, 64), 0.3 / 63)
    probabilities[range(8), [answer_of(index, label, model) for index, label in enumerate(labels)]] = 0.7
    order = [3, 1, 0, 2, 7, 6, 5, 4]
    columns = {
        "key": [world_key("validation", index) for index in order],
        "holistic_label": pa.array([labels[index] for index in order], pa.int32()),
        "holistic_probabilities": pa.array(probabilities[order].tolist(), pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(columns), path)


def make_row(root: Path, model: str) -> ComparisonRow:
    folder = root / f"{model}-seed-0"
    folder.mkdir()
    recipe = tiny_recipe(root / "train")
    document = recipe_document(replace(recipe, model=replace(recipe.model, **COMPARED[model].changes)))
    (folder / "recipe.json").write_text(json.dumps(document))
    steps = [
        {"event": "step", "attempt": 1, "time": 1.0, "step": step, "loss": 4.2 - step / 10} for step in range(1, 11)
    ]
    (folder / "journal.jsonl").write_text("".join(json.dumps(step, separators=(",", ":")) + "\n" for step in steps))
    write_predictions(folder / "predictions.parquet", model)
    return ComparisonRow(
        model=model,
        target="holistic",
        seed=0,
        run_id=f"{model}0123456789",
        top1=1 - len(WRONG[model]) / 8,
        ceiling=CEILINGS[model],
        chance=1 / 64,
        trainable=1234567,
        clips_per_second=43.6,
        seconds=61.4,
        run_dir=str(folder),
        checkpoint=str(folder / "checkpoints/step-10.attempt-1"),
        predictions=str(folder / "predictions.parquet"),
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> DemoReport:
    root = tmp_path_factory.mktemp("demo")
    make_world_set(root / "train", "train")
    make_world_set(root / "test", "validation")
    return DemoReport(
        shards=[str(root / "train"), str(root / "test")],
        test_shards=str(root / "test"),
        experts=[
            PretrainedExpert(expert=name, factor=factor, top1=top1, file="f")
            for name, factor, top1 in (
                ("spatial", "space", 0.912),
                ("temporal", "time", 0.993),
                ("audio", "audio", 1.0),
            )
        ],
        runs=[make_row(root, model) for model in MODELS],
        prediction=VideoPrediction(
            video=VIDEO, predictions=[Prediction(target="holistic", label="<script>disc</script>", probability=0.625)]
        ),
        tracking_uri="sqlite:////runs & more/mlflow.db",
        page=str(root / "index.html"),
        seconds=208.4,
    )


@pytest.fixture(scope="module")
def page(report: DemoReport) -> Page:
    return Page(write_demo_page(report, Path(report.page).parent).read_text())


@pytest.fixture(scope="module")
def factors(report: DemoReport) -> Factors:
    return factors_of_set(read_manifest(Path(report.test_shards)))


@pytest.fixture(scope="module")
def answers(report: DemoReport, factors: Factors) -> list[Answers]:
    return read_all_answers(report.runs, factors)


def test_the_table_shows_the_numbers_of_the_report(page: Page, report: DemoReport) -> None:
    table = page.table("numbers")
    assert list(table) == list(MODELS)
    assert table["cast"] == [
        "CAST", "frames + motion", "37.5 %", "25.0 %", "1.6 %", "1,234,567", "44", "61 s", "cast0123",
    ]  # fmt: skip
    for row in report.runs:
        assert table[row.model][2:5] == [f"{100 * value:.1f} %" for value in (row.top1, row.ceiling, row.chance)]


def test_the_model_that_orders_frames_without_an_expert_for_it_is_explained(page: Page) -> None:
    assert page.table("numbers")["cava"][1] == "frames + sound1"
    assert "its time codes tell it the order of the frames" in page.html


def test_the_bars_are_as_long_as_the_accuracies_and_marked_at_the_ceilings(page: Page) -> None:
    lengths = re.findall(r'class="reached" style="width:([\d.]+)%', page.html)
    marks = re.findall(r'class="ceiling-mark" style="left:([\d.]+)%', page.html)
    assert [float(length) for length in lengths] == [0.0, 62.5, 37.5, 87.5]
    assert [float(mark) for mark in marks] == [12.5, 100.0, 25.0, 100.0]


def test_the_experts_are_shown_with_their_own_accuracies(page: Page) -> None:
    assert page.all("li", data_expert="spatial") == ["91.2 % spatial expert on shapes"]
    assert page.all("li", data_expert="audio") == ["100.0 % audio expert on tones"]


def test_factors_are_taken_apart_as_the_world_put_them_together(
    report: DemoReport, factors: Factors, answers: list[Answers]
) -> None:
    truth = [labels_of(WORLD.world("validation"), "validation", index)[:3] for index in range(8)]
    assert factors.parts(answers[0].labels).tolist() == [list(labels) for labels in truth]
    names = read_manifest(Path(report.test_shards)).label_space("holistic").classes
    for combined in range(64):
        assert factors.labels(combined) == tuple(shown(part) for part in names[combined].split(" "))


def test_each_model_has_the_share_of_every_factor_and_its_ceiling(
    page: Page, report: DemoReport, answers: list[Answers]
) -> None:
    found = {
        result.row.model: [(score.top1, score.ceiling) for score in result.factors]
        for result in model_results(report.runs, answers)
    }
    assert found == {
        "spatial": [(1, 1), (1, 1 / 2), (0, 1 / 4)],
        "cava": [(1, 1), (1, 1), (5 / 8, 1)],
        "cast": [(1, 1), (1, 1), (3 / 8, 1 / 4)],
        "ca2st": [(7 / 8, 1), (1, 1), (1, 1)],
    }
    *cells, out_of_reach = page.table("factors")["cast"][1:]
    assert out_of_reach == "the tone, as it hears nothing"
    assert page.table("factors")["ca2st"][-1] == "nothing: all three factors are in what it is given"
    assert [cell[-len("100 %of 100 %") :].strip() for cell in cells] == [
        "100 %of 100 %",
        "100 %of 100 %",
        "% 38 %of 25 %",
    ]


def test_a_factor_that_is_guessed_is_even_and_one_that_is_known_is_a_diagonal(
    report: DemoReport, answers: list[Answers]
) -> None:
    spatial = model_results(report.runs, answers)[0]
    assert np.array_equal(spatial.factors[0].shares, np.eye(4))
    assert np.array_equal(spatial.factors[2].shares, np.roll(np.eye(4), 1, axis=1))


def test_the_marks_of_the_confusion_are_all_answers_of_the_fullest_model(page: Page, answers: list[Answers]) -> None:
    chart = confusion_chart(answers[-1])
    expected = np.zeros((64, 64), int)
    np.add.at(expected, (answers[-1].labels, answers[-1].chosen), 1)
    found = np.zeros((64, 64), int)
    for cell in chart.cells:
        found[int(cell.y // chart.step), int(cell.x // chart.step)] = cell.count
    assert np.array_equal(found, expected)
    assert chart.kinds == {"right": 7, "space": 1}
    assert page.all("strong")[-5:] == ["7", "1", "0", "0", "0"]
    assert page.all("li", data_kind="space") == ["shape wrong112 %"]
    wrong = next(cell for cell in chart.cells if cell.kind == "space")
    assert re.fullmatch(r"1 clip of (\w+), (\w+), (\d+ Hz): answered (?!\1)\w+, \2, \3", wrong.label)


def test_clips_show_every_pattern_of_right_and_wrong_once_before_any_twice(answers: list[Answers]) -> None:
    chosen = choose_clips(answers, most=6)
    right = np.stack([one.is_right for one in answers], axis=1)
    patterns = [tuple(right[sample]) for sample, _ in chosen]
    distinct = {tuple(row) for row in right.tolist()}
    assert len(set(patterns[: len(distinct)])) == len(distinct)
    assert [alike for _, alike in chosen[: len(distinct)]] == sorted(
        (sum(tuple(row) == pattern for row in right.tolist()) for pattern in distinct), reverse=True
    )


def test_the_clips_are_those_of_the_shards_with_the_answers_of_the_models(
    page: Page, report: DemoReport, answers: list[Answers]
) -> None:
    keys = [attrs["data-key"] for tag, attrs in page.tags if tag == "article"]
    chosen = [sample for sample, _ in choose_clips(answers)]
    assert keys == [answers[0].keys[sample] for sample in chosen]
    stored = read_pictures(read_shard_set(Path(report.test_shards)), keys)
    shown_pictures = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert shown_pictures == [uri for clip in stored for uri in (*clip.stills, clip.spectrogram)]
    verdicts = re.findall(r'class="m-(\w+) (right|wrong)"', page.html)
    assert verdicts == [
        (model, "wrong" if sample in WRONG[model] else "right") for sample in chosen for model in MODELS
    ]
    assert page.html.count('class="part wrong"') == sum(sample in WRONG[model] for sample in chosen for model in MODELS)


def test_every_picture_decodes(page: Page) -> None:
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == 6 * 9
    for source in sources:
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", source).groups()
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        image.load()
        assert image.format == kind.upper()


def test_the_page_asks_nothing_of_any_network(page: Page) -> None:
    assert re.findall(r"https?:|@import|srcset|url\((?!data:)", page.html) == []
    addresses = [attrs[name] for _, attrs in page.tags for name in ("src", "href") if name in attrs]
    assert {address.partition(":")[0] for address in addresses} == {"data"}
    assert [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object")] == []
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_names_from_outside_cannot_become_markup(page: Page) -> None:
    assert "<b>it" not in page.html
    assert "<script>" not in page.html
    assert "<script>disc</script>" in page.all("span", **{"class": "class"})[-1]


def test_a_video_of_the_test_set_is_shown_with_its_true_class(
    report: DemoReport, factors: Factors, answers: list[Answers]
) -> None:
    asked = replace(report.prediction, video="media/validation/validation-000003.mp4")
    assert (
        " · ".join(factors.labels(int(answers[0].labels[3])))
        in Page(render_demo_page(replace(report, prediction=asked)))
        .html.partition("validation-000003.mp4, which is ")[2]
        .partition(":</p>")[0]
    )


def test_the_next_commands_are_ones_a_shell_takes(page: Page, report: DemoReport) -> None:
    commands = list(next_steps(report))
    assert page.all("code")[1:4] == commands
    assert commands[0] == "mlflow ui --backend-store-uri 'sqlite:////runs & more/mlflow.db'"
    assert commands[1].endswith("""/ca2st-seed-0/checkpoints/step-10.attempt-1 'my videos/<b>it'"'"'s.mp4'""")


def test_runs_tested_on_other_samples_are_refused(report: DemoReport, tmp_path: Path) -> None:
    table = pq.read_table(report.runs[0].predictions).slice(1)
    pq.write_table(table, tmp_path / "fewer.parquet")
    runs = [report.runs[1], replace(report.runs[0], predictions=str(tmp_path / "fewer.parquet"))]
    with pytest.raises(DataDamageError, match=r"fewer\.parquet: its samples are not those of .*cava-seed-0"):
        render_demo_page(replace(report, runs=runs))


def test_a_run_that_nobody_tracked_has_a_dash_for_its_run(report: DemoReport) -> None:
    page = Page(render_demo_page(replace(report, runs=[replace(row, run_id=None) for row in report.runs])))
    assert {cells[-1] for cells in page.table("numbers").values()} == {"–"}


@pytest.mark.parametrize(("ceiling", "group"), [(1.0, 1), (1 / 4, 4), (1 / 8, 8), (1 / 64, 64)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_least_loss_is_that_of_answering_the_mean_of_what_cannot_be_told_apart(
    ceiling: float, group: int, smoothing: float
) -> None:
    targets = smoothed_targets(torch.arange(group), 64, smoothing=smoothing).double()
    best = targets.mean(dim=0)
    losses = -(targets * torch.where(best > 0, best, 1).log()).sum(dim=1)
    assert least_loss(ceiling, num_classes=64, smoothing=smoothing) == pytest.approx(float(losses.mean()), abs=1e-6)


def test_the_loss_of_every_step_is_in_the_drawing_where_its_axes_say() -> None:
    found = loss_chart({"cast": [(1, 4.0), (2, 2.0), (4, 1.0)]}, {"cast": 0.5}, num_classes=64)
    chart, (raw, _) = found.chart, found.chart.lines
    marks = {mark.label: mark.at for mark in chart.y_marks}
    steps = {mark.label: mark.at for mark in chart.x_marks}
    assert [point.y for point in raw.points] == pytest.approx([marks["4"], marks["2"], marks["1"]])
    assert [point.x for point in raw.points] == pytest.approx([steps["1"], steps["2"], steps["4"]])
    guess, floor = chart.levels
    assert floor.y == pytest.approx((marks["0"] + marks["1"]) / 2)
    assert guess.y < marks["4"], "it is 4.16"
    assert (found.guess, found.least["cast"], found.final["cast"]) == (math.log(64), 0.5, 1.0)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.integers(0, 10))
def test_smoothing_keeps_ends_and_bounds(values: list[float], reach: int) -> None:
    found = smoothed(values, reach=reach)
    assert (found[0], found[-1], len(found)) == (values[0], values[-1], len(values))
    assert min(values) - 1e-9 <= min(found)
    assert max(found) <= max(values) + 1e-9


def test_every_compared_model_has_a_name_on_the_page_and_a_colour() -> None:
    folder = Path(__file__).parents[3] / "ray_jobs/pages/page_files"
    style, colours = (folder / "demo.css").read_text(), (folder / "base.css").read_text()
    assert MODEL_NAMES.keys() == COMPARED.keys()
    for name in COMPARED:
        colour = re.search(rf"\.m-{name} {{ --tone: var\((--t\d)\)", style)
        assert colour is not None
        assert colours.count(f"{colour[1]}: #") == 2, "light and dark"


def test_the_command_prints_each_model_the_experts_the_page_and_what_to_try(
    report: DemoReport,
) -> None:
    out = "\n".join(_demo_lines(report))
    assert re.search(r"^cast +1,234,567 +37\.5% +25\.0% +44 +cast0123456789$", out, re.MULTILINE)
    assert "spatial 91.2% on space" in out
    assert report.page in out
    for command in next_steps(report):
        assert command in out
