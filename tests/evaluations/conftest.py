"""The Inception graph with the made-up weights of the golden run."""

import zlib

import numpy as np
import pytest
import torch

from evaluations.inception import inception
from golden import INCEPTION


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAG_CACHE", str(tmp_path / "cache"))


def tensor(name, shape):
    """The made-up weights of the golden run."""
    n = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF).standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        n = 1 + 0.1 * np.abs(n)
    elif len(shape) >= 2:
        n = n * np.sqrt(2 / np.prod(shape[1:]))
    else:
        n = (1 if name.endswith("bn.weight") else 0) + 0.1 * n
    return torch.from_numpy(n.astype(np.float32))


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({name: tensor(name, shape) for name, shape in INCEPTION.items()}, path)
    return path


@pytest.fixture(scope="session")
def network(weights_file):
    return inception(weights_file, torch.device("cpu"))
