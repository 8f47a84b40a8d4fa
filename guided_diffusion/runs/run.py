"""A sampling run: shards over the ranks, progress, signals, and the files it leaves."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import yaml

from ..diffusion.samplers import State
from ..guidance.base import GuidedDenoiser
from ..settings.options import exit_on_bad_input
from ..storage import pictures
from ..storage.files import join, write_atomically
from .batch_size import chosen_batch_size, memory_said
from .identity import identity, output_folder, versions
from .pipeline import Pipeline
from .progress import Progress, Signals
from .ranks import Job, new_key
from .sample_store import SampleStore, Shard, batches

GRID_SAMPLES = 64

Observer = Callable[[Sequence[int], State, GuidedDenoiser], None]
"""Is shown every step of every batch: the samples' indices, the state, and the denoiser that knows the guidance."""


def _make_shard(
    pipeline: Pipeline,
    indices: Sequence[int],
    batch_size: int,
    progress: Progress,
    signals: Signals,
    observe: Observer | None,
) -> Shard:
    images, labels, evaluations = [], [], 0.0
    for batch in batches(indices, batch_size):
        for state, guided in pipeline.trajectory(batch):
            if observe:
                observe(batch, state, guided)
            progress.add(len(batch))
            signals.stop_if_asked(shard_is_done=False)
        images.append(pictures.to_uint8(pipeline.images(state.x)))
        evaluations += guided.evaluations * len(batch) / len(indices)
        if (y := state.prediction.condition.get("y")) is not None:
            labels.append(y.cpu().numpy())
    return Shard(np.concatenate(images), np.concatenate(labels) if labels else None, evaluations)


def run(
    pipeline: Pipeline, settings: dict[str, Any], guidance_line: str, job: Job, observe: Observer | None = None
) -> tuple[SampleStore, dict[str, Any]]:
    """Make all samples that are not there yet, over all ranks, and merge them; returns the store and the manifest.

    `BadInput` says why the folder cannot be used or written to. Leaves samples_NxHxWx3.npz, grid.png, config.yaml (the
    resolved settings), manifest.json and the shards.
    """
    config = pipeline.config
    key = new_key("run")
    made_of = json.loads(job.share(f"{key}/identity", json.dumps(identity(settings)) if job.rank == 0 else ""))
    folder = output_folder(pipeline, made_of)
    batch_size = chosen_batch_size(pipeline, folder, f"{key}/batch_size", job)
    store = SampleStore(
        folder,
        made_of,
        pipeline.num_samples,
        config.shard_size or batch_size,
        pipeline.shape,
        pipeline.labelled,
    )
    about = {
        "guidance": guidance_line,
        "batch_size": batch_size,
        "ranks": job.size,
        "device": str(pipeline.device),
        "versions": versions(),
    }
    started = time.perf_counter()
    signals = Signals(config.grace, job, f"{key}/stopped")
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
            pipeline.num_samples,
            pipeline.num_samples - missing,
            pipeline.num_steps,
            config.log_json,
        )

        def wait() -> None:
            progress.add(0)
            signals.stop_if_asked(shard_is_done=True)

        for number in job.turns(key, todo, wait):
            with memory_said(batch_size):
                shard = _make_shard(pipeline, store.indices(number), batch_size, progress, signals, observe)
            with exit_on_bad_input():
                store.write(number, shard)
            signals.stop_if_asked(shard_is_done=True)
        progress.close()
        if job.rank == 0:
            with exit_on_bad_input():
                about["network_evaluations_per_sample"] = store.merge()
            about |= {"file": os.path.basename(store.samples_path), "samples_made_now": missing, "settings": settings}
            about["seconds"] = round(time.perf_counter() - started, 3)
            _write_rest(store, settings, about)
            print(
                f"{missing} samples in {about['seconds']:.1f} s ({pipeline.num_samples - missing} were there), "
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
