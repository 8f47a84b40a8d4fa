"""Hashes of large files: computed once, remembered while the file is the same, and compared with those beside it."""

import os
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from guided_diffusion.settings.shipped import shipped
from guided_diffusion.storage import hashes
from guided_diffusion.storage.checkpoints import load_state_dict
from guided_diffusion.storage.files import sha256


@pytest.fixture(autouse=True)
def hashed(tmp_path, monkeypatch):
    """The files that were read for a hash; all are large."""
    monkeypatch.setenv("SAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "SMALL", 0)
    read = []
    monkeypatch.setattr(hashes, "sha256", lambda path: read.append(str(path)) or sha256(path))
    return read


def test_a_file_is_hashed_once_while_it_is_the_same(tmp_path, hashed):
    file = tmp_path / "x"
    file.write_bytes(b"abc")
    assert [hashes.known_sha256(file) for _ in range(3)] == [sha256(file)] * 3
    assert len(hashed) == 1
    file.write_bytes(b"abd")
    os.utime(file, ns=(1, 1))
    assert hashes.known_sha256(file) == sha256(file)
    assert len(hashed) == 2


def test_a_hash_is_not_believed_for_ever(tmp_path, hashed):
    file = tmp_path / "x"
    file.write_bytes(b"abc")
    hashes.known_sha256(file)
    [memory] = (path for path in (tmp_path / "cache" / "hashes").iterdir() if path.suffix != ".lock")
    yesterday = time.time() - hashes.BELIEVED_S - 1
    os.utime(memory, (yesterday, yesterday))
    hashes.known_sha256(file)
    assert len(hashed) == 2


def test_without_a_place_to_remember_it_is_computed(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"abc")
    monkeypatch.setenv("SAG_CACHE", str(tmp_path / "file" / "below"))
    assert hashes.known_sha256(tmp_path / "file") == sha256(tmp_path / "file")


@pytest.mark.parametrize("seed", range(10))
def test_a_flipped_bit_in_weights_is_found_by_the_hash_beside_them(tmp_path, seed):
    file = tmp_path / "x.safetensors"
    save_file({"weight": torch.arange(40.0)}, file)
    (tmp_path / "x.safetensors.sha256").write_text(f"{sha256(file)}  x.safetensors\n")
    assert load_state_dict(str(file))["weight"][39] == 39
    data = bytearray(file.read_bytes())
    chance = np.random.default_rng(seed)
    data[chance.integers(len(data))] ^= 1 << chance.integers(8)
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.safetensors: damaged or changed, its SHA-256 is not the one in x\."):
        load_state_dict(str(file))


def test_a_hash_that_is_none_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"weight": torch.arange(40.0)}, file)
    (tmp_path / "x.safetensors.sha256").write_text("none")
    with pytest.raises(ValueError, match=r"x\.safetensors\.sha256: wanted a SHA-256"):
        load_state_dict(str(file))


@pytest.mark.parametrize("name", ["emoji32", "emoji32_classifier"])
def test_embedded_weights_have_theirs(name):
    file = shipped(f"models/{name}.safetensors")
    assert (file.parent / f"{file.name}.sha256").is_file()
    hashes.check_beside(file)
