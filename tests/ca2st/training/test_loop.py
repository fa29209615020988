from pathlib import Path

import torch
from support.tiny_training import TinyEvaluation, TinyModel, TinySource, fresh_accelerator, tiny_settings

from ca2st.training.journal import run_sequence
from ca2st.training.loop import train


def test_smoke(tmp_path: Path) -> None:
    s = tiny_settings(tmp_path)
    r = train(TinyModel(), TinySource(), accelerator=fresh_accelerator(s), settings=s, validation=TinyEvaluation())
    print(r)
    print((tmp_path / "journal.jsonl").read_text())
    for p in sorted(tmp_path.rglob("*")):
        print(p)
    print(next((tmp_path / "checkpoints").glob("*/COMPLETE.json")).read_text())
