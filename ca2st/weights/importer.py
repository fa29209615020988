"""`ca2st weights import`: a checkpoint that others wrote becomes a file of ours, whole and checked, or nothing does."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ca2st.model.config import EncoderName, ModelConfig, ModelKind, check_clip
from ca2st.model.experts import build_expert
from ca2st.model.structure import EXPERTS
from ca2st.model.tokens import audio_patches
from ca2st.spec import ClipSpec
from ca2st.weights.audio_positions import fit_audio_positions
from ca2st.weights.errors import WeightsMismatchError
from ca2st.weights.expert_file import ExpertDescription
from ca2st.weights.foreign_file import TIMEOUT_SECONDS, ForeignFile, read_foreign_file
from ca2st.weights.hub import Origin, configs_beside, with_told
from ca2st.weights.hub_config import check_activation, check_architecture
from ca2st.weights.layouts import COUNTERS, LAYOUTS_OF_ENCODER, bare_names, common_prefix, translate
from ca2st.weights.model_file import ModelDescription, ModelLoader, build_described, read_description
from ca2st.weights.published import load_published
from ca2st.weights.sizes import UnwrittenSizes, expert_sizes, released_sizes
from ca2st.weights.strict import LoadReport, load_strictly, without_leading_ones
from ca2st.weights.tensor_file import check_finite, check_writable_name, checksum, write_tensor_file

ReleasedKind = Literal["cast", "cava", "ca2st"]
ImportKind = EncoderName | ReleasedKind


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions:
    """What the caller may decide."""

    allow_missing: tuple[str, ...] = ()
    """Patterns of our tensor names that the file need not have; they get the value a new model starts with."""
    sizes: UnwrittenSizes = field(default_factory=UnwrittenSizes)
    """What the shapes of tensors do not tell."""
    timeout_seconds: float = TIMEOUT_SECONDS
    """Wall time of reading a file that needs a child process."""
    origin: Origin | None = None
    """Where the file comes from; None: from its path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportReport:
    """What became of every tensor."""

    kind: ImportKind
    """As asked."""
    layout: str
    """The family of names that was found."""
    container: str
    """What kind of file it was."""
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
    """Of the file that was written."""
    out: Path
    """The file that was written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Imported:
    """A loaded module on its way to a file."""

    module: nn.Module
    config: ModelConfig
    clip: ClipSpec
    layout: str
    report: LoadReport
    metadata: dict[str, str]


def import_weights(path: Path, out: Path, *, kind: ImportKind, options: ImportOptions | None = None) -> ImportReport:
    """Read the checkpoint `path` of a known layout and write it as `out`, an expert file or a whole model.

    Raises:
        UserInputError: an unknown layout, a file that asks for more than its tensors, tensors that are missing,
            unknown or of another shape. Nothing is written.
        WeightsDamageError: the file is not whole, or holds values that are not finite. Nothing is written.
        EnvironmentFault: the output cannot be written.
    """
    check_writable_name(out, source=path)
    options = options or ImportOptions()
    file = read_foreign_file(path, timeout_seconds=options.timeout_seconds)
    importer: Callable[[ForeignFile, ImportOptions], _Imported] = _IMPORTERS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        imported = importer(file, options)
    state = imported.module.state_dict()
    check_finite(state, where=str(path))
    sha256 = write_tensor_file(out, state, metadata=imported.metadata)
    return ImportReport(
        kind=kind,
        layout=imported.layout,
        container=file.container,
        wrapper=file.wrapper,
        model=_sizes_told(imported),
        loaded=imported.report.loaded,
        missing=imported.report.missing,
        unexpected=imported.report.unexpected,
        checksums={name: checksum(tensor) for name, tensor in sorted(state.items())},
        origin=_origin(file, options),
        source_sha256=file.sha256,
        sha256=sha256,
        out=out,
    )


def _origin(file: ForeignFile, options: ImportOptions) -> Origin:
    """As given, or the file's name with what the configuration beside it tells."""
    return options.origin or with_told(Origin(source=file.path.name), configs_beside(file.path))


def _expert_importer(encoder: EncoderName) -> Callable[[ForeignFile, ImportOptions], _Imported]:
    def import_expert(file: ForeignFile, options: ImportOptions) -> _Imported:
        where, origin = str(file.path), _origin(file, options)
        check_activation(origin.activation, encoder, where=origin.source)
        if origin.repository or origin.architecture:
            check_architecture(origin.architecture, encoder, where=origin.source)
        translation = translate(file.tensors, LAYOUTS_OF_ENCODER[encoder], where=where)
        config, clip = expert_sizes(encoder, translation.tensors, options.sizes, where=where)
        check_clip(config, clip)
        module = build_expert(config.kind, config, clip)
        own = module.state_dict()
        tensors = {
            name: without_leading_ones(tensor, own[name].ndim) if name in own else tensor
            for name, tensor in translation.tensors.items()
        }
        if encoder == "ast" and "positions" in tensors and tensors["positions"].ndim == 2:
            rows, columns = audio_patches(config, clip)
            tensors["positions"] = fit_audio_positions(tensors["positions"], rows=rows, columns=columns, where=where)
        loaded = load_strictly(module, tensors, where=where, allow_missing=options.allow_missing)
        report = LoadReport(loaded=translation.used, missing=loaded.missing, unexpected=translation.ignored)
        description = ExpertDescription(
            encoder=encoder,
            layout=translation.layout.name,
            config=config,
            clip=clip,
            source_sha256=file.sha256,
            origin=origin,
        )
        return _Imported(
            module=module,
            config=config,
            clip=clip,
            layout=translation.layout.name,
            report=report,
            metadata=description.metadata(),
        )

    return import_expert


def _released_importer(kind: ReleasedKind) -> Callable[[ForeignFile, ImportOptions], _Imported]:
    def import_released(file: ForeignFile, options: ImportOptions) -> _Imported:
        where = str(file.path)
        tensors, counters = _without_wrappers(file.tensors, where=where)
        ours = any(name.startswith("experts.") for name in tensors)
        description = _description(kind, file, tensors, options, ours=ours)
        load: ModelLoader = load_strictly if ours else load_published
        model, report = build_described(
            description, tensors, where=where, load=load, allow_missing=options.allow_missing
        )
        return _Imported(
            module=model,
            config=description.model,
            clip=description.clip,
            layout="ca2st" if ours else f"released {kind.upper()}",
            report=replace(report, unexpected=(*report.unexpected, *counters)),
            metadata=description.metadata(),
        )

    return import_released


def _description(
    kind: ModelKind, file: ForeignFile, tensors: Mapping[str, Tensor], options: ImportOptions, *, ours: bool
) -> ModelDescription:
    """What our exports say about themselves, or what shapes tell about files of others."""
    where = str(file.path)
    written = read_description(file.metadata, where=where)
    if written is None and ours:
        raise WeightsMismatchError(
            f"{where}: expected our names with the model's description, found none in its header"
        )
    if written is None:
        return released_sizes(kind, tensors, options.sizes, where=where)
    asked = {
        "num_heads": options.sizes.num_heads,
        "mel_rows": options.sizes.mel_rows,
        "num_frames": options.sizes.num_frames,
        "crop_size": options.sizes.crop_size,
    }
    has = asdict(written.model) | asdict(written.clip)
    wrong = [f"{name} {value} (it has {has[name]})" for name, value in asked.items() if value not in (None, has[name])]
    if written.model.kind != kind:
        wrong.append(f"--kind {kind} (it is {written.model.kind})")
    if wrong:
        raise WeightsMismatchError(f"{where}: expected the sizes that the file names, found {', '.join(wrong)}")
    return written


def _without_wrappers(tensors: Mapping[str, Tensor], *, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors without what wrappers put before or into all their names, and the counters beside the model."""
    bare = bare_names(tensors, where=where)
    prefix = common_prefix(bare)
    named = {name.removeprefix(prefix): tensors[theirs] for name, theirs in bare.items() if name not in COUNTERS}
    return named, [name for name in bare if name in COUNTERS]


_IMPORTERS: dict[ImportKind, Callable[[ForeignFile, ImportOptions], _Imported]] = {
    "clip": _expert_importer("clip"),
    "videomae": _expert_importer("videomae"),
    "ast": _expert_importer("ast"),
    "resnet50": _expert_importer("resnet50"),
    "cast": _released_importer("cast"),
    "cava": _released_importer("cava"),
    "ca2st": _released_importer("ca2st"),
}


def _sizes_told(imported: _Imported) -> dict[str, int]:
    """What the written tensors fit; sizes of the clip only where a table depends on them."""
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
