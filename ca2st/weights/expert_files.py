"""Experts as files: written, read, kept by hash.

The header of an expert file: which encoder it is, the clip its tables were made for, and where it comes from.

The expert store: frozen experts are kept once, under the hash of their bytes, and checked whenever they are read.

An expert's own weights, taken out of a model or put into one.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from ca2st.durable import NO_FAULTS, FaultPoints, write_bytes
from ca2st.errors import UserInputError
from ca2st.model.config import EncoderName, ExpertName, ModelConfig, encoder_of
from ca2st.model.network import HolisticModel
from ca2st.spec import ClipSpec
from ca2st.weights.errors import WeightsDamageError, WeightsMismatchError
from ca2st.weights.hub import Origin
from ca2st.weights.positions import ExpertPlace, fit_positions
from ca2st.weights.tensor_files import LoadReport, load_strictly, read_tensor_file

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


@dataclass(frozen=True, slots=True)
class ExpertStore:
    """A folder of files `<sha256>.safetensors`."""

    folder: Path
    """Usually `experts` beside the checkpoints; made when the first expert is put."""

    def put(self, state: Mapping[str, Tensor], *, faults: FaultPoints = NO_FAULTS) -> str:
        """Keep the tensors and return their sha256 (of the file's bytes). Equal tensors are kept once.

        Raises:
            EnvironmentFault: the folder cannot be written.
        """
        data = save({name: state[name].detach().cpu().contiguous() for name in sorted(state)})
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.path(sha256)
        if not (path.is_file() and _hash_of(path) == sha256):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_bytes(path, data, faults=faults, point="expert")
        return sha256

    def get(self, sha256: str) -> dict[str, Tensor]:
        """The tensors that were put, on the CPU.

        Raises:
            UserInputError: the store has no such expert.
            WeightsDamageError: the file's bytes are not those that were put.
        """
        path = self.path(sha256)
        if not path.is_file():
            raise UserInputError(
                f"expected an expert at {path}, found none; copy the experts folder with the checkpoints"
            )
        data = path.read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise WeightsDamageError(
                f"{path}: expected sha256 {sha256}, found {found}: the file is damaged; restore it from a copy"
            )
        return load(data)

    def path(self, sha256: str) -> Path:
        """Where the expert of this hash is kept."""
        return self.folder / f"{sha256}.safetensors"


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expert_state(model: HolisticModel, name: ExpertName) -> dict[str, Tensor]:
    """Weights of the expert `name`, without anything that is added to it: copies on the CPU.

    Raises:
        WeightsMismatchError: the model has no such expert.
    """
    _check_expert(model, name)
    state = model.experts[name].state_dict()
    return {key: tensor.detach().cpu().clone() for key, tensor in state.items()}


def load_expert(
    model: HolisticModel,
    name: ExpertName,
    state: Mapping[str, Tensor],
    *,
    where: str = "",
    made_for: ClipSpec | None = None,
) -> LoadReport:
    """Put the weights of `expert_state` into the expert `name` of `model`; `where` names their source in messages.

    CLIP's positions for crops of `config.pretrained_crop_size` pixels are interpolated to the model's crop. `made_for`
    is the clip that an expert file says it was made for.

    Raises:
        WeightsMismatchError: the model has no such expert, the weights are not exactly its own, or their position
            tables are for another clip than the model's and its settings do not say so.
    """
    _check_expert(model, name)
    where = where or f"{name} expert"
    expert = model.experts[name]
    if state.keys() == expert.state_dict().keys():  # else it is another encoder, and the strict loader lists the names
        place = ExpertPlace(encoder=encoder_of(model.config, name), config=model.config, clip=model.clip)
        state = fit_positions(state, place, made_for=made_for, where=where)
    return load_strictly(expert, state, where=where)


def load_expert_file(model: HolisticModel, name: ExpertName, path: Path) -> LoadReport:
    """Put the expert that `ca2st weights import` or a run wrote into the expert `name` of `model`.

    Raises:
        UserInputError: there is no such file, or its weights do not fit, as `load_expert`.
        WeightsDamageError: the file cannot be read.
    """
    file = read_expert_file(path)
    return load_expert(model, name, file.tensors, where=str(path), made_for=file.made_for)


def _check_expert(model: HolisticModel, name: ExpertName) -> None:
    if name not in model.experts:
        raise WeightsMismatchError(
            f"expert {name!r}: expected one of {', '.join(model.experts)} for a {model.config.kind} model"
        )
