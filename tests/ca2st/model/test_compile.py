"""torch.compile, in a process of its own: the shape checks of the test run are Python that it cannot trace."""

import subprocess
import sys

import pytest

SCRIPT = """
import torch
from ca2st.model.build import build_model
from ca2st.model.config import ModelConfig, TargetSpec
from ca2st.spec import ClipSpec

clip = ClipSpec(num_frames=4, crop_size=32, mel_rows=48)
config = ModelConfig(kind="ca2st", dim=32, depth=2, num_heads=2, drop_path_rate=0.2)
model = build_model(config, clip, (TargetSpec(name="label", num_classes=5),)).eval()
inputs = torch.randn(2, 3, 4, 32, 32), torch.randn(2, 48, 128), torch.rand(2, 3, 2)
eager = model(*inputs).logits["label"]
compiled = torch.compile(model, fullgraph=True, backend="eager")
torch.testing.assert_close(compiled(*inputs).logits["label"], eager)
compiled.train()(*inputs).logits["label"].sum().backward()
"""


@pytest.mark.slow
def test_the_model_is_traced_as_one_graph_in_evaluation_and_in_training():
    """`fullgraph` makes a graph break an error."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
