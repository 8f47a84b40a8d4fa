"""The likelihood of a folder of images under a model, in bits per dimension, measured by all ranks of a job."""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from torch import Tensor, nn
from torch.utils.data import default_collate
from tqdm import tqdm

from ..diffusion.diffusion import Diffusion
from ..diffusion.losses import bpd_loop, prior_bpd, vb_terms_bpd
from ..diffusion.noise import SampleNoise, choice
from ..settings.options import exit_on_bad_input
from ..settings.runs import LikelihoodConfig
from ..storage.files import join, json_text, sha256, write_atomically
from ..storage.images import ImageFolder, check_images
from .identity import distinct, identity, made_by, what_differs
from .pipeline import tf32
from .progress import Progress
from .ranks import Job, new_key
from .shards import Shards

BY_STEP = ("vb", "mse", "xstart_mse")

KNOWN_BY = {"index": (np.int64, ()), "sha256": (np.uint8, (32,)), "label": (np.int64, ())}
"""An image's place by name, which its noise depends on, the SHA-256 of its file, and its class."""


@dataclass(frozen=True)
class Measurements(Shards):
    """What was measured of images: prior_bpd, and BY_STEP's [T], the last step first; and which images they were."""

    num_steps: int

    def path(self, number: int) -> str:
        return join(self.folder, f"parts_{self.hash[:12]}", f"part_{number:06d}.npz")

    @property
    def rows(self) -> dict[str, tuple[DTypeLike, tuple[int, ...]]]:
        """Of an image: what was measured, and what it is known by."""
        by_step = dict.fromkeys(BY_STEP, (np.float32, (self.num_steps,)))
        return {"prior_bpd": (np.float32, ()), **by_step, **KNOWN_BY}

    def missing_of(self, images: ImageFolder, order: Sequence[int]) -> list[int]:
        """The shards that are not there whole, or are of other images than those that are now in the folder.

        order: which of the folder's images each one measured is.
        """
        missing = self.missing()
        there = sorted(set(self.shards) - set(missing))
        with tqdm(total=self.num_samples, desc="images of before", unit="image", delay=1, disable=None) as bar:
            for number in there:
                found, _ = self.read_arrays(number)
                now = which(images, [order[i] for i in self.indices(number)])
                if not all(np.array_equal(found[name], now[name]) for name in now):
                    missing.append(number)
                bar.update(len(self.indices(number)))
        return sorted(missing)


def chosen(config: LikelihoodConfig, count: int) -> list[int]:
    """Which of so many images, by name, are measured, in this order."""
    order = choice(config.seed, count) if config.draw else list(range(count))
    return order[: config.num_samples]


def which(images: ImageFolder, indices: Sequence[int]) -> dict[str, NDArray]:
    """What tells measured images from others, [n, …] each as in KNOWN_BY."""
    digests = b"".join(bytes.fromhex(sha256(images.files[i])) for i in indices)
    return {
        "index": np.array(indices, dtype=np.int64),
        "sha256": np.frombuffer(digests, np.uint8).reshape(-1, 32),
        "label": np.array([images.labels[i] for i in indices], dtype=np.int64),
    }


def _bound(
    images: ImageFolder,
    indices: Sequence[int],
    network: nn.Module,
    diffusion: Diffusion,
    config: LikelihoodConfig,
    progress: Progress,
) -> dict[str, NDArray[np.float32]]:
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
    arrays = {name: found[name].float().cpu().numpy() for name in ("prior_bpd", *BY_STEP)}
    finite = np.isfinite(np.column_stack(list(arrays.values()))).all(axis=1)
    if not finite.all():
        names = ", ".join(str(images.files[indices[row]]) for row in np.flatnonzero(~finite)[:3])
        raise FloatingPointError(f"the bound of {names} is not finite; are the weights?")
    return arrays


def measure(
    images: ImageFolder,
    network: nn.Module,
    diffusion: Diffusion,
    config: LikelihoodConfig,
    settings: dict[str, Any],
    job: Job,
    show: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any] | None:
    """The variational bound of images of a folder, those of `chosen`; rank 0 has the result, the others None.

    network: ready on its device. settings: all of the run. Batches are measured by whichever rank is free and kept
    below out_dir, so that a stopped run goes on; leaves nll.json (the result) and terms.npz (the mean over images of
    `vb` in bits/dim, `mse` and `xstart_mse`, [T], the last step first). show: is told the result before it is written.
    """
    order, key = chosen(config, len(images)), new_key("nll")
    count = len(order)
    parameter = next(network.parameters())
    with ExitStack() as stack:
        stack.enter_context(tf32(False))
        maker = made_by(parameter.device, parameter.dtype)
        made_of, todo = {}, []
        if job.rank == 0:
            with exit_on_bad_input():
                check_images([images.files[i] for i in order])
                made_of = identity(settings)
        made_of = json.loads(job.share(f"{key}/identity", json.dumps(made_of)))
        store = Measurements(config.out_dir, made_of, count, config.batch_size, diffusion.num_timesteps)
        if job.rank == 0:
            with exit_on_bad_input("out_dir"):
                stack.enter_context(store.lock())
                store.sweep()
                todo = store.missing_of(images, order)
        todo = json.loads(job.share(f"{key}/todo", json.dumps(todo)))
        missing = sum(len(store.indices(number)) for number in todo)
        progress = Progress(job, f"{key}/steps", count, count - missing, diffusion.num_timesteps, log_json=False)
        for number in job.turns(key, todo, lambda: progress.add(0)):
            indices = [order[i] for i in store.indices(number)]
            with exit_on_bad_input():
                known_by = which(images, indices)
            measured = _bound(images, indices, network, diffusion, config, progress)
            with exit_on_bad_input("out_dir"):
                store.write_arrays(number, measured | known_by, diffusion.num_timesteps, maker)
        progress.close()
        result = None
        if job.rank == 0:
            with exit_on_bad_input("out_dir"):
                drawn = config.draw and count < len(images)
                about = {"of": len(images), "classes": len(images.class_names), "drawn": drawn}
                result, terms = _result(store, settings, about)
            show(result)
            with exit_on_bad_input("out_dir"):
                write_atomically(join(store.folder, "terms.npz"), lambda file: np.savez(file, **terms))
                text = json_text(result, indent=1).encode()
                write_atomically(join(store.folder, "nll.json"), lambda file: file.write(text))
        job.leave_together(f"{key}/finished")
    return result


def _mean(values: NDArray[np.float64]) -> dict[str, float | None]:
    """The mean over images and its standard error, which one image does not have."""
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {"value": float(values.mean()), "error": error}


def _result(
    store: Measurements, settings: dict[str, Any], images: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """What nll.json and terms.npz hold. images: how the measured ones were chosen, to which is added which they are."""
    contents = hashlib.sha256()
    totals, priors, makers = [], [], []
    sums = {name: np.zeros(store.num_steps) for name in BY_STEP}
    for number in store.shards:
        found, made = store.read_arrays(number)
        makers.append((made.samples, made.by))
        contents.update(found["sha256"].tobytes())
        measured = {name: found[name].astype(np.float64) for name in ("prior_bpd", *BY_STEP)}
        priors.append(measured["prior_bpd"])
        totals.append(measured["prior_bpd"] + measured["vb"].sum(axis=1))
        for name in BY_STEP:
            sums[name] += measured[name].sum(axis=0)
    makers = distinct(makers)
    if differs := what_differs(makers):
        sys.stderr.write(f"{differs}\n")
    terms = {name: total / store.num_samples for name, total in sums.items()}
    result = {
        "total_bpd": _mean(np.concatenate(totals)),
        "prior_bpd": _mean(np.concatenate(priors)),
        "n": store.num_samples,
        "images": images | {"sha256": contents.hexdigest()},
        "network_evaluations_per_image": store.num_steps,
        "settings": settings,
        "made_by": makers,
    }
    return result, terms
