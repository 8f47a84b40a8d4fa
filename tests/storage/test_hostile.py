"""Three hundred mutated files: each is read as it was, or refused by one sentence; none runs code or fills memory."""

import gzip
import io
import json
import os
import pickle
import random
import time
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from guided_diffusion.runs.sample_store import SampleStore
from guided_diffusion.settings.guidance import GuidanceConfig
from guided_diffusion.settings.model import NetworkConfig
from guided_diffusion.settings.options import BadInput, merge
from guided_diffusion.settings.shipped import read_yaml
from guided_diffusion.storage import files
from guided_diffusion.storage.checkpoints import load_state_dict
from guided_diffusion.storage.files import json_text
from guided_diffusion.storage.given_images import GivenImages
from guided_diffusion.storage.images import read_picture

STATE = {"weight": torch.arange(40.0).reshape(8, 5), "bias": torch.ones(8)}
IMAGES = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
YAML = b"image_size: 64\nnum_channels: 128\nclass_cond: true\nsag_scale: 0.5\nsag_block: middle_block.1\n"


class Runs:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def mutate(data, seed):
    """Cut, flip, double, swap or fill some of the bytes."""
    chance = random.Random(seed)
    data = bytearray(data)
    kind = chance.choice(["cut", "flip", "flips", "zero", "insert", "double", "swap", "tail"])
    where = chance.randrange(len(data))
    if kind == "cut":
        del data[where:]
    elif kind == "flip":
        data[where] ^= 1 << chance.randrange(8)
    elif kind == "flips":
        for _ in range(20):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "zero":
        data[where : where + 16] = bytes(len(data[where : where + 16]))
    elif kind == "insert":
        data[where:where] = bytes(chance.randrange(256) for _ in range(9))
    elif kind == "double":
        data += bytes(data)
    elif kind == "swap":
        data = data[where:] + data[:where]
    else:
        data += b"\x80\x04cos\nsystem\n."
    return bytes(data)


def torch_bytes(value, **settings):
    file = io.BytesIO()
    torch.save(value, file, **settings)
    return file.getvalue()


def npz_bytes(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "owned").exists()


def refused_or(path, data, read):
    """What reading the file gives, or None if it is refused by a ValueError of one line."""
    path.write_bytes(data)
    try:
        return read(str(path))
    except ValueError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 1000
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_mutated_checkpoints(tmp_path, kind):
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pt")
    if kind == "safetensors":
        save_file(STATE, path)
        data = path.read_bytes()
    else:
        data = torch_bytes(STATE, _use_new_zipfile_serialization=kind == "zip")
    refused = 0
    for seed in range(60):
        state = refused_or(path, mutate(data, seed), load_state_dict)
        refused += state is None
        if state is not None:
            assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    assert refused > 10


def hostile_objects():
    return [
        pickle.dumps(Runs()),
        torch_bytes({"weight": Runs()}),
        torch_bytes({"state_dict": {"weight": torch.ones(1), "more": Runs()}}),
        torch_bytes([Runs()]),
        torch_bytes({"weight": Runs()}, _use_new_zipfile_serialization=False),
        gzip.compress(torch_bytes(STATE)),
        npz_bytes(weight=np.array([Runs()], dtype=object)),
        b"\x80\x02" + b"(" * 5000,
        json.dumps({"weight": [1, 2]}).encode(),
        (2**63 - 1).to_bytes(8, "little") + b"{}",
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_hostile_objects_as_checkpoints(tmp_path, number, suffix):
    assert refused_or(tmp_path / f"x.{suffix}", hostile_objects()[number], load_state_dict) is None


def read_base(path):
    return GivenImages(path, 4, 4, "base_samples", num_classes=5)


def test_mutated_base_samples(tmp_path):
    data = npz_bytes(arr_0=IMAGES, arr_1=np.array([0, 3, 1]))
    refused = 0
    for seed in range(60):
        images = refused_or(tmp_path / "x.npz", mutate(data, seed), read_base)
        refused += images is None
        if images is not None:
            assert images.read([0]).shape == (1, 3, 4, 4)
    assert refused > 20


def bomb(name):
    """An npz member of 1 GB of zeros in 1 MB."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(name, "w", force_zip64=True) as member,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": (2**24, 4, 4, 3)}
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(64):
            member.write(bytes(2**20))
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        npz_bytes(arr_0=np.array([Runs()], dtype=object), arr_1=np.zeros(1, int)),
        npz_bytes(**{"../arr_0": IMAGES, "arr_1": np.zeros(3, int)}),
        npz_bytes(arr_0=IMAGES, arr_1=np.full(3, 2**40)),
        bomb("arr_0.npy"),
        bomb("../../arr_0.npy"),
        pickle.dumps(Runs()),
        b"",
    ],
    ids=range(7),
)
def test_hostile_base_samples(tmp_path, data):
    assert refused_or(tmp_path / "x.npz", data, read_base) is None


def test_zeros_that_fill_the_memory_are_no_images(tmp_path, monkeypatch):
    """3 GiB in 3 MB, made small."""
    monkeypatch.setattr(files, "LARGE", 2**20)
    np.savez_compressed(tmp_path / "bomb.npz", arr_0=np.zeros((2**19, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"arr_0: 25165824 bytes in .*not images, but a bomb"):
        GivenImages(str(tmp_path / "bomb.npz"), 4, 4, "base_samples")
    monkeypatch.setattr(files, "LARGE", 2**25)
    assert len(GivenImages(str(tmp_path / "bomb.npz"), 4, 4, "base_samples")) == 2**19


def read_settings(path):
    return merge((NetworkConfig, GuidanceConfig), (path, read_yaml(path)))


def test_mutated_yaml(tmp_path):
    refused = 0
    for seed in range(60):
        refused += refused_or(tmp_path / "x.yaml", mutate(YAML, seed), read_settings) is None
    assert refused > 20


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir [owned]",
        "image_size: !!python/name:os.mkdir",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nimage_size: *c",
        "image_size: 1e400",
        "image_size: {a: 1}",
        "? [a, b]\n: 3",
        "3: 4",
        "image_size: " + "[" * 3000,
        "\x00",
        "image_size: 2020-01-01",
        "image_size: !!binary aaaa",
        "image_size: 64.5",
        "image_size: .inf",
        "image_size: !!bool x",
        "image_size: !!int ''",
        "image_size: 0x1" + "0" * 5000,
        "image_size: 1" + "0" * 29,
        'image_size: "' + "9" * 5000 + '"',
        "x" * 9000 + ": 1",
        "image_size: &a [*a]",
    ],
    ids=range(20),
)
def test_hostile_yaml(tmp_path, text):
    assert refused_or(tmp_path / "x.yaml", text.encode(), read_settings) is None


@pytest.mark.parametrize("levels", [6, 9, 40])
@pytest.mark.parametrize("merged", [False, True])
def test_aliases_of_aliases_are_refused_at_once(tmp_path, levels, merged):
    first = "a0: &a0 {x: 1}" if merged else "a0: &a0 [" + ", ".join("x" * 10) + "]"
    more = [f"a{i}: &a{i} " + ("{<<: [%s]}" if merged else "[%s]") % ", ".join([f"*a{i - 1}"] * 10)
            for i in range(1, levels)]  # fmt: skip
    text = "\n".join([first, *more, f"image_size: *a{levels - 1}"])
    started = time.process_time()
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"x\.yaml: holds more than 10000 keys and values") as error:
        read_settings(str(tmp_path / "x.yaml"))
    assert len(str(error.value)) < 300
    assert time.process_time() - started < 1


def test_an_alias_that_is_used_twice_is_read(tmp_path):
    (tmp_path / "x.yaml").write_text("image_size: &size 32\nnum_channels: *size\n")
    assert read_settings(str(tmp_path / "x.yaml"))[0].num_channels == 32


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({1: torch.ones(1)}, "no text that can be printed"),
        ({("a", "b"): torch.ones(1)}, "no text that can be printed"),
        ({1: {"a": torch.ones(1)}, 2: {"a": torch.ones(1)}}, r"several networks \(1, 2\)"),
        ({"a\x1b[31m": torch.ones(1)}, r"no text that can be printed: 'a\\x1b\[31m'"),
        ({"a" * 5000 + "\n": torch.ones(1)}, "no text that can be printed: 'aaa"),
    ],
    ids=range(5),
)
def test_names_of_tensors_are_texts_that_can_be_shown(tmp_path, state, said):
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=said) as error:
        load_state_dict(str(tmp_path / "x.pt"))
    assert len(str(error.value)) < 400


def test_a_sentence_controls_no_terminal_and_is_no_page():
    message = BadInput("\x1b[31mred\n" + "x" * 10**6 + "; give another").message
    assert message.isprintable()
    assert message.startswith("\\x1b[31mred")
    assert message.endswith("; give another")
    assert len(message) < 1100


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_are_not_waited_for(tmp_path):
    for name in ("x.png", "x.npz", "x.pt"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=r"x\.png \(a pipe or a device, not a file\)"):
        GivenImages(str(tmp_path), 4, 4, "base_samples")
    with pytest.raises(ValueError, match=r"x\.png: not an image that can be read \(a pipe"):
        read_picture(tmp_path / "x.png", lambda image: image)
    with pytest.raises((ValueError, OSError), match="a pipe or a device"):
        GivenImages(str(tmp_path / "x.npz"), 4, 4, "base_samples")
    with pytest.raises(ValueError, match=r"x\.pt: cannot be read \(a pipe"):
        load_state_dict(str(tmp_path / "x.pt"))


def test_mutated_manifests(tmp_path):
    store = SampleStore(str(tmp_path), {"seed": 1, "sigma": 2.0}, 3, 2, (4, 4, 3), labelled=False)
    store.write_manifest({})
    path, data = tmp_path / "manifest.json", (tmp_path / "manifest.json").read_bytes()
    for seed in range(60):
        said = refused_or(path, mutate(data, seed), lambda _: store.check())
        assert said in ("", None) or "damaged" in said


def test_json_of_numbers_that_are_not_finite_is_json():
    given = {"σ": float("inf"), "of": [-float("inf"), (float("nan"), 1.5)], "value": np.float64("inf"), "n": 3}
    text = json_text(given)
    assert text.isascii()
    wanted = {"σ": "inf", "of": ["-inf", [None, 1.5]], "value": "inf", "n": 3}
    assert json.loads(text, parse_constant=pytest.fail) == wanted
