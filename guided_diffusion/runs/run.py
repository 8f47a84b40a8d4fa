"""A sampling run: shards over the ranks, progress, signals, and the files it leaves."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import yaml

from ..diffusion.samplers import State
from ..guidance.base import GuidedDenoiser, weak_evaluations
from ..settings.options import exit_on_bad_input
from ..storage import pictures
from ..storage.files import join, write_atomically
from .batch_size import chosen_batch_size, memory_said
from .identity import distinct, identity, made_by, output_folder, what_differs
from .pipeline import Observer, Pipeline, make_shard, tf32
from .progress import Progress, Signals
from .ranks import Job, jobs, new_key
from .sample_store import SampleStore, read_manifest

GRID_SAMPLES = 64

OF_MAKING = ("batch_size", "ranks", "samples_made_now", "seconds")
"""What the manifest says of the last start that made samples."""


def run(
    pipeline: Pipeline, settings: dict[str, Any], guidance_line: str, job: Job, observe: Observer | None = None
) -> tuple[SampleStore, dict[str, Any]]:
    """Make all samples that are not there yet, over all ranks, and merge them; returns the store and the manifest.

    `BadInput` says why the folder cannot be used or written to. Leaves samples_NxHxWx3.npz, grid.png, config.yaml (the
    resolved settings), manifest.json and the shards.
    """
    config = pipeline.config
    key = new_key("run")
    job.patience = config.patience
    made_of = identity(settings, pipeline.samples_version) if job.rank == 0 else {}
    made_of = json.loads(job.share(f"{key}/identity", json.dumps(made_of)))
    folder = output_folder(pipeline, made_of)
    with tf32(config.tf32):
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
        "uint8": pictures.UINT8_RULES[pipeline.nearest_levels],
        "batch_size": batch_size,
        "ranks": job.size,
    }
    started = time.perf_counter()
    signals = Signals(config.grace, job, f"{key}/stopped")
    with ExitStack() as stack:
        stack.enter_context(tf32(config.tf32))
        maker = made_by(pipeline.device, pipeline.dtype)
        stack.enter_context(signals.handled())
        todo: list[int] = []
        if job.rank == 0:
            with exit_on_bad_input("out_dir"):
                stack.enter_context(store.lock())
                # What is watched is made anew: of samples that are there, nothing can be seen.
                if config.overwrite and (observe or not store.begun_by_this_job()):
                    store.clear()
                    about["begun_by"] = jobs()
                todo = _prepare(store, about, guidance_line)
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

        def watch(indices: Sequence[int], state: State, guided: GuidedDenoiser) -> None:
            if observe:
                observe(indices, state, guided)
            progress.add(len(indices))
            signals.stop_if_asked(shard_is_done=False)

        def wait() -> None:
            progress.add(0)
            signals.stop_if_asked(shard_is_done=True)

        for number in job.turns(key, todo, wait):
            with memory_said(batch_size):
                shard = make_shard(pipeline, store.indices(number), batch_size, watch)
            with exit_on_bad_input("out_dir"):
                store.write(number, shard, maker)
            progress.report()  # before others hear that it is done
            signals.stop_if_asked(shard_is_done=True)
        progress.close()
        if job.rank == 0:
            with exit_on_bad_input("out_dir"):
                made = store.merge()
            about["network_evaluations_per_sample"] = sum(each.evaluations * each.samples for each in made) / sum(
                each.samples for each in made
            )
            if any(guidance.weak_passes for guidance in pipeline.guidances):
                weak = weak_evaluations(pipeline.guidances, pipeline.levels)
                about["weak_network_evaluations_per_sample"] = weak
            about["made_by"] = distinct((each.samples, each.by) for each in made)
            about |= {"file": os.path.basename(store.samples_path), "samples_made_now": missing, "settings": settings}
            about["seconds"] = round(time.perf_counter() - started, 3)
            _write_rest(store, settings, about)
            if config.png:
                with exit_on_bad_input("out_dir"):
                    _write_pngs(store, job, f"{key}/pngs", config.log_json)
            if differs := what_differs(about["made_by"]):
                sys.stderr.write(f"{differs}\n")
            print(
                f"{missing} samples in {about['seconds']:.1f} s ({pipeline.num_samples - missing} were there), "
                f"{about['network_evaluations_per_sample']:g} network evaluations each: {store.samples_path}"
            )
        job.leave_together(f"{key}/finished")
    return store, about


def _prepare(store: SampleStore, about: dict[str, Any], guidance_line: str) -> list[int]:
    """Make the folder fit for this run and tell which shards are missing."""
    store.sweep()
    sys.stderr.write(store.check())
    todo = store.missing()
    before = read_manifest(store.folder)
    about |= {key: before[key] for key in ("begun_by",) if key in before}
    if todo or "file" not in before:
        store.write_manifest(about)
    sys.stderr.write(f"{guidance_line}\n")
    there = len(store.shards) - len(todo)
    if there:
        sys.stderr.write(f"{there} of {len(store.shards)} shards are there already\n")
    return todo


def _write_pngs(store: SampleStore, job: Job, counter: str, log_json: bool) -> None:
    with ExitStack() as stack:

        def begin(there: int) -> Callable[[int], None]:
            progress = Progress(job, counter, store.num_samples, there, 1, log_json)
            stack.callback(progress.close)
            return progress.add

        store.write_pngs(begin)


def _write_rest(store: SampleStore, settings: dict[str, Any], about: dict[str, Any]) -> None:
    """The grid, the settings and the manifest; what a start that made nothing costs is not what the samples cost."""
    shown = store.first(GRID_SAMPLES)
    pictures.save_png(
        pictures.enlarge(pictures.grid(shown, math.ceil(len(shown) ** 0.5)), 600), join(store.folder, "grid.png")
    )
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode()
    write_atomically(join(store.folder, "config.yaml"), lambda file: file.write(text))
    before = read_manifest(store.folder) if not about["samples_made_now"] else {}
    store.write_manifest(about | {key: before[key] for key in OF_MAKING if key in before})
