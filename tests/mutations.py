"""Break the product on purpose, one place at a time, and see that a test notices.

``python tests/mutations.py`` takes every row of MUTATIONS, ``python tests/mutations.py NAME...`` those whose name holds
one of the words. Each is applied to a copy of the working tree, in which the tests that should notice are run, once
without the fault and once with it. Ends with 1 if more than MOST_SURVIVORS survive, with 2 where a row no longer fits
the sources or its tests do not pass by themselves.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_SURVIVORS = 2
_MARKS = "not gpu and not soak and not cluster"
_TESTS_FAILED = 1  # exit code of pytest
_UNSOUND = -1
_TIMEOUT_SECONDS = 1800


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutation:
    """A fault, and who should find it."""

    name: str
    file: str
    """Path in the repository."""
    source: str
    """Text that is there exactly once."""
    replacement: str
    tests: tuple[str, ...]
    """Test files, and options that choose among their tests."""


MUTATIONS = (
    Mutation(
        name="gradients are exchanged at the first micro-batch",
        file="ca2st/training/step.py",
        source="synchronise = index == len(parts) - 1",
        replacement="synchronise = index == 0",
        tests=("tests/ca2st/training/test_two_processes.py", "-k", "see_the_samples"),
    ),
    Mutation(
        name="the same dropout masks on every rank",
        file="ca2st/training/step.py",
        source="{seed}/{step}/{rank}/{micro_batch}",
        replacement="{seed}/{step}/{micro_batch}",
        tests=("tests/ca2st/training/test_loop.py", "-k", "dropout"),
    ),
    Mutation(
        name="steps are sent twice after a resume",
        file="ray_jobs/tracking/sender.py",
        source='event["event"] == "step" and event["step"] > last_step:',
        replacement='event["event"] == "step":',
        tests=("tests/ray_jobs/tracking/test_tracker.py",),
    ),
    Mutation(
        name="the quarantine of other ranks is not counted",
        file="pipelines/quarantine.py",
        source="            self._read_all()\n            self._require_budget()\n",
        replacement="            self._require_budget()\n",
        tests=("tests/pipelines/test_quarantine.py",),
    ),
    Mutation(
        name="the size of a shard is not compared at opening",
        file="pipelines/storage/shard_files.py",
        source="if state.st_size != shard.bytes:",
        replacement="if False:",
        tests=("tests/pipelines/test_damage.py", "tests/pipelines/storage/test_shard_cache.py"),
    ),
    Mutation(
        name="a foreign checkpoint is read without limits",
        file="ca2st/weights/foreign.py",
        source="    _limit(job)\n",
        replacement="",
        tests=("tests/ca2st/weights/test_foreign_file.py", "-k", "limited"),
    ),
    Mutation(
        name="a foreign checkpoint is read without the audit hook",
        file="ca2st/weights/foreign.py",
        source="    sys.addaudithook(_refuse_reaching_out)\n",
        replacement="",
        tests=("tests/ca2st/weights/test_foreign_file.py", "-k", "limited"),
    ),
    Mutation(
        name="the reader of a foreign checkpoint outlives its parent",
        file="ca2st/weights/foreign.py",
        source="    die_with_parent()\n",
        replacement="",
        tests=("tests/ca2st/weights/test_foreign_file.py", "-k", "killed"),
    ),
    Mutation(
        name="what members of an archive claim to hold is not compared with its size",
        file="ca2st/weights/foreign.py",
        source="if claimed > file_bytes or len(",
        replacement="if len(",
        tests=("tests/ca2st/weights/test_foreign_file.py", "-k", "5_5"),
    ),
    Mutation(
        name="files are copied instead of renamed",
        file="ca2st/durable.py",
        source="        temporary.replace(path)\n",
        replacement="        path.write_bytes(temporary.read_bytes())\n        temporary.unlink()\n",
        tests=("tests/ca2st/test_durable.py",),
    ),
    Mutation(
        name="files are not forced to the disk",
        file="ca2st/durable.py",
        source="            file.flush()\n            os.fsync(file.fileno())\n        faults.reach",
        replacement="            file.flush()\n        faults.reach",
        tests=("tests/ca2st/test_durable.py",),
    ),
    Mutation(
        name="names of files are not forced to the disk",
        file="ca2st/durable.py",
        source="        temporary.replace(path)\n        fsync_folder(path.parent)\n",
        replacement="        temporary.replace(path)\n",
        tests=("tests/ca2st/test_durable.py",),
    ),
    Mutation(
        name="a decode child has no limit of memory",
        file="sharding/workers.py",
        source="        _lower(resource.RLIMIT_AS, now + memory_bytes)\n",
        replacement="        del now, memory_bytes\n",
        tests=("tests/sharding/test_workers.py", "-k", "c5_memory"),
    ),
    Mutation(
        name="a decode child has no limit of processor time",
        file="sharding/workers.py",
        source="            _limit_processor_time(timeout_seconds)\n",
        replacement="",
        tests=("tests/sharding/test_workers.py", "-k", "processor_time"),
    ),
    Mutation(
        name="a decode child may write to the file system",
        file="sharding/workers.py",
        source="        linux.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0)\n",
        replacement="",
        tests=("tests/sharding/test_workers.py", "-k", "neither_write"),
    ),
    Mutation(
        name="a container may name any protocol",
        file="sharding/media/claims.py",
        source=', "protocol_whitelist": "file"',
        replacement="",
        tests=("tests/sharding/media/test_media.py", "-k", "only_plain_files"),
    ),
    Mutation(
        name="any demuxer may read a source",
        file="sharding/media/claims.py",
        source='"format_whitelist": whitelist, ',
        replacement="",
        tests=("tests/sharding/media/test_media.py", "-k", "only_names"),
    ),
    Mutation(
        name="children run the main script of their parent",
        file="ca2st/processes.py",
        source="            preparation.pop(main, None)\n",
        replacement="            preparation.get(main)\n",
        tests=("tests/ca2st/test_child_processes.py", "-k", "without_a_guard"),
    ),
    Mutation(
        name="tries have no bound of time",
        file="sharding/format/remote.py",
        source="failures == self.config.attempts or spent + pause > self.config.total_seconds",
        replacement="failures == self.config.attempts",
        tests=("tests/sharding/format/test_remote.py", "-k", "p9"),
    ),
    Mutation(
        name="the flip goes with the crop of the spectrogram",
        file="pipelines/views.py",
        source='(flip,) = stream.uniforms("flip", 1)',
        replacement="flip = mel_fraction",
        tests=("tests/pipelines/test_draws.py",),
    ),
    Mutation(
        name="random numbers have 52 bits",
        file="pipelines/keyed_random.py",
        source=">> np.uint64(11)).astype(np.float64) * 2.0**-53",
        replacement=">> np.uint64(12)).astype(np.float64) * 2.0**-52",
        tests=("tests/pipelines/test_keyed_random.py", "tests/pipelines/test_draws.py"),
    ),
    Mutation(
        name="the hash of a manifest is not compared",
        file="sharding/format/shard_set.py",
        source="if sha256_of_json(payload) != claimed:",
        replacement="if False:",
        tests=("tests/sharding/format/test_manifest.py",),
    ),
    Mutation(
        name="shards of another range are taken for done",
        file="sharding/folder.py",
        source="if (shard.covers.first, shard.covers.end) != (covers.start, covers.stop):",
        replacement="if False:",
        tests=("tests/sharding/test_stale_sources.py", "-k", "join"),
    ),
    Mutation(
        name="stale shards are kept",
        file="sharding/conversion.py",
        source="            folder.remove_shard(self._files, number)\n",
        replacement="            del number\n",
        tests=("tests/sharding/test_convert.py", "tests/sharding/test_rejects.py"),
    ),
    Mutation(
        name="Ctrl-C ends as success does",
        file="ray_jobs/cli.py",
        source="raise typer.Exit(_INTERRUPTED) from None",
        replacement="raise typer.Exit(0) from None",
        tests=("tests/ray_jobs/test_cli.py",),
    ),
    Mutation(
        name="Ctrl-C ends without a hint",
        file="ray_jobs/cli.py",
        source='            say("interrupted; rerun the same command to go on where it stopped")\n',
        replacement="",
        tests=("tests/ray_jobs/test_cli.py",),
    ),
)


def misfits(root: Path = ROOT) -> list[str]:
    """What is wrong with the rows, in words: text that is not there exactly once, or test files that are gone."""
    found = []
    for row in MUTATIONS:
        count = (root / row.file).read_text().count(row.source) if (root / row.file).is_file() else 0
        if count != 1:
            found.append(f"{row.name}: expected its text once in {row.file}, found it {count} times")
        found += [
            f"{row.name}: no file {test}"
            for test in row.tests
            if test.startswith("tests/") and not (root / test).is_file()
        ]
    return found


def copy_of_tree(folder: Path) -> Path:
    """What git tracks or would, as it is in the working tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run_mutated(row: Mutation, copy: Path) -> int:
    """Pytest's exit code for the row's tests, on the mutated copy."""
    file = copy / row.file
    before = file.read_text()
    file.write_text(before.replace(row.source, row.replacement))
    try:
        return run_tests(row.tests, copy)
    finally:
        file.write_text(before)


def run_tests(tests: tuple[str, ...], copy: Path) -> int:
    """Pytest's exit code for `tests`; what it says is printed where they could not be run."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", _MARKS, *tests]
    # The copy comes before the installed tree, in the tests' own child processes too.
    environment = {"PYTHONPATH": os.pathsep.join((str(copy), str(copy / "tests")))}
    try:
        done = subprocess.run(
            command,
            cwd=copy,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _TESTS_FAILED
    if done.returncode not in (0, _TESTS_FAILED):
        print(done.stdout)
    return done.returncode


def main(words: list[str]) -> int:
    """Run the rows whose name holds one of `words`, or all; returns the exit code."""
    if wrong := misfits():
        print(*wrong, sep="\n")
        return 2
    rows = [row for row in MUTATIONS if not words or any(word in row.name for word in words)]
    codes = []
    sound: dict[tuple[str, ...], bool] = {}
    with tempfile.TemporaryDirectory(prefix="ca2st-mutations-") as folder:
        copy = copy_of_tree(Path(folder))
        for row in rows:
            if row.tests not in sound:
                sound[row.tests] = run_tests(row.tests, copy) == 0
            codes.append(run_mutated(row, copy) if sound[row.tests] else _UNSOUND)
            what = {0: "SURVIVED", _TESTS_FAILED: "killed", _UNSOUND: "its tests fail without it"}
            print(f"{what.get(codes[-1], f'pytest ended with {codes[-1]}'):<10} {row.name} ({row.file})", flush=True)
    print(f"{codes.count(0)} of {len(codes)} survived")
    if any(code not in (0, _TESTS_FAILED) for code in codes):
        return 2
    return int(codes.count(0) > MOST_SURVIVORS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
