"""Who made a result: device, dtype and versions, and the job that a scheduler may start again."""

import os
import platform
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from .. import __version__

RESTARTS = {
    "SLURM_JOB_ID": "SLURM_RESTART_COUNT",
    "LSB_JOBID": "LSB_RESTART",
    "TORCHELASTIC_RUN_ID": "TORCHELASTIC_RESTART_COUNT",
}
"""Where Slurm, LSF and torchrun tell the name of a job, the same at every start, and whether it was started again."""


def versions() -> dict[str, str]:
    """Versions of what made a result."""
    return {
        "guided_diffusion": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    } | {name: sys.modules[name].__version__ for name in ("diffusers", "transformers") if sys.modules.get(name)}


def device_name(device: torch.device) -> str:
    """cpu, or the model of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def made_by(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What results are made by here: they are equal to others' only up to rounding where it is not the same."""
    return {"device": device_name(device), "dtype": str(dtype).removeprefix("torch."), "versions": versions()}


def distinct(makers: Iterable[tuple[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Each different `made_by` once, with `samples`, the number of samples that it made; makers: (samples, made_by)."""
    found: list[dict[str, Any]] = []
    for samples, maker in makers:
        known = next((one for one in found if {**one, "samples": 0} == {**maker, "samples": 0}), None)
        if known is None:
            found.append({**maker, "samples": samples})
        else:
            known["samples"] += samples
    return found


def what_differs(makers: list[dict[str, Any]]) -> str:
    """A sentence where samples of different makers (`distinct`) stand beside each other, else nothing."""
    flat = [{**maker, **of} if isinstance(of := maker.get("versions"), dict) else maker for maker in makers]
    keys = dict.fromkeys(key for maker in flat for key in maker if key not in ("versions", "samples"))
    parts = []
    for key in keys:
        counts: dict[str, int] = {}
        for maker in flat:
            value = str(maker.get(key, "not known"))
            counts[value] = counts.get(value, 0) + maker["samples"]
        if len(counts) > 1:
            parts.append(f"{key} {', '.join(f'{value} ({count})' for value, count in counts.items())}")
    if not parts:
        return ""
    return f"not all were made alike, so they are equal to those of one maker up to rounding only: {'; '.join(parts)}\n"


def jobs(started_again: bool = False) -> list[str]:
    """The names of the jobs that this process belongs to; started_again: of those that were started before."""
    return [
        f"{name} {os.environ[name]}"
        for name, restarts in RESTARTS.items()
        if name in os.environ and not (started_again and os.environ.get(restarts, "0") in ("", "0", "N"))
    ]
