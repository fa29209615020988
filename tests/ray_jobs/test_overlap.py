"""``ca2st shard overlap``: the same video in two sets, by its names and by what it shows."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_jobs.overlap import counts, difference_hash, find_overlaps
from sharding.conversion import convert
from sharding.format.shard_set import ShardSet, read_shard_set
from sharding.settings import ConversionConfig
from support.media import Sound, make_clip
from support.shards import sample, source_list
from support.tiny_runs import ca2st


def scene(seed: int) -> Callable[[int, int, int], np.ndarray]:
    """Coarse patches of any grey, as many at any size, that fade slowly over time."""
    patches = np.random.default_rng(seed).integers(0, 200, (6, 6)).astype(np.uint8)

    def draw(number: int, width: int, height: int) -> np.ndarray:
        grey = np.asarray(Image.fromarray(patches + np.uint8(number)).resize((width, height), Image.Resampling.BICUBIC))
        return np.stack([grey] * 3, axis=-1)

    return draw


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardSet, ShardSet]:
    """Scenes 1, 2, 3 and a black one, against scene 2 encoded otherwise, 4, 5, a black one, and a file named alike."""
    root = tmp_path_factory.mktemp("overlap")

    def clip(name: str, seed: int | None, **options: object) -> Path:
        (root / name).parent.mkdir(exist_ok=True)
        draw = scene(seed) if seed is not None else (lambda _n, width, height: np.zeros((height, width, 3), np.uint8))
        sound = Sound(seconds=0.5, hz=200.0 + 400 * (seed or 0))
        return make_clip(root / name, seconds=0.5, draw=draw, sound=sound, **({"size": (96, 64)} | options))

    first = [clip(f"a/{n}.mp4", n) for n in (1, 2, 3)] + [clip("a/black.mp4", None)]
    again = clip("b/again.mkv", 2, size=(192, 128), codec="mpeg4", fps=25)
    second = [again, clip("b/4.mp4", 4), clip("b/5.mp4", 5), clip("b/dark.mp4", None), clip("b/3.mp4", 6)]
    for name, files, options in (("first", first, {}), ("second", second, {"codec": "h264", "short_side": 48})):
        source = source_list([sample(file, name=f"{name}/{file.name}") for file in files])
        convert(source, root / name, ConversionConfig(workers=1, **options))
    return read_shard_set(root / "first"), read_shard_set(root / "second")


def test_a_video_that_was_encoded_and_scaled_otherwise_is_found_by_its_content(
    sets: tuple[ShardSet, ShardSet],
) -> None:
    found = {(one.by, one.first, one.second) for one in find_overlaps(*sets, content=True)}
    assert found == {("source", "first/3.mp4", "second/3.mp4"), ("content", "first/2.mp4", "second/again.mkv")}


def test_a_set_is_itself_by_its_ids(sets: tuple[ShardSet, ShardSet]) -> None:
    assert counts(find_overlaps(sets[0], sets[0])) == {"id": 4, "source": 0, "content": 0}


def test_the_hash_of_a_ramp_is_one_in_every_bit_and_of_one_colour_none() -> None:
    ramp = Image.fromarray(np.tile(np.arange(90, dtype=np.uint8), (80, 1)))
    flat = Image.fromarray(np.full((80, 90), 77, np.uint8))
    steps = Image.fromarray(np.tile(np.repeat(np.array([0, 9, 0, 9, 0, 9, 0, 9, 0], np.uint8), 10), (80, 1)))
    assert difference_hash(ramp) == difference_hash(flat) == 0  # neither tells one video from another
    assert f"{difference_hash(steps):064b}" == "10" * 32


@pytest.mark.slow
def test_the_command_lists_pairs_and_ends_with_3(sets: tuple[ShardSet, ShardSet]) -> None:
    first, second = (shard_set.root for shard_set in sets)
    done = ca2st("shard", "overlap", first, second, "--content", "--json")
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["counts"] == {"id": 0, "source": 1, "content": 1}
    done = ca2st("shard", "overlap", first, second)
    assert (done.returncode, done.stdout) == (3, "source: first/3.mp4 = second/3.mp4\n")
