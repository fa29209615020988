"""The header of an expert file: which encoder it is, the clip its tables were made for, and where it comes from."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from ca2st.model.config import EncoderName, ModelConfig
from ca2st.spec import ClipSpec
from ca2st.weights.errors import WeightsDamageError
from ca2st.weights.hub import Origin
from ca2st.weights.tensor_file import read_tensor_file

EXPERT_KEY = "ca2st_expert"
"""Metadata key of an expert file. Tensors are loaded by names and shapes; the header adds what no shape tells."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertDescription:
    """Facts about an imported expert."""

    encoder: EncoderName
    """What it is."""
    layout: str
    """Family of names that its source had."""
    config: ModelConfig
    """Width, depth and heads; of the rest nothing is written."""
    clip: ClipSpec
    """What its position tables were made for: crop_size (CLIP, VideoMAE), num_frames (VideoMAE), mel_rows (AST)."""
    source_sha256: str
    """Of the file it was made from."""
    origin: Origin
    """Where that file came from."""

    def metadata(self) -> dict[str, str]:
        """For the header of a safetensors file."""
        told = {
            "encoder": self.encoder,
            "layout": self.layout,
            "dim": self.config.dim,
            "depth": self.config.depth,
            "num_heads": self.config.num_heads,
            "clip": asdict(self.clip),
            "source_sha256": self.source_sha256,
        }
        come_from = {name: value for name, value in asdict(self.origin).items() if value}
        return {EXPERT_KEY: json.dumps(told | come_from, sort_keys=True)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertFile:
    """An expert's weights, and the clip they were made for where the file says so."""

    path: Path
    """Where it was read."""
    tensors: dict[str, Tensor] = field(repr=False)
    """By our names, on the CPU."""
    made_for: ClipSpec | None
    """None: a file without a header, as a run's own expert store keeps them."""


def read_expert_file(path: Path) -> ExpertFile:
    """Read an expert that `ca2st weights import` or a run wrote.

    Raises:
        UserInputError: there is no such file.
        WeightsDamageError: the file or its header cannot be read.
    """
    file = read_tensor_file(path)
    return ExpertFile(path=path, tensors=file.tensors, made_for=_clip_of(file.metadata, where=str(path)))


def _clip_of(metadata: Mapping[str, str], *, where: str) -> ClipSpec | None:
    if EXPERT_KEY not in metadata:
        return None
    try:
        return ClipSpec(**json.loads(metadata[EXPERT_KEY])["clip"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsDamageError(f"{where}: cannot read the metadata key {EXPERT_KEY!r}: {error!r}") from error
