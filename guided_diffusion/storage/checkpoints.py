"""Reading and writing weights safely: nothing that can execute code is loaded, nothing half-written is left."""

import argparse
import logging
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..settings.options import quoted
from .fetch import WEB_PAGE, local_path
from .files import open_regular, write_atomically
from .hashes import check_beside

StateDict = dict[str, Tensor]

WRAPPERS = ("module.", "_orig_mod.", "model.", "ema_model.", "diffusion_model.")
"""What data parallelism, torch.compile, Lightning, ema-pytorch and latent diffusion write before every name."""

SAFETENSORS = re.compile(rb"....\0\0\0\0\{", re.DOTALL)
"""How such a file begins: the length of a header, which is JSON."""

MORE = re.compile(r"GLOBAL ([\w.]{1,80})")
"""What in torch.load's message names an object that is no tensor."""

log = logging.getLogger(__name__)


def save_atomically(state: Any, path: str | Path) -> None:
    """torch.save that leaves the old file or the new one, never a part."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_state_dict(path: str) -> StateDict:
    """Tensors by name from a file of weights, as `load`; wrappers (`{"state_dict": …}`, `WRAPPERS`) are taken off.

    Of a training's `{"model": …, "ema": …}` (DiT's and SiT's) the moving average is read.

    Tensors may be mapped from the file: copy them before the file changes.
    """
    return _state_of(load(path, mmap=True), path)


def load(path: str, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """What a file of torch's (zip or older format, `weights_only`) or of safetensors' holds, as it is.

    path: local, with its hash beside a file of safetensors in FILE.sha256 if that is there; or an address (`https://`,
    `gs://`, …), which is fetched once into the cache; the first bytes tell the format. map_location: as torch.load's;
    of safetensors a device. mmap: leave the tensors of a file of torch's on disk until they are used. A ValueError says
    in one sentence what is wrong.
    """
    file = local_path(path)
    try:
        with open_regular(file) as stream:
            head = stream.read(64)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        reason = f"no such file{_beside(file, 'ema_', 'model')}" if missing else error.strerror or type(error).__name__
        raise ValueError(f"{path}: cannot be read ({reason})") from None
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` where it came from")
    if WEB_PAGE.match(head):
        raise ValueError(f"{path}: a web page, not a checkpoint; its download failed")
    if SAFETENSORS.match(head) or path.endswith(".safetensors"):
        return _load_safetensors(file, map_location)
    return read_pt(file, map_location, mmap)


def _load_safetensors(file: Path, device: torch.device | str) -> StateDict:
    check_beside(file)
    try:
        return load_file(file, str(device))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a safetensors file ({error})") from None


def read_pt(file: Path, map_location: Any = "cpu", mmap: bool = True) -> Any:
    """What a `.pt` file of tensors and plain values holds, maybe mapped from it; a ValueError if it holds more."""
    try:
        is_zip = zipfile.is_zipfile(file)
        damaged = is_zip and zipfile.ZipFile(file).testzip()
        if not damaged:
            # A training's arguments, as argparse has them, are plain values by name.
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(file, map_location, weights_only=True, mmap=mmap and is_zip)
    except Exception as error:
        if "map_location" in str(error):  # the device that was asked for is not there
            raise
        # torch.load reports foreign, truncated and hostile files by many types; all mean the same to the user.
        more = MORE.search(str(error))
        hint = f"it holds more than tensors: {more[1]}" if more else "truncated, or another format"
        raise ValueError(f"{file}: not a checkpoint of tensors ({hint})") from None
    raise ValueError(f"{file}: damaged, the checksum of {damaged} does not match")


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(part, Tensor) for part in value.values())


def _state_of(loaded: Any, path: str) -> StateDict:
    if isinstance(loaded, dict) and not _is_state(loaded):
        if "param_groups" in loaded:
            raise ValueError(
                f"{path}: an optimizer's state; the weights are in a file like ema_0.9999_….pt or model….pt"
            )
        if "emas" in loaded:
            raise ValueError(f"{path}: the state of a training run; its weights are in the ema_….pt beside it")
        wrapped = [key for key, value in loaded.items() if _is_state(value)]
        if len(wrapped) == 1 or (set(wrapped) == {"model", "ema"}):
            loaded = loaded["ema" if "ema" in wrapped else wrapped[0]]
        elif wrapped:
            names = ", ".join(map(str, wrapped))
            raise ValueError(f"{path}: holds several networks ({names}); save the one you mean by itself")
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"{path}: not a state dict: wanted tensors by name, got {_kind(loaded)}")
    for name, value in loaded.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: not a state dict: wanted a tensor for every name, got {_kind(value)} for {quoted(name)}"
            )
        if not isinstance(name, str) or not name.isprintable():
            raise ValueError(f"{path}: a tensor's name is no text that can be printed: {quoted(name)}")
    # ema-pytorch's has counters, and maybe the network as trained, beside the average.
    loaded = {name: tensor for name, tensor in loaded.items() if name.startswith("ema_model.")} or loaded
    while prefix := next((prefix for prefix in WRAPPERS if all(name.startswith(prefix) for name in loaded)), ""):
        loaded = {name.removeprefix(prefix): tensor for name, tensor in loaded.items()}
    return loaded


def _kind(value: Any) -> str:
    return f"a{'n' if type(value).__name__[0] in 'aeiou' else ''} {type(value).__name__}"


def _beside(file: Path, *beginnings: str) -> str:
    """Which files of the same step, named as upstream does, lie beside `file`, for a sentence about it."""
    step = re.search(r"(\d{6,})\.pt$", file.name)
    others = sorted(path.name for path in file.parent.glob(f"*{step[1]}.pt")) if step and file.parent.is_dir() else []
    others = [name for name in others if name.startswith(beginnings)]
    return f"; beside it: {', '.join(others)}" if others else ""


def misfit(network: nn.Module, state: StateDict) -> str:
    """How the tensors of `state` differ from the network's: how many of each kind and the first; empty if not."""
    own = network.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    differing = [
        f"{name} (wanted {list(own[name].shape)}, got {list(state[name].shape)})"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    found = [("missing", missing), ("unexpected", unexpected), ("of another shape", differing)]
    return "; ".join(f"{len(names)} {kind}, first {names[0]}" for kind, names in found if names)


def load_into(
    network: nn.Module,
    path: str,
    device: torch.device | str = "cpu",
    explain: Callable[[dict[str, torch.Size]], str] | None = None,
) -> None:
    """Fill `network` from a checkpoint file, on `device`; a ValueError says what does not fit.

    A network built on the `meta` device gets its memory here, so that it never is in memory twice. explain: makes of
    the shapes of a file that does not fit what is to be said of the flags.
    """
    state = load_state_dict(path)
    if Path(path).name.startswith("model") and (ema := _beside(Path(path), "ema_")):
        log.warning("%s: the weights as trained; their moving average samples better%s", path, ema)
    wrong = misfit(network, state)
    if wrong:
        hint = explain({name: tensor.shape for name, tensor in state.items()}) if explain else ""
        reason = f"{hint}; " if hint else ""
        raise ValueError(f"{path}: does not fit the network that the flags describe: {reason}tensors: {wrong}")
    if any(parameter.is_meta for parameter in network.parameters()):
        network.to_empty(device=device)
    network.to(device).load_state_dict(state)
