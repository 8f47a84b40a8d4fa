"""What lies in the folder of a training run, ours or upstream's: which files belong together, and which may go."""

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import blobfile as bf
from torch import optim

from ..storage.checkpoints import read_pt
from ..storage.files import writing

WEIGHTS = re.compile(r"(model|ema_[0-9.e-]+_)([0-9]{6,})\.pt")
"""Upstream's names: modelSTEP.pt and ema_RATE_STEP.pt."""

NOT_OF_THE_RESULT = {
    "out_dir", "log_interval", "save_interval", "sample_interval", "eval_interval", "keep", "resume",
    "resume_checkpoint", "num_workers",
}  # fmt: skip
"""Settings that change no weight."""


CHECKPOINT, PREVIOUS, SPOILED = "checkpoint.pt", "checkpoint_before.pt", "checkpoint_spoiled.pt"


def keep_previous(folder: Path) -> None:
    """Keep the checkpoint under another name, before a new one is written in its place."""
    checkpoint, previous = folder / CHECKPOINT, folder / PREVIOUS
    if checkpoint.is_file():
        previous.unlink(missing_ok=True)
        try:
            os.link(checkpoint, previous)
        except OSError:  # a file system without links
            with writing(previous):
                shutil.copyfile(checkpoint, previous)


def drop_previous(folder: Path) -> None:
    """Delete the checkpoint that was kept."""
    (folder / PREVIOUS).unlink(missing_ok=True)


def back_to_previous(folder: Path) -> None:
    """Put the kept checkpoint back in place of the newest one, which gets another name."""
    os.replace(folder / CHECKPOINT, folder / SPOILED)
    os.replace(folder / PREVIOUS, folder / CHECKPOINT)


def step_of(path: str) -> int:
    """The step in the name of an upstream weights file (model500000.pt), 0 where there is none."""
    found = re.fullmatch(r"model([0-9]+)\.pt", Path(path).name)
    return int(found[1]) if found else 0


def beside(path: str, name: str) -> str:
    """The file of this name in the folder of `path`, empty if there is none; of web servers none is known."""
    if path.startswith(("https://", "http://")):
        return ""
    other = bf.join(bf.dirname(path), name)
    return other if bf.exists(other) else ""


def read_optimizer(optimizer: optim.Optimizer, path: str) -> bool:
    """Fill an Adam optimizer from upstream's optSTEP.pt; False if it is one of other parameters (or of float16's)."""
    state = read_pt(Path(path))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        moments = [state["state"][i] for i in range(len(parameters))]
        shapes = [(kept["exp_avg"].shape, kept["exp_avg_sq"].shape) for kept in moments]
        if shapes != [(parameter.shape, parameter.shape) for parameter in parameters]:
            return False
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
    except (KeyError, TypeError, AttributeError, ValueError):
        return False
    return True


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings of a run that are not what they were, for one sentence; empty if all are."""
    names = [name for name in now if name in before and before[name] != now[name] and name not in NOT_OF_THE_RESULT]
    return ", ".join(f"{name} {now[name]} (was {before[name]})" for name in names)


def sweep(folder: Path) -> None:
    """Delete the temporary files that a killed run left half-written."""
    for path in folder.glob(".*.pt.*"):
        path.unlink()


def prune(folder: Path, names: Iterable[str], keep: int) -> None:
    """Of each kind of weights just written, delete all files of earlier steps but the newest; keep 0 deletes none.

    names: of the files just written. keep: how many of each kind stay, those included.
    """
    for name in names if keep else ():
        kind, step = WEIGHTS.fullmatch(name).groups()
        found = [(WEIGHTS.fullmatch(path.name), path) for path in folder.iterdir()]
        older = [
            (int(match[2]), path) for match, path in found if match and match[1] == kind and int(match[2]) <= int(step)
        ]
        for _, path in sorted(older)[:-keep]:
            path.unlink()
