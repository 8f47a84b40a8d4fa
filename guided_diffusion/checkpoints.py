"""Reading and writing weights safely: nothing that can execute code is loaded, nothing half-written is left."""

import io
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import blobfile as bf
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

bf.configure(retry_limit=5, log_callback=lambda message: None)


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there: the whole file or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_atomically(state: Any, path: str | Path) -> None:
    """torch.save that leaves the old file or the new one, never a part."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_state_dict(path: str) -> dict[str, Tensor]:
    """Tensors by name from a `.pt` (zip or older format, `weights_only`) or `.safetensors` file.

    path: local, or what blobfile opens (`gs://`, `az://`, …). A ValueError says in one sentence what is wrong.
    """
    try:
        with bf.BlobFile(path, "rb", streaming=False) as file:
            data = file.read()
    except (OSError, bf.Error) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: cannot be read ({reason})") from None
    try:
        if path.endswith(".safetensors"):
            state = load_safetensors(data)
        else:
            if zipfile.is_zipfile(io.BytesIO(data)) and zipfile.ZipFile(io.BytesIO(data)).testzip():
                raise ValueError(f"{path}: damaged, a checksum does not match")
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except ValueError:
        raise
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    except Exception as error:
        # torch.load reports foreign, truncated and hostile files by many types; all mean the same to the user.
        hint = "it holds more than tensors" if "weights_only" in str(error) else "truncated, or another format"
        raise ValueError(f"{path}: not a checkpoint of tensors ({hint})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: not a state dict: wanted a tensor for every name")
    return state


def load_into(network: nn.Module, path: str) -> None:
    """Fill `network` from a checkpoint file; a ValueError counts what does not fit and shows the first of each."""
    state = load_state_dict(path)
    own = network.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    differing = [
        f"{name} (wanted {list(own[name].shape)}, got {list(state[name].shape)})"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    found = [("missing", missing), ("unexpected", unexpected), ("of another shape", differing)]
    wrong = [f"{len(names)} {kind}, first {names[0]}" for kind, names in found if names]
    if wrong:
        raise ValueError(f"{path}: does not fit the network that the flags describe; tensors: {'; '.join(wrong)}")
    network.load_state_dict(state)
