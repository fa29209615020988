"""Expert files, and `ca2st weights import`: a checkpoint that others wrote becomes a file of ours, or nothing does.

`imported_expert` imports the public experts that recipes name, once: a folder of files under the hash of their bytes.
`<key>.json` says which file a name became, and of which commit of its repository; as long as it is there the name
means that file, with or without a network. Removing it fetches anew.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from ca2st.checked_json import canonical_json
from ca2st.durable import NO_FAULTS, FaultPoints, unwritable, write_bytes
from ca2st.errors import EnvironmentFault, UserInputError
from ca2st.model.config import EXPERTS, EncoderName, ExpertName, ModelConfig, ModelKind, check_clip, encoder_of
from ca2st.model.experts import build_expert
from ca2st.model.network import HolisticModel
from ca2st.model.tokens import audio_patches
from ca2st.spec import ClipSpec
from ca2st.weights import model_file, tensor_files
from ca2st.weights.foreign import TIMEOUT_SECONDS, ForeignFile, read_foreign_file
from ca2st.weights.hub import HubAccess, Origin, check_origin, configs_beside, fetch, with_told
from ca2st.weights.layouts import COUNTERS, LAYOUTS_OF_ENCODER, bare_names, common_prefix, translate
from ca2st.weights.positions import fit_audio_positions, fit_positions
from ca2st.weights.published import load_published

EXPERT_KEY = "ca2st_expert"
"""Metadata key of an expert file. Tensors are loaded by names and shapes; the header adds what no shape tells."""


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
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise unwritable(self.folder, error) from error
            write_bytes(path, data, faults=faults, point="expert")
        return sha256

    def get(self, sha256: str) -> dict[str, Tensor]:
        """Return the tensors that were put, on the CPU.

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
            raise tensor_files.WeightsDamageError(
                f"{path}: expected sha256 {sha256}, found {found}: the file is damaged; restore it from a copy"
            )
        return load(data)

    def path(self, sha256: str) -> Path:
        """Return where the expert of this hash is kept."""
        return self.folder / f"{sha256}.safetensors"


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expert_state(model: HolisticModel, name: ExpertName) -> dict[str, Tensor]:
    """Return weights of the expert `name`, without anything that is added to it: copies on the CPU.

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
) -> tensor_files.LoadReport:
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
        encoder = encoder_of(model.config, name)
        state = fit_positions(state, encoder, config=model.config, clip=model.clip, made_for=made_for, where=where)
    return tensor_files.load_strictly(expert, state, where=where)


def load_expert_file(model: HolisticModel, name: ExpertName, path: Path) -> tensor_files.LoadReport:
    """Put the expert that `ca2st weights import` or a run wrote into the expert `name` of `model`.

    Raises:
        UserInputError: there is no such file, or its weights do not fit, as `load_expert`.
        WeightsDamageError: the file or its header cannot be read.
    """
    file = tensor_files.read_tensor_file(path)
    made_for = None  # a file without a header, as a run's own expert store keeps them
    if EXPERT_KEY in file.metadata:
        try:
            made_for = ClipSpec(**json.loads(file.metadata[EXPERT_KEY])["clip"])
        except (KeyError, TypeError, ValueError) as error:
            raise tensor_files.WeightsDamageError(
                f"{path}: cannot read the metadata key {EXPERT_KEY!r}: {error!r}"
            ) from error
    return load_expert(model, name, file.tensors, where=str(path), made_for=made_for)


def _check_expert(model: HolisticModel, name: ExpertName) -> None:
    if name not in model.experts:
        raise tensor_files.WeightsMismatchError(
            f"expert {name!r}: expected one of {', '.join(model.experts)} for a {model.config.kind} model"
        )


ReleasedKind = Literal["cast", "cava", "ca2st"]
ImportKind = EncoderName | ReleasedKind


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions:
    """What the caller may decide."""

    allow_missing: tuple[str, ...] = ()
    """Patterns of our tensor names that the file need not have; they get the value a new model starts with."""
    sizes: model_file.UnwrittenSizes = field(default_factory=model_file.UnwrittenSizes)
    timeout_seconds: float = TIMEOUT_SECONDS
    """Wall time of reading a file that needs a child process."""
    origin: Origin | None = None
    """Where the file comes from; None: from its path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportReport:
    """What became of every tensor."""

    kind: ImportKind
    layout: str
    container: str
    wrapper: str
    """The key that the weights were under, keys within keys joined by dots; or empty."""
    model: dict[str, int]
    """Width, depth, heads, patch size, and the sizes of the clip that tables depend on."""
    loaded: tuple[str, ...]
    """Names of the file that went into the model."""
    missing: tuple[str, ...]
    """Names that were not given, and that the caller allowed to be missing."""
    unexpected: tuple[str, ...]
    """Names of the file that were left aside: known to be no part of the model. Unknown ones are an error."""
    checksums: dict[str, str]
    """sha256 of each written tensor's bytes, by our names."""
    origin: Origin
    """Where the file that was read comes from: a path, or a repository with its commit."""
    source_sha256: str
    """Of the file that was read."""
    sha256: str
    out: Path


class _Imported(NamedTuple):
    """A loaded module on its way to a file."""

    module: nn.Module
    config: ModelConfig
    clip: ClipSpec
    layout: str
    report: tensor_files.LoadReport
    metadata: dict[str, str]


def import_weights(path: Path, out: Path, *, kind: ImportKind, options: ImportOptions | None = None) -> ImportReport:
    """Read the checkpoint `path` of a known layout and write it as `out`, an expert file or a whole model.

    Raises:
        UserInputError: an unknown layout, a file that asks for more than its tensors, tensors that are missing,
            unknown or of another shape. Nothing is written.
        WeightsDamageError: the file is not whole, or holds values that are not finite. Nothing is written.
        EnvironmentFault: the output cannot be written.
    """
    tensor_files.check_writable_name(out, source=path)
    options = options or ImportOptions()
    file = read_foreign_file(path, timeout_seconds=options.timeout_seconds)
    origin = options.origin or with_told(Origin(source=file.path.name), configs_beside(file.path))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind in get_args(ReleasedKind):
            imported = _import_released(cast(ReleasedKind, kind), file, options)
        else:
            imported = _import_expert(cast(EncoderName, kind), file, options, origin)
    state = imported.module.state_dict()
    if broken := [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]:
        raise tensor_files.WeightsDamageError(
            f"{path}: expected finite float32 values, found NaN or infinity in {len(broken)} tensors: "
            f"{', '.join(broken[:8])}; fetch the file again"
        )
    sha256 = tensor_files.write_tensor_file(out, state, metadata=imported.metadata)
    return ImportReport(
        kind=kind,
        layout=imported.layout,
        container=file.container,
        wrapper=file.wrapper,
        model=_sizes_told(imported),
        loaded=imported.report.loaded,
        missing=imported.report.missing,
        unexpected=imported.report.unexpected,
        checksums={name: tensor_files.checksum(tensor) for name, tensor in sorted(state.items())},
        origin=origin,
        source_sha256=file.sha256,
        sha256=sha256,
        out=out,
    )


def _import_expert(encoder: EncoderName, file: ForeignFile, options: ImportOptions, origin: Origin) -> _Imported:
    where = str(file.path)
    check_origin(origin, encoder)
    translation = translate(file.tensors, LAYOUTS_OF_ENCODER[encoder], where=where)
    config, clip = model_file.expert_sizes(encoder, translation.tensors, options.sizes, where=where)
    check_clip(config, clip)
    module = build_expert(config.kind, config, clip)
    own = module.state_dict()
    tensors = {
        name: tensor_files.without_leading_ones(tensor, own[name].ndim) if name in own else tensor
        for name, tensor in translation.tensors.items()
    }
    if encoder == "ast" and "positions" in tensors and tensors["positions"].ndim == 2:
        rows, columns = audio_patches(config, clip)
        tensors["positions"] = fit_audio_positions(tensors["positions"], rows=rows, columns=columns, where=where)
    loaded = tensor_files.load_strictly(module, tensors, where=where, allow_missing=options.allow_missing)
    report = tensor_files.LoadReport(loaded=translation.used, missing=loaded.missing, unexpected=translation.ignored)
    told = {
        "encoder": encoder,
        "layout": translation.layout.name,
        "dim": config.dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "clip": asdict(clip),
        "source_sha256": file.sha256,
    }
    told |= {name: value for name, value in asdict(origin).items() if value}
    metadata = {EXPERT_KEY: json.dumps(told, sort_keys=True)}
    return _Imported(module, config, clip, translation.layout.name, report, metadata)


def _import_released(kind: ReleasedKind, file: ForeignFile, options: ImportOptions) -> _Imported:
    where = str(file.path)
    bare = bare_names(file.tensors, where=where)
    prefix = common_prefix(bare)
    tensors = {name.removeprefix(prefix): file.tensors[theirs] for name, theirs in bare.items() if name not in COUNTERS}
    counters = [name for name in bare if name in COUNTERS]
    ours = any(name.startswith("experts.") for name in tensors)
    description = _description(kind, file, tensors, options, ours=ours)
    model, report = model_file.build_described(
        description,
        tensors,
        where=where,
        load=tensor_files.load_strictly if ours else load_published,
        allow_missing=options.allow_missing,
    )
    layout = "ca2st" if ours else f"released {kind.upper()}"
    report = replace(report, unexpected=(*report.unexpected, *counters))
    return _Imported(model, description.model, description.clip, layout, report, description.metadata())


def _description(
    kind: ModelKind, file: ForeignFile, tensors: Mapping[str, Tensor], options: ImportOptions, *, ours: bool
) -> model_file.ModelDescription:
    """Return what our exports say about themselves, or what shapes tell about files of others."""
    where = str(file.path)
    written = model_file.read_description(file.metadata, where=where)
    if written is None and ours:
        raise tensor_files.WeightsMismatchError(
            f"{where}: expected our names with the model's description, found none in its header"
        )
    if written is None:
        return model_file.released_sizes(kind, tensors, options.sizes, where=where)
    asked = {name: value for name, value in asdict(options.sizes).items() if name != "target"}
    has = asdict(written.model) | asdict(written.clip)
    wrong = [f"{name} {value} (it has {has[name]})" for name, value in asked.items() if value not in (None, has[name])]
    if written.model.kind != kind:
        wrong.append(f"--kind {kind} (it is {written.model.kind})")
    if wrong:
        raise tensor_files.WeightsMismatchError(
            f"{where}: expected the sizes that the file names, found {', '.join(wrong)}"
        )
    return written


def _sizes_told(imported: _Imported) -> dict[str, int]:
    """Return what the written tensors fit; sizes of the clip only where a table depends on them."""
    config, clip = imported.config, imported.clip
    if config.kind == "spatial" and config.spatial_encoder == "resnet50":
        return {}
    sizes = {"dim": config.dim, "depth": config.depth, "num_heads": config.num_heads, "patch_size": config.patch_size}
    if config.kind in ("cast", "cava", "ca2st", "temporal"):
        sizes |= {"num_frames": clip.num_frames}
    if config.kind != "audio":
        sizes |= {"crop_size": clip.crop_size}
    if "audio" in EXPERTS[config.kind]:
        sizes |= {"mel_rows": clip.mel_rows}
    return sizes


def imported_expert(
    folder: Path, name: str, *, encoder: EncoderName, sizes: model_file.UnwrittenSizes, access: HubAccess
) -> Path:
    """Return the file of the public checkpoint `name`, fetched and imported the first time it is asked for.

    `folder` is usually `imported` beside the runs; it is made when the first name is imported.

    Raises:
        UserInputError: an unknown name, or weights that are not of this encoder.
        EnvironmentFault: the hub cannot be reached, or the folder not be written.
        WeightsDamageError: a kept file is not what was written.
    """
    told = {"source": name, "encoder": encoder, "sizes": asdict(sizes)}
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    note = folder / f"{key}.json"
    if note.is_file():
        try:
            kept = folder / f"{json.loads(note.read_text())['sha256']}.safetensors"
        except (KeyError, TypeError, ValueError) as error:
            raise tensor_files.WeightsDamageError(
                f"{note}: cannot read it ({error!r}); remove it to import anew"
            ) from error
        if kept.is_file():
            if (found := _hash_of(kept)) != kept.stem:
                raise tensor_files.WeightsDamageError(
                    f"{kept}: expected that sha256, found {found}; remove it to import anew"
                )
            return kept
    fetched, origin = fetch(name, access)
    new = folder / f".{key}.{os.getpid()}.safetensors"
    report = import_weights(fetched, new, kind=encoder, options=ImportOptions(sizes=sizes, origin=origin))
    path = folder / f"{report.sha256}.safetensors"
    try:
        new.replace(path)
    except OSError as error:
        raise EnvironmentFault(f"cannot write {path}: {error.strerror}; check the folder") from error
    facts = {"encoder": encoder, "sha256": report.sha256, "source_sha256": report.source_sha256}
    write_bytes(note, canonical_json({**asdict(origin), **facts}))
    return path
