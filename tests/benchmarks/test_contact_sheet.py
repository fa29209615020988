"""The picture of the world: made by its command, of the size that is committed, with what it shows in words."""

import io
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.contact_sheet import SheetEntry, caption, contact_sheet, default_entries, main
from sharding.synthetic.clips import draw_frames
from sharding.synthetic.config import DIFFICULTIES, Difficulty, SyntheticConfig

FOLDER = Path(__file__).parents[2] / "sharding" / "synthetic"


def test_a_sheet_shows_every_difficulty_with_factors_and_with_binding() -> None:
    shown = {(entry.config.difficulty, entry.config.binding) for entry in default_entries()}
    assert shown == {(name, binding) for name in DIFFICULTIES for binding in (False, True)}


def test_captions_name_what_is_seen_and_heard() -> None:
    easy = SheetEntry(config=SyntheticConfig(), index=7)
    assert caption(easy) == "holistic, easy: triangle, down, 311_hz"
    binding = SheetEntry(config=SyntheticConfig(binding=True), index=3)
    assert caption(binding) == "binding, easy: the square keeps time with the sound (x..x)"


def test_the_stills_of_a_sheet_are_frames_of_the_clip() -> None:
    entry = SheetEntry(config=SyntheticConfig(), index=7)
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet((entry,)))).convert("RGB")).astype(float)
    frame = draw_frames(entry.config, "train", 7)[1].astype(float)  # the middle of the first eighth of 18 frames
    windows = np.lib.stride_tricks.sliding_window_view(sheet[:110, 60:140], (16, 16), axis=(0, 1))
    looked_for = frame[20:36, 24:40].transpose(2, 0, 1)
    assert np.abs(windows - looked_for).mean(axis=(2, 3, 4)).min() < 12.0  # palette and all


def test_the_committed_picture_is_that_of_the_command_and_small(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["contact_sheet", str(tmp_path / "samples.png")])
    main()
    with Image.open(tmp_path / "samples.png") as made, Image.open(FOLDER / "samples.png") as committed:
        assert made.size == committed.size
        difference = np.abs(np.asarray(made.convert("L")).astype(float) - np.asarray(committed.convert("L")))
    assert difference.mean() < 1.0
    assert (FOLDER / "samples.png").stat().st_size <= 200_000


def test_the_page_shows_the_picture_and_names_every_setting_of_a_difficulty() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "](samples.png)" in page
    assert [setting.name for setting in fields(Difficulty) if f"`{setting.name}`" not in page] == []


def test_no_place_for_the_picture_is_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["contact_sheet"])
    with pytest.raises(SystemExit):
        main()
    assert "out" in capsys.readouterr().err
