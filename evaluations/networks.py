"""Networks that turn images into the features that metrics compare: their interface, and loading them safely."""

import hashlib
import platform
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Features:
    """Features of N images. pool: [N, D]; spatial: [N, S], for sFID; logits: [N, K], for the Inception score."""

    pool: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A network with its weights: uint8 images [N, 3, H, W] to `Features`, float32.

    name: as --features calls it, and after a hyphen which of its kinds, where there are several. weights: SHA-256 of
    the weights file. dimensions: D of `Features.pool`. distance: what its Fréchet distance is called.
    """

    name: str
    module: nn.Module
    weights: str
    dimensions: int
    distance: str = "frechet_distance"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __call__(self, images: Tensor) -> Features:
        with torch.inference_mode():
            return self.module(images.to(self.device))


def use_whole_floats() -> None:
    """No TF32 on a GPU: its short mantissa would show in the third digit of a metric."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def versions() -> dict[str, str]:
    """Versions of what computes features and metrics."""
    return {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}


def sha256(path: str | Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def load_weights(module: nn.Module, path: str | Path, device: torch.device) -> str:
    """Fill a module (built on the meta device) from a file of torch's or safetensors', exactly; returns its SHA-256.

    Nothing in the file is executed. A ValueError names the file, the first tensor that does not fit, and both shapes.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file of weights")
    try:
        with open(path, "rb") as file:
            # safetensors begin with the length of a header, which is JSON.
            is_safetensors = file.read(9).endswith(b"\0\0\0\0{")
        state = load_file(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, zipfile.BadZipFile, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a file of weights ({type(error).__name__})") from None
    except Exception as error:  # pickle.UnpicklingError and what hostile files raise beside it
        raise ValueError(f"{path}: not a file of weights that can be loaded safely ({type(error).__name__})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: wanted a dict of tensors, got something else")
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for name in sorted(wanted.keys() | state.keys()):
        got = "nothing" if name not in state else list(state[name].shape)
        want = "nothing" if name not in wanted else list(wanted[name])
        if got != want:
            raise ValueError(f"{path}: {name}: wanted {want}, got {got}")
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    # Compared above; torch itself would add counters to the batch norms of a file that holds none.
    module.load_state_dict(state, assign=True, strict=False)
    module.to(device).eval().requires_grad_(False)
    return sha256(path)
