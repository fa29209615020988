"""Check every byte of a shard set behind a URL: shard after shard through a temporary folder, one at a time."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ca2st.durable import is_environment_error
from ca2st.errors import EnvironmentFault
from sharding.errors import ManifestError, ShardDamageError
from sharding.location import as_location
from sharding.manifest import MANIFEST_NAME, parse_manifest
from sharding.rejects import REJECTS_NAME
from sharding.remote import RemoteFileMissingError, RemoteFiles
from sharding.shard_set import SHARDS_NAME, ShardEntry, ShardSet, read_shard_set
from sharding.source_states import SOURCES_NAME, sources_damage
from sharding.verify import Problem, expected_rejects, index_problems, set_problem, shard_problems, verify_shard_set


def verify_place(place: str, *, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Everything that is wrong with the set in a folder or behind a URL.

    Raises:
        UserInputError: no folder, or a kind of URL that is not read.
        EnvironmentFault: as `verify_remote_set`.
    """
    location = as_location(place)
    if isinstance(location, Path):
        return verify_shard_set(location, progress=progress)
    return verify_remote_set(RemoteFiles(folder=location), progress=progress)


def count_shards(place: str) -> int:
    """Shards of the set at `place`, for a progress bar; 0 where its manifest cannot be read."""
    location = as_location(place)
    if isinstance(location, Path):
        return sum(1 for _ in location.glob("*.tar"))
    try:
        files = RemoteFiles(folder=location)
        return parse_manifest(files.read(MANIFEST_NAME), where=files.folder.file(MANIFEST_NAME)).num_shards
    except (RemoteFileMissingError, ManifestError, ShardDamageError):
        return 0


def verify_remote_set(files: RemoteFiles, *, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Everything that is wrong with the set behind a URL; an empty list means every byte is as it was written.

    Needs room for one shard in the system's temporary folder (TMPDIR chooses another).

    Raises:
        EnvironmentFault: the server cannot be read, or the temporary folder not be written.
    """
    with tempfile.TemporaryDirectory(prefix="ca2st-verify-") as folder:
        root = Path(folder)
        for name in (MANIFEST_NAME, SHARDS_NAME):
            _fetch_small(files, name, root)
        try:
            shard_set = read_shard_set(root)
        except (ManifestError, ShardDamageError) as error:
            problem = set_problem(error)
            return [replace(problem, what=problem.what.replace(str(root), files.folder.url))]
        sizes, problems = files.sizes() or {}, list[Problem]()
        for number, shard in enumerate(shard_set.shards):
            problems += _checked(files, shard_set, shard, listed=sizes.get(shard.name, shard.bytes))
            if progress:
                progress(number + 1, len(shard_set.shards))
        return [*_folder_problems(files, shard_set, sizes), *index_problems(shard_set), *problems]


def _checked(files: RemoteFiles, shard_set: ShardSet, shard: ShardEntry, *, listed: int) -> list[Problem]:
    root = shard_set.root
    if listed != shard.bytes:
        what = f"expected {shard.bytes} bytes, found {listed}; copy it again"
        return [Problem(shard=shard.name, key="", what=what)]
    _fetch_small(files, shard.index_name, root)
    path = root / shard.name
    try:
        with path.open("wb") as file:
            for piece in files.ranges(shard.name, shard.bytes):
                file.write(piece)
    except RemoteFileMissingError:
        path.unlink()
    except EnvironmentFault as error:
        path.unlink()
        return [Problem(shard=shard.name, key="", what=str(error))]
    except OSError as error:
        if not is_environment_error(error):
            raise
        raise EnvironmentFault(f"{path}: {error.strerror}; set TMPDIR to a folder with room for a shard") from error
    problems = shard_problems(root, shard, shard_set.manifest.label_spaces)
    path.unlink(missing_ok=True)
    return problems


def _fetch_small(files: RemoteFiles, name: str, root: Path) -> None:
    try:
        (root / name).write_bytes(files.read(name))
    except RemoteFileMissingError:
        return  # the check of the copy names it


def _folder_problems(files: RemoteFiles, shard_set: ShardSet, sizes: Mapping[str, int]) -> Iterator[Problem]:
    """Files that the manifest does not account for, as far as the server lists them, and other rejects."""
    expected = {MANIFEST_NAME, SHARDS_NAME, REJECTS_NAME, SOURCES_NAME}
    for shard in shard_set.shards:
        expected |= {shard.name, shard.index_name}
    for name in sorted(set(sizes) - expected):
        yield Problem(shard=name, key="", what="not named by the manifest; remove it")
    try:
        if what := sources_damage(files.read(SOURCES_NAME), shard_set.shards):
            yield Problem(shard=SOURCES_NAME, key="", what=what)
    except (RemoteFileMissingError, EnvironmentFault):
        pass  # not a part of the set
    rejects = expected_rejects(shard_set)
    if rejects is None:
        return
    try:
        found = files.read(REJECTS_NAME)
    except RemoteFileMissingError:
        yield Problem(shard=REJECTS_NAME, key="", what="missing: the manifest counts rejects")
        return
    if hashlib.sha256(found).digest() != hashlib.sha256(rejects).digest():
        yield Problem(shard=REJECTS_NAME, key="", what="differs from what the shards' indexes say; remove it")
