"""Checkpoints: what loads, what is refused and how, and that nothing half-written is left."""

import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from guided_diffusion.checkpoints import load_into, load_state_dict, save_atomically, write_atomically

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


def same(state):
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)


def test_all_formats_load(tmp_path):
    torch.save(STATE, tmp_path / "zip.pt")
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(STATE, tmp_path / "one.safetensors")
    for name in ("zip.pt", "old.pt", "one.safetensors"):
        same(load_state_dict(str(tmp_path / name)))


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def damaged_zip(path):
    torch.save(STATE, path)
    with zipfile.ZipFile(path) as file:
        member = next(info for info in file.infolist() if info.filename.endswith("data/0"))
    data = bytearray(path.read_bytes())
    data[member.header_offset + 64] ^= 255
    position = bytes(data).find(STATE["weight"].numpy().tobytes()[4:12])
    if position > 0:
        data[position] ^= 255
    path.write_bytes(data)


WRONG = {
    "hostile.pt": lambda path: torch.save({"weight": Hostile()}, path),
    "pickle.pt": lambda path: path.write_bytes(pickle.dumps(Hostile())),
    "text.pt": lambda path: path.write_text("<html>not found</html>"),
    "empty.pt": lambda path: path.write_bytes(b""),
    "text.safetensors": lambda path: path.write_text("<html>not found</html>"),
    "list.pt": lambda path: torch.save([1, 2], path),
    "numbers.pt": lambda path: torch.save({"step": 3}, path),
    "damaged.pt": damaged_zip,
    "folder.pt": lambda path: path.mkdir(),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_checkpoint_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    WRONG[name](tmp_path / name)
    with pytest.raises(ValueError, match=name):
        load_state_dict(str(tmp_path / name))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_truncated_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    torch.save(STATE, path) if suffix == "pt" else save_file(STATE, path)
    data = path.read_bytes()
    for length in (10, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="cut"):
            load_state_dict(str(path))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_state_dict(str(tmp_path / "none.pt"))


def test_what_does_not_fit_is_named(tmp_path):
    network = torch.nn.Linear(3, 2)
    save_atomically(STATE, tmp_path / "good.pt")
    load_into(network, str(tmp_path / "good.pt"))
    assert torch.equal(network.weight, STATE["weight"])
    save_atomically({"weight": torch.ones(4, 3), "extra": torch.ones(1)}, tmp_path / "bad.pt")
    with pytest.raises(
        ValueError, match=r"1 missing, first bias; 1 unexpected, first extra; 1 of another shape.*\[2, 3\]"
    ):
        load_into(network, str(tmp_path / "bad.pt"))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
