"""Damaged clips before a decoder (P15): the kinds of damage, what counts as sound, and processes that crash or hang."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import damage
from benchmarks.damage import DAMAGES, DamageTrial, run_child, try_damages
from benchmarks.parity import StoredClip, stored_clips
from ca2st.errors import CA2STError
from ca2st.spec import ClipSpec
from pipelines.benchmark.clips import DrawnClips
from pipelines.storage.samples import video_facts
from sharding.media.codecs import STORED_CODECS

SPEC = ClipSpec(num_frames=4, crop_size=32, mel_rows=16)
CPU = torch.device("cpu")
SHOWN_BY_DALI = {"bad_stco"}
"""Frames whose places lie behind the end of the file come out of DALI's CPU decoder as some picture, without an error:
only the checksum stands before it."""
REFUSED_BY_THE_BOXES = {"zero_bytes", "text", "no_moov", "half", "huge_picture", "encrypted"}


@pytest.fixture(scope="module")
def clip() -> StoredClip:
    (one,) = stored_clips("vp9", DrawnClips(count=1, width=80, height=64, num_frames=20), num_gop_frames=8, threads=1)
    return one


def trial(**values: object) -> DamageTrial:
    fields = {"codec": "vp9", "damage": "half", "outcome": "refused", "backend": "dali", "psnr_db": None, "words": ""}
    return DamageTrial(**(fields | values))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in DAMAGES if name != "none"])
def test_p15_every_kind_of_damage_changes_the_bytes_and_only_boxes_where_it_says_so(
    clip: StoredClip, name: str
) -> None:
    good = clip.video.mp4
    bad = DAMAGES[name](good)
    assert bad != good
    assert DAMAGES[name](good) == bad
    try:
        video_facts(bad, STORED_CODECS["vp9"], where="x")
        refused = False
    except CA2STError:
        refused = True
    assert refused == (name in REFUSED_BY_THE_BOXES)


@pytest.mark.parametrize("name", DAMAGES)
def test_p15_dali_on_the_cpu_takes_every_kind_but_one_without_showing_other_pictures(
    clip: StoredClip, name: str
) -> None:
    good = clip.video.mp4
    said = damage.tried(CPU, "vp9", good, DAMAGES[name](good), SPEC)
    found = DamageTrial(codec="vp9", damage=name, **said)
    assert found.backend == "dali"
    assert found.is_sound or name in SHOWN_BY_DALI, found  # it shows that kind on most machines, not on all
    assert found.outcome != "decoded" or name in ("none", "bit_flips")


@pytest.mark.parametrize(
    ("values", "is_sound"),
    [
        ({}, True),
        ({"outcome": "crashed"}, False),
        ({"outcome": "hung"}, False),
        ({"outcome": "decoded"}, True),
        ({"outcome": "decoded", "psnr_db": 36.0}, True),
        ({"outcome": "decoded", "psnr_db": 34.0}, False),
        ({"outcome": "concealed", "psnr_db": 6.0}, False),
        ({"outcome": "concealed", "psnr_db": 48.0}, True),
        ({"damage": "none", "outcome": "refused"}, False),
        ({"damage": "none", "outcome": "decoded", "psnr_db": 40.0}, True),
    ],
)
def test_p15_sound_is_no_crash_no_hang_and_no_other_picture_in_silence(
    values: dict[str, object], is_sound: bool
) -> None:
    assert trial(**values).is_sound is is_sound


def test_p15_a_decoder_that_crashes_is_told_by_its_exit_code() -> None:
    command = [
        sys.executable,
        "-c",
        "import os, sys; sys.stderr.write('last words\\n'); sys.stderr.flush(); os.abort()",
    ]
    found = run_child("h264", "half", command, seconds=20.0)
    assert (found.outcome, found.words, found.is_sound) == ("crashed", "exit code -6: last words", False)


def test_p15_a_decoder_that_hangs_is_ended_in_time() -> None:
    found = run_child("h264", "half", [sys.executable, "-c", "import time; time.sleep(60)"], seconds=0.5)
    assert (found.outcome, found.words, found.is_sound) == ("hung", "no word within 0.5 s", False)


def test_what_a_process_says_is_believed() -> None:
    said = {"outcome": "refused", "backend": "dali-gpu", "psnr_db": None, "words": "w" * 999}
    found = run_child(
        "h264", "half", [sys.executable, "-c", f"print('noise'); print({json.dumps(said)!r})"], seconds=20.0
    )
    assert found == trial(codec="h264", backend="dali-gpu", words="w" * 240)


def test_each_kind_has_its_own_process_with_the_clip_before_and_after(
    clip: StoredClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def note(codec: str, kind: str, command: list[str], *, seconds: float) -> DamageTrial:
        commands.append(command)
        return trial(codec=codec, damage=kind)

    monkeypatch.setattr(damage, "run_child", note)
    found = try_damages(clip, SPEC, tmp_path, device="cuda", damages=("half", "text"), seconds=3.0, at_once=1)
    assert [one.damage for one in found] == ["half", "text"]
    for kind, command in zip(("half", "text"), commands, strict=True):
        assert command[1:5] == ["-P", damage.__file__, "cuda", "vp9"]
        assert Path(command[5]).read_bytes() == clip.video.mp4
        assert Path(command[6]).read_bytes() == DAMAGES[kind](clip.video.mp4)
        assert command[7:] == ["4", "32"]


def test_the_process_reads_its_arguments(clip: StoredClip, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.mp4", tmp_path / "bad.mp4"
    good.write_bytes(clip.video.mp4)
    bad.write_bytes(b"")
    damage.main(["cpu", "vp9", str(good), str(bad), "4", "32"])
    said = json.loads(capsys.readouterr().out)
    assert said["outcome"] == "refused"
    assert replace(trial(), **said).is_sound
