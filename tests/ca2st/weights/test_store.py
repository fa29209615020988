import hashlib
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ca2st.durable import FaultPoints, InjectedFault
from ca2st.errors import DataDamageError, EnvironmentFault, UserInputError
from ca2st.weights.importer import ExpertStore

STATE = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}


def test_what_is_put_is_got_back(tmp_path):
    store = ExpertStore(tmp_path / "experts")
    sha256 = store.put(STATE)
    found = store.get(sha256)
    assert set(found) == set(STATE)
    assert all(torch.equal(found[name], STATE[name]) and found[name].dtype == STATE[name].dtype for name in STATE)


def test_the_name_is_the_hash_of_the_bytes(tmp_path):
    store = ExpertStore(tmp_path)
    sha256 = store.put(STATE)
    (path,) = tmp_path.iterdir()
    assert path.name == f"{sha256}.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def test_equal_tensors_are_kept_once_whatever_their_order_or_memory_layout(tmp_path):
    store = ExpertStore(tmp_path)
    turned = {"a": STATE["a"], "b": STATE["b"].t().contiguous().t()}
    assert store.put(STATE) == store.put(turned)
    assert len(list(tmp_path.iterdir())) == 1


@given(data=st.data())
def test_any_flipped_bit_is_damage_that_names_the_file(data):
    with tempfile.TemporaryDirectory() as folder:
        store = ExpertStore(Path(folder))
        sha256 = store.put(STATE)
        path = store.path(sha256)
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        with pytest.raises(DataDamageError, match=f"{sha256}.safetensors: expected sha256 {sha256}, found"):
            store.get(sha256)


def test_a_truncated_file_is_damage(tmp_path):
    store = ExpertStore(tmp_path)
    path = store.path(store.put(STATE))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataDamageError, match="restore it from a copy"):
        store.get(path.stem)


def test_putting_again_mends_a_damaged_file(tmp_path):
    store = ExpertStore(tmp_path)
    path = store.path(store.put(STATE))
    path.write_bytes(b"nonsense")
    assert store.get(store.put(STATE)).keys() == STATE.keys()


def test_an_expert_that_was_never_put_is_named(tmp_path):
    with pytest.raises(UserInputError, match=r"expected an expert at .*0000.safetensors, found none"):
        ExpertStore(tmp_path).get("0000")


def test_a_writer_that_dies_before_the_rename_leaves_nothing(tmp_path):
    store = ExpertStore(tmp_path)
    with pytest.raises(InjectedFault):
        store.put(STATE, faults=FaultPoints(point="expert.written", kind="raise"))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_fault_of_the_machine(tmp_path):
    with pytest.raises(EnvironmentFault, match="cannot write"):
        ExpertStore(tmp_path).put(STATE, faults=FaultPoints(point="expert.written", kind="enospc"))


def test_a_folder_that_cannot_be_made_is_a_fault_of_the_machine(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(EnvironmentFault, match=r"cannot write .*experts"):
        ExpertStore(tmp_path / "file" / "experts").put(STATE)
