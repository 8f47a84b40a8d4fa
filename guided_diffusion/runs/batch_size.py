"""How many images at a time: what is fastest and fits, and what is said where memory does not suffice."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice

import torch

from ..diffusion.samplers import State
from ..guidance.schedule import Schedule
from ..settings.options import BadInput
from .pipeline import Pipeline
from .ranks import Job
from .sample_store import batch_size_of
from .timing import seconds

MOST_AT_A_TIME = 256
"""The largest batch that is tried."""

GAIN = 1.05
"""How many times as many images a second a doubled batch must make."""


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether this error is a GPU's or a CPU's lack of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _begin(pipeline: Pipeline, size: int) -> State:
    """The first two steps of a batch, as a run makes them, with the state of the first held during the second."""
    for state, _ in islice(pipeline.trajectory(range(size)), 2):
        pass
    return state


def best_batch_size(pipeline: Pipeline, limit: int) -> int:
    """How many images at a time: 1, doubled while that fits, makes 5 % more images a second, and is within `limit`.

    Measured on the first two steps, guided by all guidances of the pipeline: from the second one on, the step before is
    still in memory.
    """
    guidances = [replace(guidance, schedule=Schedule()) for guidance in pipeline.guidances]
    guided = replace(pipeline, guidances=guidances)
    best, best_rate = 1, 0.0
    size = 1
    while size <= min(limit, MOST_AT_A_TIME):
        try:
            _, *times = [seconds(partial(_begin, guided, size)) for _ in range(3)]
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            break
        rate = size / min(times)
        if rate < GAIN * best_rate:
            break
        best, best_rate = size, rate
        size *= 2
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return best


def chosen_batch_size(pipeline: Pipeline, folder: str, key: str, job: Job) -> int:
    """The batch size that was given; else the one that is written in the folder, else the best one, which is said."""
    config = pipeline.config
    if config.batch_size is not None:
        return config.batch_size
    found = 0
    if job.rank == 0:
        found = 0 if config.overwrite else batch_size_of(folder)
        if not found:
            found = best_batch_size(pipeline, config.shard_size or -(-pipeline.num_samples // job.size))
            sys.stderr.write(f"batch size: {found}\n")
    return int(job.share(key, str(found)))


@contextmanager
def memory_said(
    batch_size: int, more: str = "auto (in another --out_dir, if this one holds samples)"
) -> Iterator[None]:
    """Turn a lack of memory into `BadInput` that says what to do: a smaller batch, or `more`."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        if batch_size == 1:
            raise BadInput("batch_size: not even one image at a time fits the memory") from None
        raise BadInput(
            f"batch_size: {batch_size} images at a time do not fit the memory; try --batch_size {batch_size // 2}, or "
            f"{more}"
        ) from None
