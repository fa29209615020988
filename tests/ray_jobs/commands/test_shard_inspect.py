"""``ca2st shard inspect``: the set's own numbers, from its indexes, and its own clips on a page."""

import base64
import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ca2st.errors import DataDamageError
from pipelines.errors import ShardSetDamageError
from pipelines.storage.index import set_facts
from ray_jobs.cli import app
from ray_jobs.pages.charts import read_spread_clips
from ray_jobs.set_card import (
    class_ends,
    duration_bars,
    facts_in_words,
    read_quirks,
    render_set_card,
    size_in_words,
)
from sharding.conversion import convert
from sharding.datasets import DatasetRequest, read_dataset
from sharding.format.index import sample_key
from sharding.format.shard_set import LabelSpace, ShardSet, read_shard_set
from sharding.settings import ConversionConfig, RejectBudget
from sharding.verify import verify_shard_set
from support.annotations import write_lines
from support.fake_shards import FakeSample, flip_byte, make_samples, make_shard_set, members_of
from support.media import make_clip
from support.video_shards import video_shard_set


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Ten clips of 20 frames with sound, then one of 50 without, in three shards."""
    silent = FakeSample(key="silent", labels=(1,), num_frames=50, mel_rows=0)
    return make_shard_set(tmp_path_factory.mktemp("set"), [*make_samples(10), silent], rejected={"no_audio": 3})


def test_numbers_are_those_of_the_samples(shard_set: ShardSet) -> None:
    facts = set_facts(shard_set)
    assert (facts.num_samples, facts.num_shards, facts.num_with_audio) == (11, 3, 10)
    assert facts.classes == {"label": {"red": 4, "green": 4, "blue": 3}}
    assert (facts.num_frames.least, facts.num_frames.median, facts.num_frames.most) == (20, 20, 50)
    assert facts.duration_seconds.total == pytest.approx(10 * 20 / 30 + 50 / 30)
    assert facts.frames_per_second.median == pytest.approx(30)
    assert facts.mel_rows.least == 0
    assert facts.shard_bytes == sum(path.stat().st_size for path in shard_set.root.glob("ca2st-*"))
    assert facts.rejected == {"no_audio": 3}


@pytest.mark.parametrize("times", [pytest.param(8, marks=pytest.mark.slow), pytest.param(30, marks=pytest.mark.soak)])
@pytest.mark.timeout(1200)
def test_the_command_ends_well_many_times_in_a_row(shard_set: ShardSet, times: int) -> None:
    """Arrow's thread pools, once started, aborted one process in five to eight at its very end."""
    command = [sys.executable, "-m", "ray_jobs.cli", "shard", "inspect", str(shard_set.root), "--json"]
    done = [subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(times)]
    assert [one.returncode for one in done] == [0] * times, done[-1].stderr
    assert {json.loads(one.stdout)["num_samples"] for one in done} == {11}


def test_a_label_outside_the_classes_and_a_damaged_index_are_named(tmp_path: Path) -> None:
    wrong = make_shard_set(tmp_path / "wrong", make_samples(2), row_edits={"clip-0001": {"labels": [7]}})
    with pytest.raises(ShardSetDamageError, match=r"'label': expected labels of 0..2, found 7"):
        set_facts(wrong)
    damaged = make_shard_set(tmp_path / "damaged", make_samples(2))
    flip_byte(damaged.root / damaged.shards[0].index_name, 60)
    with pytest.raises(DataDamageError, match=r"ca2st-000000.index.parquet"):
        set_facts(damaged)


def test_clips_are_spread_over_the_shards_and_stills_are_the_stored_frames(shard_set: ShardSet) -> None:
    clips = read_spread_clips(shard_set, most=4)
    assert [clip.key for clip in clips] == ["clip-0001", "clip-0004", "clip-0006", "clip-0009"]
    first = make_samples(10)[1]
    stored = [base64.b64decode(still.partition(",")[2]) for still in clips[0].pictures.stills]
    assert stored == [first.frames()[int((still + 0.5) * 20 / 8)] for still in range(8)]
    assert len(read_spread_clips(shard_set, most=100)) == 11


def test_the_page_shows_sound_only_where_there_is_some_and_escapes_names(tmp_path: Path) -> None:
    spaces = (LabelSpace(name="label", classes=("<b>red", "green", "blue")),)
    samples = [FakeSample(key="loud", labels=(0,)), FakeSample(key="silent", labels=(2,), mel_rows=0)]
    shard_set = make_shard_set(tmp_path, samples, label_spaces=spaces)
    html = render_set_card(shard_set, set_facts(shard_set))
    assert "<b>red" not in html
    assert "&lt;b&gt;red" in html
    assert html.count('class="spectrum"') == 1
    assert html.count("no sound") == 1
    assert "1 of them without a sample" in html
    assert not re.search(r"""(?:src|href)=["'](?!data:)|url\(|@import""", html), "nothing is fetched"


def test_stills_of_a_video_codec_are_decoded(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", seconds=0.5)
    shard_set = video_shard_set(tmp_path / "shards", [path], "h264")
    (clip,) = read_spread_clips(shard_set, most=1)
    assert all(still.startswith("data:image/jpeg;base64,") for still in clip.pictures.stills)
    assert len(set(clip.pictures.stills)) > 1


def test_a_long_list_of_classes_shows_both_ends() -> None:
    commonest, rarest = class_ends({f"class {n:03d}": n for n in range(100)})
    assert (len(commonest), len(rarest)) == (15, 15)
    assert (commonest[0], rarest[-1]) == (("class 099", 99), ("class 000", 0))
    assert class_ends({"one": 1, "two": 2}) == ([("two", 2), ("one", 1)], [])


def test_the_page_of_a_long_list_says_how_many_classes_are_between(tmp_path: Path) -> None:
    spaces = (LabelSpace(name="label", classes=tuple(f"class {n:03d}" for n in range(100))),)
    samples = [FakeSample(key=f"clip-{n}", labels=(n // 2,)) for n in range(3)]
    shard_set = make_shard_set(tmp_path, samples, label_spaces=spaces)
    html = " ".join(render_set_card(shard_set, set_facts(shard_set)).split())
    assert "label <small>target</small>" in html
    assert "100 classes, 98 of them without a sample." in html
    assert "and 70 between; the rarest:" in html


def test_every_sample_is_in_one_bar_of_durations() -> None:
    assert sum(count for _, _, count in duration_bars((1.0, 1.5, 2.0, 9.0))) == 4
    assert duration_bars((2.0, 2.0)) == [(2.0, 3.0, 2)]


def test_sizes_are_told_in_words() -> None:
    assert [size_in_words(n) for n in (1, 1234, 5e6, 2e12)] == ["1 B", "1.23 kB", "5 MB", "2 TB"]


def test_the_command_prints_words_json_and_writes_the_page(shard_set: ShardSet, tmp_path: Path) -> None:
    page = tmp_path / "card.html"
    shown = CliRunner().invoke(app, ["shard", "inspect", str(shard_set.root), "--html", str(page)])
    assert shown.exit_code == 0, shown.exception
    assert "3 classes of 3 to 4 samples" in shown.stdout
    assert 'data-key="silent"' in page.read_text()
    facts = json.loads(CliRunner().invoke(app, ["shard", "inspect", str(shard_set.root), "--json"]).stdout)
    assert facts["num_samples"] == 11
    assert facts["classes"]["label"]["red"] == 4
    assert facts["duration_seconds"]["most"] == pytest.approx(50 / 30)


def test_a_damaged_clip_is_named_before_a_page_is_written(tmp_path: Path) -> None:
    shard_set = make_shard_set(tmp_path / "set", make_samples(1))
    shard = shard_set.root / shard_set.shards[0].name
    offset, size = members_of(shard)["clip-0000.mel.npy"]
    flip_byte(shard, offset + size // 2)
    done = CliRunner().invoke(app, ["shard", "inspect", str(shard_set.root), "--html", str(tmp_path / "card.html")])
    assert isinstance(done.exception, DataDamageError)
    assert "clip-0000" in str(done.exception)
    assert not (tmp_path / "card.html").exists()


def test_silence_is_told_apart_from_no_sound(tmp_path: Path) -> None:
    facts = set_facts(make_shard_set(tmp_path, make_samples(4), notes={"silent sound": 3}))
    assert facts_in_words(facts)["with sound"] == f"{facts.num_with_audio} of 4, 3 with silence alone"
    facts = set_facts(make_shard_set(tmp_path / "other", make_samples(4)))
    assert facts_in_words(facts)["with sound"] == f"{facts.num_with_audio} of 4"


def test_the_page_lists_what_was_found_and_what_was_done_about_it(tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    make_clip(media / "a.mp4", seconds=1, rotation=90)
    make_clip(media / "b.mp4", seconds=1, pixel_aspect=Fraction(4, 3))
    (media / "c.mp4").write_text("no video")
    rows = ["path,label,start,end", "a.mp4,x|y,0,5", "b.mp4,x,,", "c.mp4,x,,", "d.mp4,x,,"]
    annotations = write_lines(tmp_path / "list.csv", rows)
    one = RejectBudget(count=1)
    request = DatasetRequest(annotations=annotations, media=media, max_missing=one)
    source = read_dataset("csv", request)
    convert(source, tmp_path / "out", ConversionConfig(audio_policy="none", max_rejects=one))
    shard_set = read_shard_set(tmp_path / "out")
    quirks, num_read = read_quirks(shard_set)
    found = {quirk.kind: (quirk.count, quirk.done, quirk.examples) for quirk in quirks}
    keys = [sample_key(one.sample_id) for one in source.samples]
    assert num_read == 2
    assert found == {
        "labels that may be several": (1, "kept as it is", ("'x|y'",)),
        "samples without a media file": (1, "left out", ("list.csv:5",)),
        "shorter than annotated": (1, "clipped to the end of the video", (keys[0],)),
        "turned or mirrored by the display matrix": (1, "turned upright", (keys[0],)),
        "pixels that are not square": (1, "scaled to square pixels", (keys[1],)),
        "rejected: not_a_video": (1, "left out", ("c.mp4",)),
    }
    html = render_set_card(shard_set, set_facts(shard_set))
    assert "<code>list.csv:5</code>" in html
    assert str(tmp_path) not in html
    assert verify_shard_set(tmp_path / "out") == []


def test_the_page_says_where_nothing_unusual_was_found(tmp_path: Path) -> None:
    shard_set = make_shard_set(tmp_path, make_samples(2))
    html = render_set_card(shard_set, set_facts(shard_set))
    assert "Nothing unusual." in html


def test_the_facts_of_a_set_need_neither_torch_nor_pandas(shard_set: ShardSet) -> None:
    script = (
        "import sys; from ray_jobs.cli import app; "
        f"app(['shard', 'inspect', {str(shard_set.root)!r}], standalone_mode=False); "
        "print([name for name in ('torch', 'pandas', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_p3_an_index_with_empty_places_is_named(tmp_path: Path) -> None:
    shard_set = make_shard_set(tmp_path, make_samples(2), row_edits={"clip-0001": {"duration_seconds": None}})
    with pytest.raises(ShardSetDamageError, match="expected a duration_seconds in every row, found none in 1"):
        set_facts(shard_set)
