"""The Inception graph against torch-fidelity's numbers, its resize against the formula, and its weights file."""

import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from evaluations.inception import SHA256, Inception, published_weights, tf_resize
from evaluations.networks import load_weights
from golden import DATA, INCEPTION


@pytest.mark.parametrize("size", [32, 64, 256, 300])
def test_features_are_those_of_the_reference(network, size):
    images = np.random.RandomState(size).randint(0, 256, size=(3, size, size, 3)).astype(np.uint8)
    features = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    with np.load(DATA / "inception" / "features.npz") as golden:
        for name, ours in (
            ("pool", features.pool),
            ("spatial", features.spatial),
            ("logits_unbiased", features.logits),
        ):
            wanted = golden[f"{name}_{size}"]
            assert ours.shape == wanted.shape
            assert np.abs(ours.numpy() - wanted).max() <= 1e-5 * np.abs(wanted).max()
        with_bias = features.logits + network.module.fc.bias
        np.testing.assert_allclose(
            with_bias, golden[f"logits_{size}"], atol=1e-5 * np.abs(golden[f"logits_{size}"]).max()
        )


def test_spatial_features_have_upstreams_layout(network):
    """Channels last: the golden file tells the right layout from the others."""
    images = np.random.RandomState(64).randint(0, 256, size=(3, 64, 64, 3)).astype(np.uint8)
    spatial = network(torch.from_numpy(images).permute(0, 3, 1, 2)).spatial.numpy()
    with np.load(DATA / "inception" / "features.npz") as golden:
        wanted = golden["spatial_64"]
    channels_first = spatial.reshape(3, 17, 17, 7).transpose(0, 3, 1, 2).reshape(3, -1)
    columns_first = spatial.reshape(3, 17, 17, 7).transpose(0, 2, 1, 3).reshape(3, -1)
    for wrong in (channels_first, columns_first):
        assert np.abs(wrong - wanted).max() > 0.1 * np.abs(wanted).max()


def test_tensors_are_those_of_the_known_file():
    with torch.device("meta"):
        state = Inception().state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == INCEPTION


@pytest.mark.parametrize("size", [32, 64, 256, 299, 512])
def test_resize_is_the_formula(size):
    rng = np.random.default_rng(size)
    image = rng.integers(0, 256, (size, size)).astype(np.float32)
    ours = tf_resize(torch.from_numpy(image)[None, None])[0, 0]
    for row, column in [(0, 0), (298, 298), (297, 1), *rng.integers(0, 299, (200, 2)).tolist()]:

        def place(i):
            source = i * (size / 299)
            low = math.floor(np.float32(source))
            return low, min(low + 1, size - 1), float(np.float32(source)) - low

        (top, bottom, down), (left, right, across) = place(row), place(column)
        upper = image[top, left] + (image[top, right] - image[top, left]) * across
        lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * across
        assert float(ours[row, column]) == pytest.approx(upper + (lower - upper) * down, abs=2e-2)


def test_resize_takes_images_that_are_not_square():
    image = torch.rand(1, 3, 20, 40)
    both = tf_resize(image)
    assert both.shape == (1, 3, 299, 299)
    assert torch.equal(both[..., 0], tf_resize(image[..., :20])[..., 0])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.pop("fc.bias"), "fc.bias: wanted [1008], got nothing"),
        (lambda state: state.update(more=torch.zeros(2)), "more: wanted nothing, got [2]"),
        (lambda state: state.update({"fc.bias": torch.zeros(1000)}), "fc.bias: wanted [1008], got [1000]"),
        (lambda state: state.update({"fc.bias": "text"}), "wanted a dict of tensors"),
    ],
)
def test_other_files_are_refused(tmp_path, change, sentence):
    with torch.device("meta"):
        module = Inception()
    state = {name: torch.zeros(shape) for name, shape in INCEPTION.items()}
    change(state)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=rf"other\.pth: {re.escape(sentence)}"):
        load_weights(module, tmp_path / "other.pth", torch.device("cpu"))


@pytest.mark.parametrize("name", ["weights.pth", "weights", "weights.safetensors"])
def test_safetensors_are_told_by_their_first_bytes(tmp_path, name):
    with torch.device("meta"):
        module = torch.nn.Linear(3, 2)
    save_file({"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}, tmp_path / name)
    load_weights(module, tmp_path / name, torch.device("cpu"))
    assert module.weight.tolist() == [[0, 1, 2], [3, 4, 5]]


class Payload:
    def __reduce__(self):
        return (exec, ("raise AssertionError('executed')",))


def test_nothing_in_a_weights_file_is_executed(tmp_path):
    torch.save({"fc.bias": Payload()}, tmp_path / "hostile.pth")
    with torch.device("meta"):
        module = Inception()
    with pytest.raises(ValueError, match="loaded safely"):
        load_weights(module, tmp_path / "hostile.pth", torch.device("cpu"))
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.pth: not a file of weights"):
        load_weights(module, tmp_path / "text.pth", torch.device("cpu"))


def test_the_published_file_is_known_by_its_hash(tmp_path, monkeypatch):
    def download(address, path, hash_prefix):
        assert address.endswith(f"{hash_prefix[:8]}.pth")
        assert hash_prefix == SHA256
        with open(path, "wb") as file:
            file.write(b"something else")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(ValueError, match="wanted SHA-256 6726825d"):
        published_weights(tmp_path)

    def no_network(*_arguments, **_more):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(ValueError, match=r"cannot be fetched \(no route to host\).*--inception FILE"):
        published_weights(tmp_path / "new")
