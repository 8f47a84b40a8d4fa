"""A sampling run: shards over the ranks, progress, signals, and the files it leaves."""

import hashlib
import itertools
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

import guided_diffusion
from guided_diffusion import pictures
from guided_diffusion.batching import chosen_batch_size, memory_said
from guided_diffusion.config import exit_on_bad_input, later_defaults
from guided_diffusion.fetch import local_path
from guided_diffusion.files import join, write_atomically
from guided_diffusion.guidance.base import GuidedDenoiser
from guided_diffusion.parallel import Job
from guided_diffusion.sample_store import SampleStore, Shard, batches, settings_hash
from guided_diffusion.samplers import State
from guided_diffusion.sampling import RunConfig, SamplingConfig
from guided_diffusion.settings import ClassifierConfig, GuidanceConfig, OtherGuidanceConfig

GRID_SAMPLES = 64
SECONDS_BETWEEN_LINES = 10
OF_THE_RUN = {"out_dir", "num_samples", "num_images", "compare", "overwrite", "grace", "log_json"}
"""Settings that do not change any sample."""

INPUT_FILES = (
    "model_path",
    "classifier_path",
    "base_samples",
    "sag_mask",
    "model",
    "model_config",
    "prompts",
    "image",
    "image_mask",
)
"""Settings that name a file or a model's folder, or may: its contents count, not its name."""

IN_MODELS = (".json", ".txt", ".safetensors")
"""The files of a model's folder that count."""

LATER = later_defaults(SamplingConfig, GuidanceConfig, OtherGuidanceConfig, ClassifierConfig)
"""Settings that do not count at their defaults, so that folders older than the flag stay what they are."""

_numbers = itertools.count()

Observer = Callable[[Sequence[int], State, GuidedDenoiser], None]
"""Is shown every step of every batch: the samples' indices, the state, and the denoiser that knows the guidance."""


class AnySampler(Protocol):
    """What makes sample i, of any kind of model.

    name: of the model, for a folder. shape: (H, W, 3) of an image. labelled: whether samples have a class, `y` of their
    condition. num_steps: States of a trajectory.
    """

    config: RunConfig
    device: torch.device
    name: str
    num_samples: int
    shape: tuple[int, int, int]
    labelled: bool
    num_steps: int

    def trajectory(self, indices: Sequence[int]) -> Iterator[tuple[State, GuidedDenoiser]]:
        """The states of samples `indices` as one batch, each with the denoiser that knows its step's guidance."""

    def images(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [−1, 1] of what the last state holds."""


def _file_hash(path: str) -> str:
    if os.path.isdir(path):
        # A model's parts are one folder each; what else lies in its folder is not read.
        files = sorted(file for file in Path(path).glob("*/*") if file.suffix in IN_MODELS)
        return settings_hash({str(file.relative_to(path)): _file_hash(str(file)) for file in files})
    with open(local_path(path), "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
        return digest.hexdigest()


def identity(settings: dict[str, Any]) -> dict[str, Any]:
    """What makes sample i what it is, and the cut into shards: settings, and the contents of the files they name."""
    kept = {
        key: value
        for key, value in settings.items()
        if key not in OF_THE_RUN and not (key in LATER and value == LATER[key])
    }
    files = [key for key in INPUT_FILES if kept.get(key) and (key != "sag_mask" or kept[key].endswith(".npz"))]
    return kept | {key: _file_hash(kept[key]) for key in files}


def output_folder(sampler: AnySampler, made_of: dict[str, Any]) -> str:
    """Where a run writes: --out_dir, else $OPENAI_LOGDIR, else runs/MODEL-HASH."""
    name = f"{sampler.name}-{settings_hash(made_of)[:8]}"
    return sampler.config.out_dir or os.environ.get("OPENAI_LOGDIR") or join("runs", name)


class _Signals:
    """SIGTERM and SIGINT: stop at the next step, or at the end of the shard if that comes within `grace` seconds."""

    def __init__(self, grace: float, job: Job, counter: str):
        self._grace, self._job, self._counter = grace, job, counter
        self._asked: tuple[int, float] | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _frame: Any) -> None:
        self._asked = self._asked or (number, time.monotonic())

    def stop_if_asked(self, shard_is_done: bool) -> None:
        """Exit if a signal came: a rank that ends takes the job along, so it first waits for the others' shards."""
        if self._asked is None:
            return
        number, since = self._asked
        if not shard_is_done and time.monotonic() - since < self._grace:
            return
        if self._job.add(self._counter) == 1:
            name = signal.Signals(number).name
            sys.stderr.write(f"stopped by {name}; the same command goes on from the last whole shard\n")
        while self._job.add(self._counter, 0) < self._job.size and time.monotonic() - since < self._grace:
            time.sleep(0.1)
        raise SystemExit(128 + number)


class Progress:
    """How far the whole job is, shown by rank 0: a bar on a terminal, else lines, or JSON lines."""

    def __init__(self, job: Job, counter: str, samples: int, done: int, steps: int, log_json: bool):
        self._job, self._counter, self._steps, self._json = job, counter, steps, log_json
        self._samples, self._before, self._started, self._said = samples, done, time.monotonic(), time.monotonic()
        quiet = True if log_json or job.rank else None
        self._bar = tqdm(total=samples, initial=done, unit="image", dynamic_ncols=True, disable=quiet)

    def add(self, image_steps: int) -> None:
        total = self._job.add(self._counter, image_steps)
        if self._job.rank == 0:
            self._show(total // self._steps)

    def _show(self, made: int) -> None:
        done = self._before + made
        if not self._bar.disable:
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self.say(made)

    def say(self, made: int) -> None:
        """One line: how many are done, how fast, and how long it still takes."""
        self._said = time.monotonic()
        rate = made / max(1e-9, self._said - self._started)
        left = self._samples - self._before - made
        line = {
            "samples": self._before + made,
            "of": self._samples,
            "images_per_s": round(rate, 3),
            "seconds_left": round(left / rate) if rate else None,
        }
        text = json.dumps(line) if self._json else ", ".join(f"{key} {value}" for key, value in line.items())
        sys.stderr.write(f"{text}\n")

    def close(self) -> None:
        self._bar.close()
        if self._json and self._job.rank == 0:
            self.say(self._job.add(self._counter, 0) // self._steps)


def _make_shard(
    sampler: AnySampler,
    indices: Sequence[int],
    batch_size: int,
    progress: Progress,
    signals: _Signals,
    observe: Observer | None,
) -> Shard:
    images, labels, evaluations = [], [], 0.0
    for batch in batches(indices, batch_size):
        for state, guided in sampler.trajectory(batch):
            if observe:
                observe(batch, state, guided)
            progress.add(len(batch))
            signals.stop_if_asked(shard_is_done=False)
        images.append(pictures.to_uint8(sampler.images(state.x)))
        evaluations += guided.evaluations * len(batch) / len(indices)
        if (y := state.prediction.condition.get("y")) is not None:
            labels.append(y.cpu().numpy())
    return Shard(np.concatenate(images), np.concatenate(labels) if labels else None, evaluations)


def run(
    sampler: AnySampler, settings: dict[str, Any], guidance_line: str, job: Job, observe: Observer | None = None
) -> tuple[SampleStore, dict[str, Any]]:
    """Make all samples that are not there yet, over all ranks, and merge them; returns the store and the manifest.

    `BadInput` says why the folder cannot be used or written to. Leaves samples_NxHxWx3.npz, grid.png, config.yaml (the
    resolved settings), manifest.json and the shards.
    """
    config = sampler.config
    key = f"run {next(_numbers)}"  # every rank makes the runs of a job in the same order
    made_of = json.loads(job.share(f"{key}/identity", json.dumps(identity(settings)) if job.rank == 0 else ""))
    folder = output_folder(sampler, made_of)
    batch_size = chosen_batch_size(sampler, folder, f"{key}/batch_size", job)
    store = SampleStore(
        folder,
        made_of,
        sampler.num_samples,
        config.shard_size or batch_size,
        sampler.shape,
        sampler.labelled,
    )
    about = {
        "guidance": guidance_line,
        "batch_size": batch_size,
        "ranks": job.size,
        "device": str(sampler.device),
        "versions": versions(),
    }
    started = time.perf_counter()
    signals = _Signals(config.grace, job, f"{key}/stopped")
    with ExitStack() as stack:
        stack.enter_context(signals.handled())
        todo: list[int] = []
        if job.rank == 0:
            with exit_on_bad_input():
                stack.enter_context(store.lock())
                todo = _prepare(store, config.overwrite, about, guidance_line)
        todo = json.loads(job.share(f"{key}/todo", json.dumps(todo)))
        missing = sum(len(store.indices(number)) for number in todo)
        progress = Progress(
            job,
            f"{key}/steps",
            sampler.num_samples,
            sampler.num_samples - missing,
            sampler.num_steps,
            config.log_json,
        )
        while (turn := job.add(f"{key}/turn") - 1) < len(todo):
            number = todo[turn]
            with memory_said(batch_size):
                shard = _make_shard(sampler, store.indices(number), batch_size, progress, signals, observe)
            with exit_on_bad_input():
                store.write(number, shard)
            job.add(f"{key}/done")
            signals.stop_if_asked(shard_is_done=True)
        while job.rank == 0 and job.add(f"{key}/done", 0) < len(todo):
            time.sleep(0.1)
            progress.add(0)
            signals.stop_if_asked(shard_is_done=True)
        progress.close()
        if job.rank == 0:
            with exit_on_bad_input():
                about["network_evaluations_per_sample"] = store.merge()
            about |= {"file": os.path.basename(store.samples_path), "samples_made_now": missing, "settings": settings}
            about["seconds"] = round(time.perf_counter() - started, 3)
            _write_rest(store, settings, about)
            print(
                f"{missing} samples in {about['seconds']:.1f} s ({sampler.num_samples - missing} were there), "
                f"{about['network_evaluations_per_sample']:g} network evaluations each: {store.samples_path}"
            )
        job.leave_together(f"{key}/finished")
    return store, about


def _prepare(store: SampleStore, overwrite: bool, about: dict[str, Any], guidance_line: str) -> list[int]:
    """Make the folder fit for this run and tell which shards are missing."""
    store.sweep()
    if overwrite:
        store.clear()
    sys.stderr.write(store.check())
    todo = store.missing()
    store.write_manifest(about)
    sys.stderr.write(f"{guidance_line}\n")
    there = len(store.shards) - len(todo)
    if there:
        sys.stderr.write(f"{there} of {len(store.shards)} shards are there already\n")
    return todo


def _write_rest(store: SampleStore, settings: dict[str, Any], about: dict[str, Any]) -> None:
    shown = store.first(GRID_SAMPLES)
    pictures.save_png(
        pictures.enlarge(pictures.grid(shown, math.ceil(len(shown) ** 0.5)), 600), join(store.folder, "grid.png")
    )
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode()
    write_atomically(join(store.folder, "config.yaml"), lambda file: file.write(text))
    store.write_manifest(about)


def versions() -> dict[str, str]:
    """Versions of what made a result."""
    return {
        "guided_diffusion": guided_diffusion.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    } | {name: sys.modules[name].__version__ for name in ("diffusers", "transformers") if sys.modules.get(name)}
