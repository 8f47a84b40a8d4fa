"""The golden cases: recipes for weights and inputs, and what the reference implementations made of them."""

import json
import shlex
import zlib
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / "data"
TOLERANCE = 2e-4  # of an array's largest magnitude


def names(part):
    return sorted(path.stem for path in (DATA / part).glob("*.json"))


def load(part, name):
    """(what was run, what came out) of one case."""
    case = json.loads((DATA / part / f"{name}.json").read_text())
    with np.load(DATA / part / f"{name}.npz") as arrays:
        return case, {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def flags(text):
    parts = shlex.split(text)
    return {key.removeprefix("--"): value for key, value in zip(parts[::2], parts[1::2], strict=True)}


def normal(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def labels(seed, size):
    return torch.from_numpy(np.random.RandomState(seed + 7).randint(0, 1000, size=size))


def fill(network):
    """Give every tensor the numbers that its name and shape stand for."""
    state = network.state_dict()
    for name, tensor in state.items():
        numbers = normal(zlib.crc32(name.encode()), *tensor.shape)
        if tensor.ndim >= 2:
            numbers /= np.sqrt(np.prod(tensor.shape[1:]))
        else:
            numbers = 1 + 0.1 * numbers if name.endswith("weight") else 0.1 * numbers
        state[name] = numbers
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def difference(ours, reference):
    """Largest difference as a share of the reference's largest magnitude."""
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def assert_close(ours, reference, tolerance=TOLERANCE):
    assert ours.shape == reference.shape
    assert difference(ours, reference) <= tolerance


INCEPTION = dict(json.loads((DATA / "inception" / "tensors.json").read_text()))
"""The names and shapes of the tensors of the Inception graph."""
