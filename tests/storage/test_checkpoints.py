"""Checkpoints: what loads, what is refused and how, and that nothing half-written is left."""

import os
import pickle
import zipfile
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from guided_diffusion.storage.checkpoints import load_into, load_state_dict, save_atomically
from guided_diffusion.storage.files import write_atomically

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


@pytest.mark.parametrize("name", ["model.pt", "model", "MODEL.SAFETENSORS", "model.bin"])
def test_safetensors_are_told_by_their_first_bytes(tmp_path, name):
    save_file(STATE, tmp_path / name)
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


def optimizer_state(path):
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), path)


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


def test_a_missing_file_is_refused_and_what_lies_beside_it_named(tmp_path):
    with pytest.raises(ValueError, match=r"no such file\)"):
        load_state_dict(str(tmp_path / "none.pt"))
    (tmp_path / "ema_0.9999_020000.pt").touch()
    (tmp_path / "opt020000.pt").touch()
    with pytest.raises(ValueError, match=r"no such file; beside it: ema_0.9999_020000.pt\)"):
        load_state_dict(str(tmp_path / "model020000.pt"))


def test_the_moving_average_beside_is_mentioned_to_who_loads_a_network(tmp_path, caplog):
    network = torch.nn.Linear(3, 2)
    save_atomically(STATE, tmp_path / "model000010.pt")
    load_into(network, str(tmp_path / "model000010.pt"))
    assert not caplog.text
    save_atomically(STATE, tmp_path / "ema_0.99_000010.pt")
    load_into(network, str(tmp_path / "ema_0.99_000010.pt"))
    assert not caplog.text
    load_into(network, str(tmp_path / "model000010.pt"))
    assert "beside it: ema_0.99_000010.pt" in caplog.text


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("opt000010.pt", optimizer_state, "an optimizer's state"),
        ("run.pt", lambda path: torch.save({"step": 1, "network": STATE, "emas": {}}, path), "ema_….pt beside it"),
        (
            "two.pt",
            lambda path: torch.save({"model": STATE, "other": STATE}, path),
            r"several networks \(model, other\)",
        ),
        (
            "more.pt",
            lambda path: torch.save(STATE | {"args": SimpleNamespace()}, path),
            "tensors: types.SimpleNamespace",
        ),
        (
            "text.pt",
            lambda path: path.write_text("hello"),
            r"not a checkpoint of tensors \(truncated, or another format",
        ),
        ("epoch.pt", lambda path: torch.save(STATE | {"epoch": 5}, path), "every name, got an int for 'epoch'"),
        ("list.pt", lambda path: torch.save([1], path), "wanted tensors by name, got a list"),
        ("lfs.pt", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid"), "Git LFS pointer"),
        ("page.pt", lambda path: path.write_text("\n<!doctype html><html>"), "a web page"),
        ("page.safetensors", lambda path: path.write_text("<HTML>"), "a web page"),
    ],
)
def test_what_it_is_instead_is_said(tmp_path, name, write, said):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=said):
        load_state_dict(str(tmp_path / name))


@pytest.mark.parametrize(
    "wrapped",
    [
        {"state_dict": STATE, "epoch": 3},
        {"model": STATE, "args": {"lr": 1}},
        {f"module.{name}": tensor for name, tensor in STATE.items()},
        {"state_dict": {f"module.{name}": tensor for name, tensor in STATE.items()}},
        *(
            {f"{prefix}{name}": tensor for name, tensor in STATE.items()}
            for prefix in (
                "_orig_mod.",
                "module._orig_mod.",
                "model.",
                "ema_model.",
                "model.diffusion_model.",
                "diffusion_model.",
            )
        ),
        {"ema_model.weight": STATE["weight"], "ema_model.bias": STATE["bias"], "step": torch.tensor(3)}
        | {f"online_model.{name}": tensor + 1 for name, tensor in STATE.items()},
    ],
)
def test_wrappers_are_taken_off(tmp_path, wrapped):
    torch.save(wrapped, tmp_path / "wrapped.pt")
    same(load_state_dict(str(tmp_path / "wrapped.pt")))


def test_a_prefix_of_some_names_is_a_part_of_them(tmp_path):
    torch.save({"model.weight": STATE["weight"], "bias": STATE["bias"]}, tmp_path / "part.pt")
    assert list(load_state_dict(str(tmp_path / "part.pt"))) == ["model.weight", "bias"]


def test_half_precision_weights_fill_a_float32_network_from_meta(tmp_path):
    save_file({name: tensor.half() for name, tensor in STATE.items()}, tmp_path / "half.safetensors")
    with torch.device("meta"):
        network = torch.nn.Linear(3, 2)
    load_into(network, str(tmp_path / "half.safetensors"))
    assert network.weight.dtype is torch.float32
    assert torch.equal(network.weight, STATE["weight"])
    (tmp_path / "half.safetensors").unlink()  # nothing may still be mapped from it
    assert network.weight.sum() == 15


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
