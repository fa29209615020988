"""A picture of the synthetic world: a few clips as stills over time, with their spectrograms on the same time axis.

::

    PYTHONPATH=tests python -m benchmarks.contact_sheet sharding/synthetic/samples.png
"""

import argparse
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from ca2st.durable import write_bytes
from sharding.format.shard_set import AudioParameters
from sharding.synthetic.clips import draw_frames, sound_samples
from sharding.synthetic.config import DIFFICULTIES, RHYTHMS, SyntheticConfig
from sharding.synthetic.factors import Binding, binding_of, label_spaces, labels_of, object_shapes

_NUM_STILLS = 8
_SPECTROGRAM_HEIGHT = 56
_CAPTION_HEIGHT = 20
_SCORE_HEIGHT = 12
_MARGIN = 56
_GAP = 16
_LINE = 2
_FONT_SIZE = 12
_NUM_COLOURS = 160
_INK, _FAINT, _KEEPER, _PAPER = (30, 30, 30), (170, 170, 170), (200, 30, 60), (255, 255, 255)
_HEAT = ((10, 8, 40), (90, 25, 110), (190, 55, 85), (245, 145, 50), (252, 245, 180))
"""From silent to loud."""
_INDICES = ((7, 0), (16, 9), (17, 14))
"""Samples of the default sheet, chosen for variety: with independent factors and as a binding scene."""
_MEL_RANGE = (-13.0, 5.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SheetEntry:
    """One clip of a sheet."""

    config: SyntheticConfig
    split: str = "train"
    index: int = 0


def default_entries() -> tuple[SheetEntry, ...]:
    """Each difficulty once with independent factors and once as a binding scene, in turns."""
    return tuple(
        SheetEntry(config=SyntheticConfig(difficulty=name, binding=binding), index=index)
        for name, indices in zip(DIFFICULTIES, _INDICES, strict=True)
        for binding, index in zip((False, True), indices, strict=True)
    )


def contact_sheet(entries: tuple[SheetEntry, ...], *, num_columns: int = 2) -> bytes:
    """A PNG of the clips, row by row: caption, stills over time, rhythms of the objects, spectrogram."""
    tiles = [_tile(entry) for entry in entries]
    width = max(tile.width for tile in tiles)
    rows = [tiles[first : first + num_columns] for first in range(0, len(tiles), num_columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    size = (num_columns * (width + _GAP) + _GAP, sum(heights) + _GAP * (len(rows) + 1))
    sheet, top = Image.new("RGB", size, _PAPER), _GAP
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            sheet.paste(tile, (_GAP + column * (width + _GAP), top))
        top += height + _GAP
    data = io.BytesIO()
    sheet.quantize(_NUM_COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
        data, "PNG", optimize=True
    )
    return data.getvalue()


def caption(entry: SheetEntry) -> str:
    """The difficulty, and the names of what is seen and heard."""
    config = entry.config
    if config.binding:
        binding = binding_of(config, entry.split, entry.index)
        keeper = object_shapes(config)[binding.keeper]
        return f"binding, {config.difficulty}: the {keeper} keeps time with the sound ({RHYTHMS[binding.heard]})"
    spaces, labels = label_spaces(config), labels_of(config, entry.split, entry.index)
    names = [space.classes[label] for space, label in zip(spaces, labels, strict=True) if space.name != "holistic"]
    return f"holistic, {config.difficulty}: {', '.join(names)}"


def _tile(entry: SheetEntry) -> Image.Image:
    frames = draw_frames(entry.config, entry.split, entry.index)
    sound = sound_samples(entry.config, entry.split, entry.index, num_frames=len(frames))
    strip = Image.fromarray(_stills(frames))
    parts = [("seen", strip)]
    if entry.config.binding:
        binding = binding_of(entry.config, entry.split, entry.index)
        parts += _score(binding, object_shapes(entry.config), strip.width)
    parts.append(("heard", _spectrogram(sound, sample_rate_hz=entry.config.sample_rate_hz, width=strip.width)))
    height = _CAPTION_HEIGHT + sum(part.height + _LINE for _, part in parts)
    tile, top = Image.new("RGB", (_MARGIN + strip.width, height), _PAPER), _CAPTION_HEIGHT
    pen, font = ImageDraw.Draw(tile), ImageFont.load_default(_FONT_SIZE)
    pen.text((_MARGIN, 0), caption(entry), fill=_INK, font=font)
    for name, part in parts:
        pen.text((0, top + part.height // 2), name, fill=_INK, font=font, anchor="lm")
        tile.paste(part, (_MARGIN, top))
        top += part.height + _LINE
    return tile


def _stills(frames: UInt8[np.ndarray, "frames height width 3"]) -> UInt8[np.ndarray, "height wide 3"]:
    """The middle frames of equal parts of the clip, side by side."""
    chosen = [(2 * number + 1) * len(frames) // (2 * _NUM_STILLS) for number in range(_NUM_STILLS)]
    apart = np.pad(frames[chosen], ((0, 0), (0, 0), (0, _LINE), (0, 0)), constant_values=255)
    return np.concatenate(list(apart), axis=1)


def _spectrogram(sound: np.ndarray, *, sample_rate_hz: int, width: int) -> Image.Image:
    """The log-mel rows that the audio expert reads, time from left to right and low tones at the bottom."""
    from sharding.media.audio import log_mel

    mel = log_mel(sound, AudioParameters(policy="required", sample_rate_hz=sample_rate_hz)).astype(np.float32)
    low, high = _MEL_RANGE
    levels = np.clip((mel.T[::-1] - low) / (high - low), 0.0, 1.0)
    stops = np.linspace(0.0, 1.0, len(_HEAT))
    channels = [np.interp(levels, stops, [colour[channel] for colour in _HEAT]) for channel in range(3)]
    picture = Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))
    return picture.resize((width, _SPECTROGRAM_HEIGHT), Image.Resampling.BILINEAR)


def _score(binding: Binding, shapes: tuple[str, ...], width: int) -> list[tuple[str, Image.Image]]:
    """One line an object, filled in its beats; the keeper's in red."""
    lines = []
    for number, rhythm in enumerate(binding.rhythms):
        line = Image.new("RGB", (width, _SCORE_HEIGHT), _PAPER)
        pen, quarters = ImageDraw.Draw(line), RHYTHMS[rhythm]
        for quarter in (place for place, letter in enumerate(quarters) if letter == "x"):
            left, right = quarter * width // len(quarters), (quarter + 1) * width // len(quarters) - _LINE - 1
            pen.rectangle((left, 1, right, _SCORE_HEIGHT - 2), fill=_KEEPER if number == binding.keeper else _FAINT)
        lines.append((shapes[number], line))
    return lines


def main() -> None:
    """Write the sheet of `default_entries` to the path given."""
    parser = argparse.ArgumentParser(description="Write a picture of the synthetic world.")
    parser.add_argument("out", type=Path, help="The PNG to write.")
    write_bytes(parser.parse_args().out, contact_sheet(default_entries()))


if __name__ == "__main__":
    main()
