"""The likelihood of a folder of images under a model, in bits per dimension, measured by all ranks of a job."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import default_collate

from ..diffusion.diffusion import Diffusion
from ..diffusion.losses import bpd_loop, prior_bpd, vb_terms_bpd
from ..diffusion.noise import SampleNoise
from ..settings.options import exit_on_bad_input
from ..settings.sampling import LikelihoodConfig
from ..storage.files import join, read_arrays, write_atomically
from ..storage.images import ImageFolder, check_images
from .identity import identity, versions
from .progress import Progress
from .ranks import Job
from .sample_store import settings_hash

BY_STEP = ("vb", "mse", "xstart_mse")
Part = dict[str, NDArray[np.float32]]
"""What was measured of some images: prior_bpd [n], and BY_STEP's [n, T], the last step first."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Measurements on disk, `size` images a file, the last file with the rest."""

    folder: str
    count: int
    size: int
    num_steps: int

    @property
    def numbers(self) -> range:
        """The parts."""
        return range(-(-self.count // self.size))

    def indices(self, number: int) -> range:
        """The images of a part."""
        return range(number * self.size, min((number + 1) * self.size, self.count))

    def path(self, number: int) -> str:
        own = self.indices(number)
        return join(self.folder, f"images_{own[0]:07d}_{own[-1]:07d}.npz")

    def read(self, number: int) -> Part:
        """A part; a ValueError or an OSError if it is not there whole."""
        n, kind = len(self.indices(number)), np.dtype(np.float32)
        by_step = dict.fromkeys(BY_STEP, (kind, (n, self.num_steps)))
        with open(self.path(number), "rb") as file:
            return read_arrays(file, {"prior_bpd": (kind, (n,)), **by_step})

    def missing(self) -> list[int]:
        """The parts that are not there whole."""
        return [number for number in self.numbers if not self._is_whole(number)]

    def _is_whole(self, number: int) -> bool:
        try:
            self.read(number)
        except (ValueError, OSError):
            return False
        return True

    def write(self, number: int, part: Part) -> None:
        """Write a part, whole."""
        write_atomically(self.path(number), lambda file: np.savez(file, **part))


def _bound(
    images: ImageFolder,
    indices: Sequence[int],
    network: nn.Module,
    diffusion: Diffusion,
    config: LikelihoodConfig,
    progress: Progress,
) -> Part:
    device = next(network.parameters()).device
    x0, labels = default_collate([images[i] for i in indices])
    condition = {"y": labels.to(device)} if images.class_names else {}
    noise = SampleNoise(config.seed, indices, x0.shape[1:], device)
    denoiser = diffusion.denoiser(network, config.clip_denoised)

    def term(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        prediction = denoiser(x_t, t, condition)
        progress.add(len(x_t))
        return vb_terms_bpd(prediction, x0), prediction.x0

    x0 = x0.to(device)
    found = bpd_loop(diffusion.process, x0, noise, term, partial(prior_bpd, diffusion.process))
    return {name: found[name].float().cpu().numpy() for name in ("prior_bpd", *BY_STEP)}


def measure(
    images: ImageFolder,
    network: nn.Module,
    diffusion: Diffusion,
    config: LikelihoodConfig,
    settings: dict[str, Any],
    job: Job,
) -> dict[str, Any] | None:
    """The variational bound of the first images of a folder; rank 0 has the result, the others None.

    network: ready on its device. settings: all of the run. Batches are measured by whichever rank is free and kept
    below out_dir, so that a stopped run goes on; leaves nll.json (the result) and terms.npz (the mean over images of
    `vb` in bits/dim, `mse` and `xstart_mse`, [T], the last step first).
    """
    count, todo, made_of = min(config.num_samples, len(images)), [], ""
    if job.rank == 0:
        with exit_on_bad_input():
            check_images(images.files[:count])
            made_of = settings_hash(identity(settings) | {"json": None, "images": _contents(images)})
    made_of = job.share("nll/made_of", made_of)
    parts = Parts(join(config.out_dir, f"parts_{made_of[:12]}"), count, config.batch_size, diffusion.num_timesteps)
    if job.rank == 0:
        todo = parts.missing()
    todo = json.loads(job.share("nll/todo", json.dumps(todo)))
    missing = sum(len(parts.indices(number)) for number in todo)
    progress = Progress(job, "nll/steps", count, count - missing, diffusion.num_timesteps, log_json=False)
    while (turn := job.add("nll/turn") - 1) < len(todo):
        number = todo[turn]
        part = _bound(images, parts.indices(number), network, diffusion, config, progress)
        with exit_on_bad_input():
            parts.write(number, part)
        job.add("nll/done")
    while job.rank == 0 and job.add("nll/done", 0) < len(todo):
        time.sleep(0.1)
        progress.add(0)
    progress.close()
    with exit_on_bad_input():
        result = _result(parts, config.out_dir, settings) if job.rank == 0 else None
    job.leave_together("nll/finished")
    return result


def _contents(images: ImageFolder) -> list[tuple[str, int]]:
    """Names and sizes of the files of a folder: what tells it from another."""
    return [(str(path), path.stat().st_size) for path in images.files]


def _mean(values: NDArray[np.float64]) -> dict[str, float | None]:
    """The mean over images and its standard error, which one image does not have."""
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {"value": float(values.mean()), "error": error}


def _result(parts: Parts, out_dir: str, settings: dict[str, Any]) -> dict[str, Any]:
    totals, priors = [], []
    sums = {name: np.zeros(parts.num_steps) for name in BY_STEP}
    for number in parts.numbers:
        part = {name: values.astype(np.float64) for name, values in parts.read(number).items()}
        priors.append(part["prior_bpd"])
        totals.append(part["prior_bpd"] + part["vb"].sum(axis=1))
        for name in BY_STEP:
            sums[name] += part[name].sum(axis=0)
    terms = {name: total / parts.count for name, total in sums.items()}
    result = {
        "total_bpd": _mean(np.concatenate(totals)),
        "prior_bpd": _mean(np.concatenate(priors)),
        "n": parts.count,
        "network_evaluations_per_image": parts.num_steps,
        "settings": settings,
        "versions": versions(),
    }
    write_atomically(join(out_dir, "terms.npz"), lambda file: np.savez(file, **terms))
    text = json.dumps(result, indent=1, ensure_ascii=False).encode()
    write_atomically(join(out_dir, "nll.json"), lambda file: file.write(text))
    return result
