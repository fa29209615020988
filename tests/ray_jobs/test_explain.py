"""`ca2st explain`: the page shows what was recorded, needs nothing but itself, and says where there is nothing."""

import base64
import io
import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ca2st.errors import NumericError, UserInputError
from ca2st.model.inspect import record_attention
from pipelines.views import EvaluationViews
from ray_jobs import cli
from ray_jobs.explain import explanation
from ray_jobs.explain import page as explaining
from ray_jobs.explain.explanation import Explanation, run_recorded
from ray_jobs.explain.page import LESS, MORE, direction_views, heat_png, levels, render_page
from ray_jobs.pages.charts import hertz_of_bin, hertz_ticks, seconds_ticks, spectrogram_png
from ray_jobs.runs.data import evaluation_loader
from sharding.format.shard_set import ShardSet
from support.fake_shards import make_samples, make_shard_set
from support.media import Sound, make_clip
from support.trained import trained_model

ALL = ("t2s", "s2t", "a2s", "s2a", "a2t", "t2a")
VIDEO = Path("films/<b>holiday.mp4")


class Page(HTMLParser):
    """Tags with their attributes, and all text, of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.tags, self.text = html, [], ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag and all(attrs.get(k) == v for k, v in wanted.items())]

    def panels(self, direction: str) -> list[dict[str, str]]:
        """Attributes of the layer panels of a direction, with the pictures inside as `heats`."""
        found, inside = [], ""
        for tag, attrs in self.tags:
            if tag == "section":
                inside = attrs.get("class", "")
            elif inside == f"direction {direction}" and attrs.get("class") == "panel":
                found.append(attrs | {"heats": []})
            elif inside == f"direction {direction}" and attrs.get("class") == "heat":
                found[-1]["heats"].append(attrs["src"])
        return found


def picture(uri: str) -> np.ndarray:
    kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", uri).groups()
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert image.format == kind.upper()
    return np.asarray(image)


@contextmanager
def _instead(shards: ShardSet) -> Iterator[ShardSet]:
    yield shards


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardSet]:
    root = tmp_path_factory.mktemp("explain")
    return {
        "loud": make_shard_set(root / "loud", make_samples(1)),
        "silent": make_shard_set(root / "silent", make_samples(1, mel_rows=0)),
        "short": make_shard_set(root / "short", make_samples(1, mel_rows=24)),
    }


def explained(sets: dict[str, ShardSet], name: str = "loud", kind: str = "ca2st", **changes) -> Explanation:
    """What a tiny model does with a fake video that needs no conversion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explanation, "shards_of_videos", lambda *_: _instead(sets[name]))
        return run_recorded(trained_model(Path("run"), kind, **changes), VIDEO)


@pytest.fixture(scope="module")
def loud(sets) -> Explanation:
    return explained(sets)


@pytest.fixture(scope="module")
def page(loud) -> Page:
    return Page(render_page(loud))


def test_what_is_shown_is_one_centred_view_run_by_hand(sets, loud):
    trained = trained_model(Path("run"))
    with evaluation_loader(
        trained.recipe, sets["loud"], ("label",), views=EvaluationViews(), rank=0, world_size=1
    ) as loader:
        batch = next(next(iter(loader.batches())).split(1))
    with record_attention(trained.model) as maps, torch.no_grad():
        output = trained.model(batch.normalised_video(), batch.mel, batch.intervals_seconds)
    assert np.array_equal(loud.frames, batch.video[0].permute(1, 2, 3, 0).numpy())
    assert loud.frame_seconds == pytest.approx([(2 * index + 1) * 20 // 8 / 30 for index in range(4)], abs=1e-4)
    assert [(m.layer, m.direction.name) for m in loud.maps] == [(m.layer, m.direction.name) for m in maps]
    for ours, theirs in zip(loud.maps, maps, strict=True):
        torch.testing.assert_close(ours.given, theirs.given)
        torch.testing.assert_close(ours.entropy_bits, theirs.entropy_bits)
    likeliest = output.logits["label"][0].softmax(dim=-1).sort(descending=True)
    assert [p.probability for p in loud.predictions] == pytest.approx(likeliest.values.tolist(), rel=1e-5)
    assert [p.label for p in loud.predictions] == [trained.classes["label"][index] for index in likeliest.indices]


def test_the_page_asks_nothing_of_any_network(page):
    assert not re.search(r"https?:|//[a-z]|@import|<link|<iframe|<object|<base", page.html)
    sources = [attrs["src"] for _, attrs in page.tags if "src" in attrs]
    sources += re.findall(r"url\(([^)]+)\)", page.html)
    assert len(sources) == len(page.all("img")) + 4 + 1
    assert all(source.startswith("data:image/") for source in sources)
    assert not [attrs for _, attrs in page.tags if "href" in attrs or "srcset" in attrs]
    assert "default-src 'none'" in page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]


def test_every_picture_decodes_to_its_grid(page, loud):
    frames = [picture(uri) for uri in re.findall(r"--frame-\d+: url\(([^)]+)\)", page.html)]
    assert [frame.shape for frame in frames] == [(32, 32, 3)] * 4
    for ours, theirs in zip(frames, loud.frames, strict=True):
        assert np.abs(ours.astype(int) - theirs).mean() < 6
    (spectrogram,) = re.findall(r"--spectrogram: url\(([^)]+)\)", page.html)
    assert picture(spectrogram).shape == (128, 48)
    for direction, shape, count in (("t2s", (2, 2, 4), 2), ("s2a", (2, 2, 4), 2), ("a2s", (12, 4, 4), 1)):
        for panel in page.panels(direction):
            assert [picture(heat).shape for heat in panel["heats"]] == [shape] * count


def test_every_direction_has_a_panel_for_each_layer_and_the_last_one_is_open_without_a_script(page):
    for direction in ALL:
        assert [panel["data-layer"] for panel in page.panels(direction)] == ["1", "2"]
        radios = page.all("input", name=f"{direction}-layer")
        assert ["checked" in radio for radio in radios] == [False, True]
        assert all(page.all("label", **{"for": radio["id"]}) for radio in radios)
        assert direction.upper() in page.text
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_numbers_of_the_page_are_those_recorded(page, loud):
    rows = re.findall(
        r'data-direction="(\w+)" data-layer="(\d)"><td>\w+</td><td>\d</td><td>([\d.]+)</td><td>([\d.]+)</td>', page.html
    )
    shown = {(name, int(layer)): (float(bits), float(share)) for name, layer, bits, share in rows}
    assert shown == {
        (found.direction.name, found.layer): pytest.approx(
            (float(found.entropy_bits[0]), float(found.entropy_share[0])), abs=5.1e-5
        )
        for found in loud.maps
    }
    titles = re.findall(r"<title>(\w+), layer (\d): ([\d.]+) (%|bits)</title>", page.html)
    assert len(titles) == 2 * len(loud.maps)
    for name, layer, number, unit in titles:
        bits, share = shown[name.lower(), int(layer)]
        assert float(number) == pytest.approx(100 * share if unit == "%" else bits, abs=0.06)


def _log_times(heats: list[str], limit: float) -> np.ndarray:
    """The numbers behind the colours."""
    rgba = np.stack([picture(heat) for heat in heats]).astype(float)
    more = rgba[..., 0] > rgba[..., 2]
    return limit * np.where(more, rgba[..., 3] / MORE[3], -rgba[..., 3] / LESS[3])


@pytest.mark.parametrize("direction", ALL)
def test_the_colours_are_the_attention_received_against_an_even_share(page, loud, direction):
    (view,) = [view for view in direction_views(loud.maps, loud) if view.direction.name == direction]
    maps = [found for found in loud.maps if found.direction.name == direction]
    received = [found.received[0].numpy() for found in maps]
    highest = max(float(np.quantile(np.log2(one * one.size), 0.995)) for one in received)
    limit = min(max(highest, math.log2(1.25)), 6.0)
    assert view.most.rstrip("×") == f"{2**limit:.2g}"
    for panel, one in zip(page.panels(direction), received, strict=True):
        expected = np.clip(np.log2(one * one.size), -limit, limit)
        expected = expected.T[None, ::-1] if direction.startswith("a") else expected.reshape(2, 2, 2)
        assert _log_times(panel["heats"], limit) == pytest.approx(expected, abs=limit / 100)


def test_the_script_gets_what_each_moment_listened_to(page, loud):
    (panel,) = [panel for panel in page.panels("s2a") if panel["data-layer"] == "2"]
    found = next(found for found in loud.maps if (found.direction.name, found.layer) == ("s2a", 2))
    level = np.frombuffer(base64.b64decode(panel["data-levels"]), np.uint8).reshape(found.given[0].shape)
    order = found.given[0].numpy()
    assert (panel["data-rows"], panel["data-columns"]) == ("2", "2")
    clear = (level > 0) & (level < 254)
    assert clear.any()
    assert (np.diff(level[clear][np.argsort(order[clear])].astype(int)) >= 0).all()
    assert page.all("section", **{"class": "direction s2a"})[0]["data-queries"].count("|") + 1 == order.shape[0]


def test_a_window_of_the_own_frame_has_no_matrix_of_times(page, loud):
    matrices = {view.name: [panel.matrix for panel in view.panels] for view in direction_views(loud.maps, loud)}
    assert matrices.pop("S2T") == [None, None]
    assert all(matrix is not None for panels in matrices.values() for matrix in panels)
    assert [panel["data-levels"] for panel in page.panels("s2t")] == ["", ""]


def test_a_sound_is_drawn_at_its_own_time_and_tone(loud):
    """All attention on the earliest, lowest patch colours the lower left cell alone, and is told with its place."""
    found = next(found for found in loud.maps if found.direction.name == "a2s")
    alone = torch.zeros_like(found.given)
    alone[..., 0, 0] = 1
    (view,) = direction_views([replace(found, given=alone)], loud)
    cells = picture(view.panels[0].heats[0])
    assert (cells[-1, 0, :3] == MORE[:3]).all()
    cells = cells.copy()
    cells[-1, 0] = (*LESS[:3], 0)
    assert (cells[..., :3] == LESS[:3]).all()
    assert view.panels[0].strongest == f"the sound at 0.17 s around {_hertz(8):.0f} Hz: 48× the even share"


def _hertz(mel_bin: float) -> float:
    """Kaldi's mel axis from 20 Hz to 8 kHz in 128 bins."""
    mel = [1127 * math.log(1 + hertz / 700) for hertz in (20, 8000)]
    return 700 * (math.exp((mel[0] + (mel[1] - mel[0]) * mel_bin / 128) / 1127) - 1)


def test_a_video_without_sound_says_so(sets):
    page = Page(render_page(explained(sets, "silent")))
    assert "This video has no sound." in page.text
    assert page.text.count("Here there is only silence to hear.") == 2
    (spectrogram,) = re.findall(r"--spectrogram: url\(([^)]+)\)", page.html)
    assert np.ptp(picture(spectrogram)) == 0
    assert len(page.panels("a2t")) == 2


def test_sound_that_ends_early_is_marked_as_padded(sets):
    short = explained(sets, "short")
    assert short.sound.num_heard_rows == 24
    page = Page(render_page(short))
    assert "the flat part on the right is padding" in page.text
    assert page.all("span", **{"class": "padding"})[0]["style"] == "left:50.00%"
    assert np.ptp(picture(re.findall(r"--spectrogram: url\(([^)]+)\)", page.html)[0])[:, 24:]) == 0


def test_a_model_that_does_not_hear_has_no_spectrogram(sets):
    cast = explained(sets, kind="cast")
    assert cast.sound is None
    page = Page(render_page(cast))
    assert "--spectrogram:" not in page.html
    assert "kHz" not in page.text
    assert [name for name in ALL if page.panels(name)] == ["t2s", "s2t"]


def test_names_are_text_on_the_page_not_markup(loud):
    page = Page(render_page(replace(loud, predictions=[replace(loud.predictions[0], label="<script>x</script>")])))
    assert "<b>holiday.mp4" in page.text
    assert "<script>x</script>" in page.text
    assert len(page.all("script")) == 1
    assert page.all("b") == []


def test_maps_of_another_grid_in_every_layer_are_drawn_in_their_own(sets):
    page = Page(render_page(explained(sets, kind="cast", spatial_encoder="resnet50", depth=4)))
    sizes = {
        name: [(int(p["data-rows"]), int(p["data-columns"])) for p in page.panels(name)] for name in ("s2t", "t2s")
    }
    assert sizes == {"s2t": [(8, 8), (4, 4), (2, 2), (1, 1)], "t2s": [(2, 2)] * 4}
    for panel in page.panels("s2t"):
        assert picture(panel["heats"][0]).shape == (int(panel["data-rows"]), int(panel["data-columns"]), 4)


def test_attention_that_is_even_is_told_so(loud):
    found = loud.maps[0]
    even = replace(found, given=torch.full_like(found.given, 1 / found.given[0, 0].numel()))
    (view,) = direction_views([even], loud)
    assert view.panels[0].strongest == "no key stands out: each gets about the even share"
    assert (picture(view.panels[0].heats[0])[..., 3] == 0).all()


def test_a_model_that_gives_no_numbers_is_no_page(sets, monkeypatch):
    broken = trained_model(Path("run"))
    torch.nn.init.constant_(
        broken.model.layers[0].bridges["audio_spatial"].directions["a2s"].attention.q.bias, math.nan
    )
    monkeypatch.setattr(explanation, "shards_of_videos", lambda *_: _instead(sets["loud"]))
    with pytest.raises(
        NumericError, match="finite attention and logits, found NaN or infinity first in A2S of layer 1"
    ):
        run_recorded(broken, VIDEO)


def test_experts_joined_otherwise_than_by_cross_attention_are_refused():
    with pytest.raises(UserInputError, match=r"found 'cast' \(spatial, temporal\) without cross-attention"):
        run_recorded(trained_model(Path("run"), "cast", fusion="lateral"), VIDEO)


@pytest.mark.parametrize("kind", ["spatial", "temporal", "audio"])
def test_one_expert_alone_is_refused_with_what_to_do(kind):
    with pytest.raises(UserInputError, match=f"found '{kind}' .* nothing to explain; give a checkpoint of cast, cava"):
        run_recorded(trained_model(Path("run"), kind), VIDEO)


def _command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["ca2st", "explain", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_reads_a_real_video_and_prints_its_facts_as_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(explaining, "load_trained", lambda _: trained_model(tmp_path))
    video = make_clip(tmp_path / "loud.mp4", sound=Sound())
    assert _command(monkeypatch, "run", video, "--out", tmp_path / "page.html", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["html"] == str(tmp_path / "page.html")
    assert [(row["layer"], row["direction"]) for row in facts["entropy"]] == [(n, name) for n in (1, 2) for name in ALL]
    assert all(0 <= row["share"] <= 1 and row["bits"] >= 0 for row in facts["entropy"])
    assert sum(row["probability"] for row in facts["predictions"]) == pytest.approx(1, abs=1e-5)
    html = (tmp_path / "page.html").read_text()
    for row in facts["entropy"]:
        assert f"<td>{row['layer']}</td><td>{row['bits']:.4f}</td><td>{row['share']:.4f}</td>" in html
    assert "no sound" not in Page(html).text


def test_what_cannot_work_is_told_before_the_model_is_read(tmp_path, monkeypatch, capsys):
    clip = tmp_path / "film.mp4"
    assert _command(monkeypatch, "run", clip) == 2
    assert "expected video files, found none at" in capsys.readouterr().err
    clip.touch()
    assert _command(monkeypatch, "run", clip, "--out", tmp_path / "nowhere" / "page.html") == 2
    assert "--out: expected a file in a folder that exists" in capsys.readouterr().err


def test_an_even_share_is_clear_and_more_is_orange_and_less_is_blue():
    uri = heat_png(levels(np.array([[-2.0, 0.0, 1.0, 9.0]], np.float32), 2.0))
    expected = [[*LESS[:3], LESS[3]], [*LESS[:3], 0], [*MORE[:3], MORE[3] / 2], [*MORE[:3], MORE[3]]]
    assert picture(uri)[0] == pytest.approx(np.array(expected), abs=1)


def test_the_spectrogram_has_low_tones_below_and_time_to_the_right():
    mel = np.zeros((10, 16), np.float32)
    mel[7, 0] = 1
    drawn = picture(spectrogram_png(mel, 10))
    assert np.argwhere(drawn == drawn.max()).tolist() == [[15, 7]]


@given(start=st.floats(0, 5000), span=st.floats(0.2, 60))
def test_ticks_of_seconds_lie_on_the_axis_where_their_label_says(start, span):
    ticks = seconds_ticks(start, start + span)
    assert 1 <= len(ticks) <= 8
    for tick in ticks:
        assert -1e-3 <= tick.percent <= 100 + 1e-3
        assert start + span * tick.percent / 100 == pytest.approx(float(tick.label), abs=0.006)


@pytest.mark.parametrize("rate", [16_000, 24_000, 48_000])
def test_ticks_of_hertz_go_up_to_half_the_sample_rate(rate):
    ticks = hertz_ticks(rate)
    places = [tick.percent for tick in ticks]
    assert places == sorted(places, reverse=True)
    assert min(places) >= 0
    for tick in ticks:
        number, unit = tick.label.split()
        hertz = float(number) * (1000 if unit == "kHz" else 1)
        assert hertz_of_bin(100 - tick.percent, num_bins=100, sample_rate_hz=rate) == pytest.approx(hertz, rel=1e-6)
