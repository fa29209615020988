"""The files that a benchmark draws: the same every time, as heavy as filmed ones, never half written."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from ca2st.errors import UserInputError
from pipelines.benchmark.clips import DrawnClips, draw_clips, drawn_frames

TINY = DrawnClips(count=2, width=64, height=48, num_frames=6)


def test_the_same_settings_draw_the_same_pictures_and_each_clip_its_own() -> None:
    first, again, other = ([*drawn_frames(TINY, seed=seed)] for seed in (1, 1, 2))
    assert len(first) == 6
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    assert not np.array_equal(first[0], first[-1])


def test_a_frame_weighs_about_what_a_filmed_one_does() -> None:
    frames = list(drawn_frames(DrawnClips(count=1, num_frames=3), seed=0))
    sizes = []
    for frame in frames:
        sink = io.BytesIO()
        Image.fromarray(frame).save(sink, "JPEG", quality=80)
        sizes.append(len(sink.getvalue()))
    assert 9_000 < np.mean(sizes) < 25_000


def test_files_are_h264_with_sound_and_are_drawn_once(tmp_path: Path) -> None:
    heard: list[int] = []
    paths = draw_clips(TINY, tmp_path / "sources", update=heard.append)
    assert heard == [1, 2]
    assert sorted(tmp_path.joinpath("sources").iterdir()) == sorted(paths)
    with av.open(str(paths[0])) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert len(container.streams.audio) == 1
        assert sum(1 for _ in container.decode(video=0)) == 6
    before = paths[0].stat().st_mtime_ns
    assert draw_clips(TINY, tmp_path / "sources") == paths
    assert paths[0].stat().st_mtime_ns == before


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(UserInputError, match="expected counts >= 1 and at least 16 x 16 pixels"):
        DrawnClips(count=0)
