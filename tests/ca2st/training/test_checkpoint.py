import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ca2st.durable import NO_FAULTS, FaultPoints, InjectedFault
from ca2st.errors import EnvironmentFault, UserInputError
from ca2st.training import checkpoint as keeper_module
from ca2st.training.checkpoint import (
    CheckpointKeeper,
    CheckpointMarker,
    last_attempt_of_checkpoints,
    list_checkpoints,
    read_checkpoint,
    read_marker,
    remove_checkpoint,
    save_checkpoint,
    sweep_partial,
    verify_checkpoint,
)
from ca2st.training.errors import CheckpointDamagedError
from ca2st.training.journal import sealed_json

FILES = {"model.safetensors": b"weights" * 50, "loader.json": b"{}\n"}
MARKER = CheckpointMarker(
    step=6,
    attempt=1,
    seed=5,
    global_batch_size=8,
    manifests={"train": "f" * 64},
    recipe_sha256="0" * 64,
    topology={"world_size": 1},
    versions={"torch": "2"},
    experts={"audio": "e" * 64},
)


def save(root: Path, step: int, attempt: int = 1, faults: FaultPoints = NO_FAULTS) -> Path:
    return save_checkpoint(root, FILES, replace(MARKER, step=step, attempt=attempt), faults=faults)


def names(root: Path) -> list[str]:
    return [path.name for path in list_checkpoints(root)]


def test_a_checkpoint_comes_back_with_every_byte_and_fact(tmp_path: Path) -> None:
    folder = save(tmp_path, 6)
    checkpoint = read_checkpoint(folder)
    assert folder.name == "step-6.attempt-1"
    assert checkpoint.files == FILES
    assert replace(checkpoint.marker, files={}) == MARKER
    assert verify_checkpoint(folder) == checkpoint.marker


def test_t6_every_flipped_byte_of_every_file_is_refused_by_name(tmp_path: Path) -> None:
    folder = save(tmp_path, 6)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for position in range(0, len(whole), 7 if path.suffix == ".safetensors" else 1):
            damaged = bytearray(whole)
            damaged[position] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(CheckpointDamagedError, match=path.name):
                read_checkpoint(folder)
        path.write_bytes(whole)
    read_checkpoint(folder)


def test_t6_a_missing_file_and_one_of_another_step_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 6)
    (folder / "loader.json").unlink()
    with pytest.raises(CheckpointDamagedError, match=r"loader.json: named by COMPLETE.json but not readable"):
        read_checkpoint(folder)
    (folder / "loader.json").write_bytes(b'{"epoch":9}\n')
    with pytest.raises(CheckpointDamagedError, match=r"loader.json: expected 3 bytes .* found 12"):
        verify_checkpoint(folder)


def test_a_planted_pickle_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 6)
    (folder / "rng.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointDamagedError, match=r"does not name: \['rng.pkl'\]"):
        read_checkpoint(folder)


def test_a_folder_that_is_no_checkpoint_and_a_newer_format_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"expected a checkpoint folder with COMPLETE.json"):
        read_marker(tmp_path)
    (tmp_path / "COMPLETE.json").write_bytes(sealed_json({"format_version": 2}))
    with pytest.raises(UserInputError, match="checkpoint format 2, this ca2st reads 1"):
        read_marker(tmp_path)


def test_the_newest_is_the_last_attempts_last_step(tmp_path: Path) -> None:
    for step, attempt in ((30, 1), (9, 2), (12, 2), (100, 1)):
        save(tmp_path, step, attempt)
    assert names(tmp_path) == ["step-12.attempt-2", "step-9.attempt-2", "step-100.attempt-1", "step-30.attempt-1"]
    assert last_attempt_of_checkpoints(tmp_path) == 2
    assert list_checkpoints(tmp_path / "none") == []


def test_what_has_another_name_is_not_even_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link beside the checkpoints may lead where this user may not look."""
    save(tmp_path, 30, 1)
    (tmp_path / "latest").symlink_to("/elsewhere")
    is_dir = Path.is_dir

    def is_dir_or_forbidden(path: Path) -> bool:
        if path.name == "latest":
            raise PermissionError(path)
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", is_dir_or_forbidden)
    assert names(tmp_path) == ["step-30.attempt-1"]


WRITE_POINTS = [
    "checkpoint.folder",
    "checkpoint.model.safetensors.written",
    "checkpoint.model.safetensors.renamed",
    "checkpoint.loader.json.written",
    "checkpoint.loader.json.renamed",
    "checkpoint.COMPLETE.json.written",
]


@pytest.mark.parametrize("point", WRITE_POINTS)
def test_t5_a_write_that_breaks_off_is_no_checkpoint_and_is_swept(tmp_path: Path, point: str) -> None:
    save(tmp_path, 3)
    with pytest.raises(InjectedFault):
        save(tmp_path, 6, faults=FaultPoints(point=point, kind="raise"))
    assert names(tmp_path) == ["step-3.attempt-1"]
    assert [path.name for path in sweep_partial(tmp_path)] == ["step-6.attempt-1"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-3.attempt-1"]


@pytest.mark.parametrize("point", WRITE_POINTS)
def test_t7_a_full_disk_leaves_nothing_behind_and_the_older_one_whole(tmp_path: Path, point: str) -> None:
    save(tmp_path, 3)
    with pytest.raises(EnvironmentFault, match="No space left on device"):
        save(tmp_path, 6, faults=FaultPoints(point=point, kind="enospc"))
    assert [path.name for path in tmp_path.iterdir()] == ["step-3.attempt-1"]
    verify_checkpoint(tmp_path / "step-3.attempt-1")


def test_t16_a_removal_that_breaks_off_leaves_no_damaged_checkpoint(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    with pytest.raises(InjectedFault):
        remove_checkpoint(folder, faults=FaultPoints(point="checkpoint.unmarked", kind="raise"))
    assert names(tmp_path) == []
    assert sweep_partial(tmp_path) == [folder]


def keep(root: Path, steps: list[int], *, number: int, faults: FaultPoints = NO_FAULTS) -> list[str]:
    keeper = CheckpointKeeper(root, keep=number, faults=faults)
    return [problem for step in steps for problem in keeper.save(FILES, replace(MARKER, step=step)).problems]


def test_t16_the_newest_few_are_kept(tmp_path: Path) -> None:
    assert keep(tmp_path, [3, 6, 9], number=2) == []
    assert names(tmp_path) == ["step-9.attempt-1", "step-6.attempt-1"]
    assert keep(tmp_path, [12], number=1) == []
    assert names(tmp_path) == ["step-12.attempt-1"]


def test_t16_nothing_is_removed_while_the_new_checkpoint_is_not_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_badly(root: Path, *arguments: object, **options: object) -> Path:
        folder = save_checkpoint(root, *arguments, **options)
        (folder / "loader.json").write_bytes(b"[]\n")
        return folder

    keep(tmp_path, [3], number=1)
    monkeypatch.setattr(keeper_module, "save_checkpoint", save_badly)
    problems = keep(tmp_path, [6], number=1)
    assert "kept 1 old checkpoints, the new one is not sound" in problems[0]
    assert names(tmp_path) == ["step-6.attempt-1", "step-3.attempt-1"]


def test_t16_a_removal_that_fails_is_reported_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path, *, faults: FaultPoints) -> None:
        raise PermissionError(13, "Permission denied")

    keep(tmp_path, [3], number=1)
    with monkeypatch.context() as patch:
        patch.setattr(keeper_module, "remove_checkpoint", refuse)
        assert "cannot remove old checkpoint" in keep(tmp_path, [6], number=1)[0]
    assert keep(tmp_path, [9], number=1) == []
    assert names(tmp_path) == ["step-9.attempt-1"]


def test_t16_a_later_attempts_lower_step_outlives_a_damaged_higher_one(tmp_path: Path) -> None:
    keep(tmp_path, [20], number=1)
    keeper = CheckpointKeeper(tmp_path, keep=1, faults=NO_FAULTS)
    keeper.save(FILES, replace(MARKER, step=15, attempt=2))
    assert names(tmp_path) == ["step-15.attempt-2"]


def test_failed_saves_are_counted_in_a_row(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    root.write_text("a file where the folder should be")
    keeper = CheckpointKeeper(root, keep=1, faults=NO_FAULTS)
    assert [keeper.save(FILES, replace(MARKER, step=step)).num_failed for step in (1, 2)] == [1, 2]
    root.unlink()
    assert keeper.save(FILES, MARKER).num_failed == 0
    shutil.rmtree(root)
    root.write_text("")
    assert keeper.save(FILES, MARKER).num_failed == 1
