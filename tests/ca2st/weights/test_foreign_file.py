"""Row 5.1 of the security table: hostile and damaged files. No code runs, the message is clear, nothing is written."""

import io
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest
import torch

from ca2st.weights import foreign
from ca2st.weights.foreign import read, read_foreign_file
from ca2st.weights.importer import ImportOptions, import_weights
from ca2st.weights.tensor_files import ForeignFileRefusedError, WeightsDamageError
from support.foreign import torchscript_archive, training_checkpoint
from support.processes import python_path

ROOT = Path(__file__).parents[3]
STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


class _Evil:
    """Touches a file when it is unpickled by anything that runs code."""

    def __init__(self, witness, *, how="open"):
        self.witness, self.how = str(witness), how

    def __reduce__(self):
        if self.how == "system":
            return os.system, (f"touch {self.witness}",)
        return open, (self.witness, "w")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "child" / "out.safetensors"


def _saved(tmp_path, what, **how):
    path = tmp_path / "file.pth"
    torch.save(what, path, **how)
    return path


def _zip(path, members, *, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def _members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("how", ["open", "system"])
@pytest.mark.parametrize("zipped", [True, False])
def test_5_1_an_evil_pickle_runs_nothing_and_is_named(tmp_path, out, how, zipped):
    witness = tmp_path / "witness"
    path = _saved(tmp_path, STATE | {"x": _Evil(witness, how=how)}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ForeignFileRefusedError, match=r"nothing of the file was run. Ask its author") as refusal:
        read(path, out)
    assert "weights_only" not in str(refusal.value)
    assert not witness.exists()


def test_5_1_through_the_whole_import_an_evil_pickle_writes_nothing(tmp_path):
    witness, out = tmp_path / "witness", tmp_path / "made" / "out.safetensors"
    path = _saved(tmp_path, {"model": _Evil(witness, how="system")})
    with pytest.raises(ForeignFileRefusedError, match=r"file\.pth: expected tensors, .*(posix|os)\.system"):
        import_weights(path, out, kind="clip")
    assert not witness.exists()
    assert not out.parent.exists()


def test_5_1_namespace_and_numpy_scalars_are_data(tmp_path):
    out = tmp_path / "out.safetensors"
    told = read(_saved(tmp_path, training_checkpoint(STATE)), out)
    assert told == ("torch.save zip", "model")
    assert out.exists()


def test_5_1_a_torchscript_archive_gives_its_tensors(tmp_path):
    path = torchscript_archive(
        tmp_path / "a.pt", {"visual.a.weight": STATE["weight"], "visual.b": STATE["bias"].half()}
    )
    file = read_foreign_file(path)
    assert file.container == "TorchScript archive"
    assert torch.equal(file.tensors["visual.a.weight"], STATE["weight"])
    assert file.tensors["visual.b"].dtype == torch.float16


class _WithContainers(torch.nn.Module):
    sizes: dict[str, int]

    def __init__(self):
        super().__init__()
        self.sizes = {"width": 32}
        self.numbers = [1, 2, 3]
        self.weight = torch.nn.Parameter(STATE["weight"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.sizes["width"] * self.numbers[0]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_5_1_typed_containers_of_a_torchscript_archive_are_passed_over(tmp_path):
    torch.jit.script(_WithContainers()).save(str(tmp_path / "a.pt"))
    assert list(read_foreign_file(tmp_path / "a.pt").tensors) == ["weight"]


def test_5_1_a_torchscript_archive_is_read_without_its_programs(tmp_path):
    members = _members(torchscript_archive(tmp_path / "a.pt", dict(STATE)))
    broken = {name: b"this is no program" if "/code/" in name else data for name, data in members.items()}
    out = tmp_path / "out.safetensors"
    assert read(_zip(tmp_path / "b.pt", broken), out) == ("TorchScript archive", "")


@pytest.mark.parametrize("name", ["os\nsystem", "builtins\neval", "torch\nload", "torch._utils\n_import_dotted_name"])
def test_5_1_a_torchscript_archive_that_names_a_function_is_refused(tmp_path, out, name):
    members = _members(torchscript_archive(tmp_path / "a.pt", dict(STATE)))
    evil = b"\x80\x02c" + name.encode() + b"\n(X\x04\x00\x00\x00trueatR."
    members = {member: evil if member.endswith("/data.pkl") else data for member, data in members.items()}
    with pytest.raises(ForeignFileRefusedError, match=rf"found the name {name.replace(chr(10), '.')} in data\.pkl"):
        read(_zip(tmp_path / "b.pt", members), out)


def test_5_1_a_torchscript_tensor_larger_than_its_storage_is_damage(tmp_path, out):
    members = _members(torchscript_archive(tmp_path / "a.pt", dict(STATE)))
    short = {name: data[:4] if name.endswith(("data/0", "data/1")) else data for name, data in members.items()}
    with pytest.raises(WeightsDamageError, match="expected a storage for shape"):
        read(_zip(tmp_path / "b.pt", short), out)
    gone = {name: data for name, data in members.items() if not name.endswith("data/0")}
    with pytest.raises(WeightsDamageError, match=r"expected its storage data/0 in the archive, found none"):
        read(_zip(tmp_path / "c.pt", gone), out)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("kind", ["zip", "torchscript"])
def test_5_1_a_truncated_archive_is_damage(tmp_path, out, share, kind):
    path = torchscript_archive(tmp_path / "a.pt", dict(STATE)) if kind == "torchscript" else _saved(tmp_path, STATE)
    data = path.read_bytes()
    path.write_bytes(data[: max(int(len(data) * share), 16)])
    with pytest.raises(WeightsDamageError, match="expected a whole zip archive"):
        read(path, out)


@pytest.mark.parametrize(("place", "value", "found"), [(6, 255, "zip file version 25.5"), (8, 0x20, "patched data")])
def test_5_1_a_zip_header_that_asks_for_what_no_reader_has_is_damage(tmp_path, out, place, value, found):
    path = _saved(tmp_path, STATE)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + place] = value  # the first entry of the directory: version needed, flags
    path.write_bytes(data)
    with pytest.raises(
        WeightsDamageError, match=f"expected a whole zip archive, found: .*{found}.*fetch the file again"
    ):
        read(path, out)


def test_5_1_an_encrypted_member_is_refused_by_name(tmp_path, out):
    path = _saved(tmp_path, STATE)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the first entry of the directory: flags
    path.write_bytes(data)
    with pytest.raises(
        ForeignFileRefusedError, match=r"without a password.*found .*data.pkl encrypted; fetch the file"
    ):
        read(path, out)


def test_5_1_a_truncated_old_pickle_is_damage(tmp_path, out):
    path = _saved(tmp_path, STATE, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-10])
    assert foreign.answer(path, out)["kind"] != "ok"
    path.write_bytes(b"")
    with pytest.raises(WeightsDamageError, match="found 0 bytes"):
        read(path, out)


def test_5_1_one_flipped_byte_in_any_tensor_is_damage(tmp_path, out):
    path = _saved(tmp_path, STATE)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("file/data/0")
    data = bytearray(path.read_bytes())
    name_bytes, extra_bytes = struct.unpack_from("<HH", data, info.header_offset + 26)
    data[info.header_offset + 30 + name_bytes + extra_bytes + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsDamageError, match="Bad CRC-32"):
        read(path, out)


def test_5_1_5_5_a_zip_bomb_is_refused_before_it_unpacks(tmp_path, out):
    members = _members(_saved(tmp_path, STATE)) | {"file/data/7": b"\0" * 50_000_000}
    path = _zip(tmp_path / "bomb.pth", members, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(ForeignFileRefusedError, match="stored without compression"):
        read(path, out)


def test_5_1_5_5_members_that_claim_more_than_the_file_holds_are_refused(tmp_path, out):
    path = _saved(tmp_path, {"weight": torch.ones(1000)})
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = len(archive.infolist())
    end = data.rindex(b"PK\x05\x06")
    start = struct.unpack_from("<I", data, end + 16)[0]
    directory = data[start:end]
    directory = directory[: directory.rindex(b"PK\x06\x06")] if b"PK\x06\x06" in directory else directory
    tail = bytearray(data[end:])
    struct.pack_into("<HHI", tail, 8, 2 * entries, 2 * entries, 2 * len(directory))
    struct.pack_into("<I", tail, 16, start)
    path.write_bytes(data[:start] + directory * 2 + bytes(tail))  # every member twice over the same bytes
    with pytest.raises((ForeignFileRefusedError, WeightsDamageError), match=r"fit into the file|overlap|whole zip"):
        read(path, out)


def test_5_1_5_5_a_member_that_claims_more_than_the_file_holds_is_refused_before_it_is_read(tmp_path, out):
    path = _saved(tmp_path, {"weight": torch.ones(1000)})
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    struct.pack_into("<II", data, entry + 20, 2**30, 2**30)  # its packed and its whole size
    path.write_bytes(data)
    with pytest.raises(ForeignFileRefusedError, match=r"members that fit into the file's \d+ bytes, found \d+ of 107"):
        read(path, out)


def test_5_1_5_5_a_tensor_of_many_values_over_few_bytes_is_refused(tmp_path, out):
    path = _saved(tmp_path, {"weight": torch.ones(1).expand(10**9, 10**3)})
    with pytest.raises(ForeignFileRefusedError, match="found 4 bytes that claim to be as many"):
        read(path, out)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ([1, 2], "expected a dict of tensors, or one under model, module, state_dict, .*, found list"),
        ({}, "found dict"),
        ({"a": torch.ones(1), "b": 3}, r"found other values under \[\"b\"\]"),
        ({3: torch.ones(1)}, "found other values under"),
        ({"a": torch.ones(2).to_sparse()}, "a: expected a plain dense tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "a: expected a plain dense tensor"),
    ],
)
def test_what_is_no_dict_of_plain_tensors_is_refused(tmp_path, out, what, message):
    with pytest.raises(ForeignFileRefusedError, match=message):
        read(_saved(tmp_path, what), out)


@pytest.mark.parametrize("data", [b"<!DOCTYPE html>", b"\x1f\x8b\x08\x00", b"version https://git-lfs"])
def test_what_is_no_checkpoint_at_all_is_told_by_its_first_bytes(tmp_path, out, data):
    path = tmp_path / "file.pth"
    path.write_bytes(data)
    with pytest.raises(ForeignFileRefusedError, match="found a file that begins with"):
        read(path, out)


def test_damage_of_an_old_pickle_is_one_message_and_never_another_error(tmp_path):
    """The format has no checksums: what cannot be seen in it is read as it is."""
    path = _saved(tmp_path, {"model": STATE, "epoch": 3}, _use_new_zipfile_serialization=False)
    whole, out = path.read_bytes(), tmp_path / "out.safetensors"
    answers = []
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x15]) + whole[position + 1 :])
        answers.append(foreign.answer(path, out))
    assert {found["kind"] for found in answers} >= {"ok", "refused"}
    messages = [found["message"] for found in answers if found["kind"] != "ok"]
    assert all(message.startswith("expected") or ": expected" in message for message in messages)
    assert not any("weights_only" in message or len(message) > 500 for message in messages)


def test_a_read_that_does_not_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("ca2st.weights.foreign.serve", _sleep)
    began = time.monotonic()
    with pytest.raises(ForeignFileRefusedError, match=r"expected it to be read within 0\.2 s, found it unfinished"):
        read_foreign_file(_saved(tmp_path, STATE), timeout_seconds=0.2)
    assert time.monotonic() - began < 30


def test_a_child_that_dies_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr("ca2st.weights.foreign.serve", _die)
    with pytest.raises(ForeignFileRefusedError, match=r"the process that read it died \(SIGSEGV\)"):
        read_foreign_file(_saved(tmp_path, STATE))


def test_5_5_the_childs_memory_is_limited_and_it_can_reach_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("ca2st.weights.foreign.serve", _try_things)
    with pytest.raises(ForeignFileRefusedError) as told:
        read_foreign_file(_saved(tmp_path, STATE))
    assert str(told.value).endswith(
        "memory refused, socket.__new__ refused, os.system refused, subprocess.Popen refused"
    )


def _sleep(_connection, _job):
    time.sleep(60)


def _die(_connection, _job):
    os.kill(os.getpid(), signal.SIGSEGV)


def _try_things(connection, job):
    """The child's whole life, but that it tries this instead of reading the file."""
    foreign.answer = _tried
    foreign.serve(connection, job)


def _tried(_path, _out):
    import socket
    import subprocess

    told = []
    try:
        bytearray(8 * 2**30)
    except MemoryError:
        told.append("memory refused")
    for name, act in (
        ("socket.__new__", socket.socket),
        ("os.system", lambda: os.system("true")),
        ("subprocess.Popen", lambda: subprocess.run(["true"], check=False)),
    ):
        try:
            act()
        except ForeignFileRefusedError as error:
            told.append(f"{name} refused" if name in str(error) else str(error))
    told += [name for name in ("CPU", "FSIZE", "CORE") if _is_unlimited(f"RLIMIT_{name}")]
    return {"kind": "refused", "message": ", ".join(told)}


def _is_unlimited(name):
    return resource.getrlimit(getattr(resource, name))[1] == resource.RLIM_INFINITY


def test_a_child_ends_with_the_import_that_is_killed(tmp_path):
    script = tmp_path / "import.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        "import ca2st.weights.foreign as foreign_file\n"
        "from support.foreign import say_and_sleep\n"
        "foreign_file.serve = say_and_sleep\n"
        "foreign_file.read_foreign_file(Path(sys.argv[1]))\n"
    )
    command = [sys.executable, str(script), str(_saved(tmp_path, STATE))]
    environment = os.environ | {"PYTHONPATH": python_path()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.02)


def test_5_1_the_project_unpickles_in_two_places_and_never_without_the_check():
    sources = [
        path for package in ("ca2st", "sharding", "pipelines", "ray_jobs") for path in (ROOT / package).rglob("*.py")
    ]
    assert len(sources) > 80
    text = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sources}
    loads = {name for name, code in text.items() if "torch.load(" in code}
    assert loads == {"ca2st/weights/foreign.py"}
    assert text["ca2st/weights/foreign.py"].count("torch.load(") == 1
    assert 'map_location="cpu", weights_only=True)' in text["ca2st/weights/foreign.py"]
    pickles = {name for name, code in text.items() if "import pickle" in code}
    assert pickles == {"ca2st/weights/foreign.py", "sharding/datasets/frame_pickle.py"}
    assert not any("pickle.load" in code for code in text.values())
    for forbidden in ("weights_only=False", "jit.load", "allow_pickle=True"):
        assert not {name for name, code in text.items() if forbidden in code}, forbidden


def test_5_1_an_evil_file_of_plain_pickle_is_refused(tmp_path, out):
    path = tmp_path / "plain.pth"
    buffer = io.BytesIO()
    pickle.dump({"model": _Evil(tmp_path / "witness")}, buffer)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ForeignFileRefusedError):
        read(path, out)
    assert not (tmp_path / "witness").exists()


def test_the_longest_wait_of_an_import_is_the_callers(tmp_path, monkeypatch):
    monkeypatch.setattr("ca2st.weights.foreign.serve", _sleep)
    with pytest.raises(ForeignFileRefusedError, match=r"within 0\.1 s"):
        import_weights(
            _saved(tmp_path, STATE), tmp_path / "o.safetensors", kind="clip", options=ImportOptions(timeout_seconds=0.1)
        )
