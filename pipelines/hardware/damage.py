"""Damaged clips before the decoders of a device, each in a process of its own with a time limit (row P15).

In training a damaged clip is stopped by its checksum, before any decoder. Here nothing stands before the decoder.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ca2st.spec import ClipSpec
from pipelines.hardware.clips import StoredClip
from pipelines.hardware.mp4_damage import DAMAGES

LEAST_PSNR_DB = 35.0
"""Decoded frames that lie nearer to the reference are right: decoders round, they do not show other pictures."""
Outcome = Literal["refused", "decoded", "concealed", "crashed", "hung"]
CHILD = "pipelines.hardware.damage_child"
_MOST_WORDS = 240


@dataclass(frozen=True, kw_only=True, slots=True)
class DamageTrial:
    """One damaged clip before one decoder."""

    codec: str
    damage: str
    """A name of `DAMAGES`."""
    outcome: Outcome
    """``decoded``: the reference decodes it too; ``concealed``: the reference refuses it, and pictures came out."""
    backend: str
    """What was tried; empty where its process did not live to tell."""
    psnr_db: float | None
    """Of what came out, to the reference's pictures of the same bytes, or (concealed) of the clip before the damage;
    None: nothing came out, or no difference."""
    words: str
    """The error, or how the process ended."""

    @property
    def is_sound(self) -> bool:
        """No crash, no hang, and no picture that is silently another than the reference's."""
        if self.damage == "none":
            return self.outcome == "decoded" and self._is_near
        return self.outcome == "refused" or (self.outcome in ("decoded", "concealed") and self._is_near)

    @property
    def _is_near(self) -> bool:
        return self.psnr_db is None or self.psnr_db >= LEAST_PSNR_DB


def try_damages(
    clip: StoredClip,
    spec: ClipSpec,
    folder: Path,
    *,
    device: str,
    damages: Sequence[str] = tuple(DAMAGES),
    seconds: float,
    at_once: int,
) -> list[DamageTrial]:
    """Every kind of damage to `clip`; a process may take `seconds`, its start included, `at_once` run together."""
    good = folder / f"{clip.codec}.mp4"
    good.write_bytes(clip.video.mp4)

    def one(damage: str) -> DamageTrial:
        bad = folder / f"{clip.codec}-{damage}.mp4"
        bad.write_bytes(DAMAGES[damage](clip.video.mp4))
        arguments = [device, clip.codec, str(good), str(bad), str(spec.num_frames), str(spec.crop_size)]
        return run_child(clip.codec, damage, [sys.executable, "-P", "-m", CHILD, *arguments], seconds=seconds)

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, damages))


def run_child(codec: str, damage: str, command: Sequence[str], *, seconds: float) -> DamageTrial:
    """What the process says, or how it ended without a word."""
    try:
        done = subprocess.run([*command], capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return _silent(codec, damage, "hung", f"no word within {seconds:g} s")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return _silent(codec, damage, "crashed", f"exit code {done.returncode}: {last[:_MOST_WORDS]}")
    said = json.loads(done.stdout.splitlines()[-1])
    return DamageTrial(codec=codec, damage=damage, **(said | {"words": said["words"][:_MOST_WORDS]}))


def _silent(codec: str, damage: str, outcome: Outcome, words: str) -> DamageTrial:
    return DamageTrial(codec=codec, damage=damage, outcome=outcome, backend="", psnr_db=None, words=words)
