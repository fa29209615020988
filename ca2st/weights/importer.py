"""Foreign checkpoint to ours.

Files that others wrote: safetensors are read here, everything that needs unpickling in a limited child process.

`ca2st weights import`: a checkpoint that others wrote becomes a file of ours, whole and checked, or nothing does.

Public experts that recipes name, imported once: a folder of files under the hash of their bytes, and what they are.

`<key>.json` says which file a name became, and of which commit of its repository; as long as it is there the name
means that file, with or without a network. Removing it fetches anew.
"""

import hashlib
import json
import os
import re
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

from ca2st.checked_json import DocumentError, canonical_json, read_json
from ca2st.durable import write_bytes
from ca2st.errors import EnvironmentFault
from ca2st.model.config import EXPERTS, EncoderName, ModelConfig, ModelKind, check_clip
from ca2st.model.experts import build_expert
from ca2st.model.tokens import audio_patches
from ca2st.processes import SPAWN
from ca2st.spec import ClipSpec
from ca2st.weights.errors import ForeignFileRefusedError, WeightsDamageError, WeightsMismatchError
from ca2st.weights.expert_files import ExpertDescription
from ca2st.weights.foreign_child import ReadFacts, ReadJob, serve
from ca2st.weights.hub import HubAccess, Origin, check_activation, check_architecture, configs_beside, fetch, with_told
from ca2st.weights.layouts import COUNTERS, LAYOUTS_OF_ENCODER, bare_names, common_prefix, translate
from ca2st.weights.model_file import ModelDescription, ModelLoader, build_described, read_description
from ca2st.weights.positions import fit_audio_positions
from ca2st.weights.published import load_published
from ca2st.weights.sizes import UnwrittenSizes, expert_sizes, released_sizes
from ca2st.weights.tensor_files import (
    LoadReport,
    check_finite,
    check_writable_name,
    checksum,
    load_strictly,
    read_tensor_file,
    without_leading_ones,
    write_tensor_file,
)

MAX_FILE_BYTES = 16 * 2**30
TIMEOUT_SECONDS = 600.0
"""Wall time of reading one file, the start of the child included."""
_MAX_ANSWER_BYTES = 2**20
_MAX_INDEX_BYTES = 2**26
_INDEX_ENDING = ".safetensors.index.json"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignFile:
    """The weights in a file, as they are."""

    path: Path
    """Where it was read."""
    sha256: str
    """Of the file's bytes, to compare with what its author published; of parts: of the lines ``sha256  name``."""
    container: str
    """`safetensors`, `safetensors in parts`, `TorchScript archive`, `torch.save zip` or `torch.save pickle`."""
    wrapper: str
    """The key that the weights were under, keys within keys joined by dots; or empty."""
    tensors: dict[str, Tensor]
    """Tensors by the file's own names, on the CPU."""
    metadata: dict[str, str]
    """Free text fields of a safetensors file."""


class _Index(TypedDict):
    """What is read of the index of a checkpoint in parts."""

    weight_map: dict[str, str]


def read_foreign_file(path: Path, *, timeout_seconds: float = TIMEOUT_SECONDS) -> ForeignFile:
    """Read the tensors of a checkpoint in whatever container, without running anything in it.

    A folder stands for the safetensors in it: one file, or parts with their index (``*.safetensors.index.json``).

    Raises:
        ForeignFileRefusedError: no such file, no checkpoint, or one that asks for code, time or memory.
        WeightsDamageError: the file is not whole.
        EnvironmentFault: the file may not be read.
    """
    path = _in_folder(path) if path.is_dir() else path
    if not path.is_file():
        raise ForeignFileRefusedError(f"expected a checkpoint, found no file at {path}; check the path")
    if path.name.endswith(_INDEX_ENDING):
        return _read_parts(path)
    if part := _PART.fullmatch(path.name):
        index = path.with_name(f"{part[1]}{_INDEX_ENDING}")
        raise ForeignFileRefusedError(
            f"{path}: expected a whole checkpoint, found part {int(part[2])} of {int(part[3])}; give {index} or the "
            "folder, with all parts in it"
        )
    _require_size([path])
    sha256 = _sha256(path)
    if _is_safetensors(path):
        plain = read_tensor_file(path)
        facts = ReadFacts(container="safetensors", wrapper="")
        tensors, metadata = plain.tensors, plain.metadata
    else:
        facts, tensors = _read_in_child(path, timeout_seconds)
        metadata = {}
    return ForeignFile(
        path=path,
        sha256=sha256,
        container=facts.container,
        wrapper=facts.wrapper,
        tensors=tensors,
        metadata=metadata,
    )


def _in_folder(folder: Path) -> Path:
    """The one checkpoint in safetensors of a folder: an index of parts, or a single file."""
    found = sorted(folder.glob(f"*{_INDEX_ENDING}")) or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:6]) or "none"
        raise ForeignFileRefusedError(
            f"{folder}: expected one .safetensors file, or parts with one *{_INDEX_ENDING}, found {names}; give the "
            "file itself"
        )
    return found[0]


def _read_parts(index: Path) -> ForeignFile:
    """All parts that an index names; each tensor must lie in the part that the index says, and in no other."""
    try:
        places = read_json(index, _Index, most_bytes=_MAX_INDEX_BYTES)["weight_map"]
    except DocumentError as error:
        raise WeightsDamageError(f"{error}; fetch it again") from error
    names = sorted(set(places.values()))
    if unsafe := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise ForeignFileRefusedError(
            f"{index}: expected names of .safetensors files beside it, found {unsafe[0]!r}; do not trust this file"
        )
    parts = [index.with_name(name) for name in names]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise WeightsDamageError(
            f"{index}: expected {len(parts)} parts beside it, found no {', '.join(missing[:6])}; fetch the others too"
        )
    _require_size(parts)
    tensors: dict[str, Tensor] = {}
    for part in parts:
        held = read_tensor_file(part).tensors
        told = {tensor for tensor, place in places.items() if place == part.name}
        if other := sorted(told ^ held.keys()):
            raise WeightsDamageError(
                f"{part}: expected the {len(told)} tensors that {index.name} names, found {len(held)}; the first that "
                f"differs is {other[0]}; fetch the parts of one version"
            )
        tensors |= held
    lines = "".join(f"{_sha256(file)}  {file.name}\n" for file in (index, *parts))
    return ForeignFile(
        path=index,
        sha256=hashlib.sha256(lines.encode()).hexdigest(),
        container="safetensors in parts",
        wrapper="",
        tensors=tensors,
        metadata={},
    )


def _require_size(files: Sequence[Path]) -> None:
    if (size := sum(file.stat().st_size for file in files)) > MAX_FILE_BYTES:
        raise ForeignFileRefusedError(f"{files[0]}: expected at most {MAX_FILE_BYTES} bytes, found {size}")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {error.strerror}; check its permissions") from error


def _is_safetensors(path: Path) -> bool:
    """By its name, or because an 8-byte length is followed by JSON."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _read_in_child(path: Path, timeout_seconds: float) -> tuple[ReadFacts, dict[str, Tensor]]:
    with tempfile.TemporaryDirectory(prefix="ca2st-import-") as folder:
        job = ReadJob(
            path=path.resolve(), out=Path(folder) / "tensors.safetensors", cpu_seconds=int(timeout_seconds) + 1
        )
        answer = _ask_child(job, timeout_seconds)
        if answer["kind"] == "ok":
            facts = ReadFacts(container=answer["container"], wrapper=answer["wrapper"])
            return facts, read_tensor_file(job.out).tensors
    error = WeightsDamageError if answer["kind"] == "damage" else ForeignFileRefusedError
    raise error(f"{path}: {answer['message']}")


def _ask_child(job: ReadJob, timeout_seconds: float) -> dict[str, str]:
    ours, theirs = SPAWN.Pipe(duplex=False)
    child = SPAWN.Process(target=serve, args=(theirs, job), daemon=True)
    child.start()
    theirs.close()
    try:
        if not ours.poll(timeout_seconds):
            return _refusal(f"expected it to be read within {timeout_seconds:g} s, found it unfinished")
        answer: dict[str, str] = json.loads(ours.recv_bytes(_MAX_ANSWER_BYTES))
        return answer
    except EOFError:
        child.join()
        return _refusal(f"the process that read it died ({_described(child.exitcode)}); do not trust this file")
    except OSError as error:
        raise EnvironmentFault(f"cannot talk to the process that reads {job.path}: {error}") from error
    finally:
        child.kill()
        child.join()
        ours.close()


def _refusal(message: str) -> dict[str, str]:
    return {"kind": "refused", "message": message}


def _described(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


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


@dataclass(frozen=True, slots=True)
class ImportedExperts:
    """A folder of imported experts."""

    folder: Path
    """Usually `imported` beside the runs; made when the first name is imported."""

    def get(self, name: str, encoder: EncoderName, sizes: UnwrittenSizes, access: HubAccess) -> Path:
        """The file of the public checkpoint `name`, fetched and imported the first time it is asked for.

        Raises:
            UserInputError: an unknown name, or weights that are not of this encoder.
            EnvironmentFault: the hub cannot be reached, or the folder not be written.
            WeightsDamageError: a kept file is not what was written.
        """
        told = {"source": name, "encoder": encoder, "sizes": asdict(sizes)}
        key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        note = self.folder / f"{key}.json"
        if note.is_file() and (kept := self._kept(note)).is_file():
            return kept
        return self._import(name, encoder, sizes, access, note)

    def _kept(self, note: Path) -> Path:
        try:
            sha256: str = json.loads(note.read_text())["sha256"]
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsDamageError(f"{note}: cannot read it ({error!r}); remove it to import anew") from error
        path = self.folder / f"{sha256}.safetensors"
        if path.is_file():
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                raise WeightsDamageError(f"{path}: expected that sha256, found {found}; remove it to import anew")
        return path

    def _import(self, name: str, encoder: EncoderName, sizes: UnwrittenSizes, access: HubAccess, note: Path) -> Path:
        fetched = fetch(name, access)
        new = self.folder / f".{note.stem}.{os.getpid()}.safetensors"
        options = ImportOptions(sizes=sizes, origin=fetched.origin)
        report = import_weights(fetched.path, new, kind=encoder, options=options)
        path = self.folder / f"{report.sha256}.safetensors"
        try:
            new.replace(path)
        except OSError as error:
            raise EnvironmentFault(f"cannot write {path}: {error.strerror}; check the folder") from error
        facts = {"encoder": encoder, "sha256": report.sha256, "source_sha256": report.source_sha256}
        document = {**asdict(fetched.origin), **facts}
        write_bytes(note, canonical_json(document))
        return path
