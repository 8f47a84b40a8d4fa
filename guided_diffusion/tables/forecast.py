"""What the rows of a plan would do: their commands, their network evaluations, and how long they would take here."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..guidance.base import evaluations, weak_evaluations
from ..runs.pipeline import ImagePipeline
from ..runs.ranks import Job
from ..runs.timing import seconds
from .plans import Row
from .rows import prepare

NOWHERE = torch.device("meta")
"""Where networks are built whose numbers nobody asks for."""


def forecast(rows: Sequence[Row], job: Job | None = None) -> Iterator[str]:
    """Lines for people: of each row its command, its samples, and their network evaluations.

    job: time a few steps with random weights, and say how long its ranks would take. A ValueError names the row that
    cannot be built.
    """
    for row in rows:
        yield f"{row.name}: {row.label}"
        if row.missing:
            yield f"  cannot be run: {row.missing}"
        elif row.same_as:
            yield f"  the run of {row.same_as}"
        else:
            pipeline = _built(row, NOWHERE)
            yield f"  {row.command}"
            weak = _weak_evaluations(pipeline)
            also = f", and {weak} of the weak network" if weak else ""
            yield f"  {pipeline.num_samples} samples, {_evaluations(pipeline)} network evaluations each{also}"
    if job:
        yield from _hours([row for row in rows if not row.missing and not row.same_as], job)


def _hours(rows: Sequence[Row], job: Job) -> Iterator[str]:
    """Lines for people; networks of the same files, batch and classifier are timed once."""
    times: dict[tuple[Any, ...], tuple[float, float]] = {}
    total = 0.0
    for row in rows:
        pipeline = _built(row, NOWHERE)
        key = (row.config, pipeline.config.batch_size, pipeline.cond_fn is not None)
        if key not in times:
            times[key] = seconds_per_step(_built(row, job.device))
        network, classifier = times[key]
        passes = _evaluations(pipeline) + _weak_evaluations(pipeline)  # a weak one takes no longer
        each = passes * network + pipeline.num_steps * classifier
        took = pipeline.num_samples * each / job.size
        total += took
        yield f"{row.name}: about {took / 3600:.1f} hours"
    yield f"about {total / 3600:.1f} hours in all with {job.size} rank(s) on {job.device} (from a short timing)"


def _built(row: Row, device: torch.device) -> ImagePipeline:
    """The row's run without its weights."""
    try:
        return prepare(row, device, weights=False).pipeline
    except ValueError as error:
        raise ValueError(f"row {row.name}: {error}") from None


def _evaluations(pipeline: ImagePipeline) -> int:
    return evaluations(pipeline.guidances, pipeline.levels)


def _weak_evaluations(pipeline: ImagePipeline) -> int:
    return weak_evaluations(pipeline.guidances, pipeline.levels)


def seconds_per_step(pipeline: ImagePipeline) -> tuple[float, float]:
    """One network evaluation, and one classifier gradient, for one image; a CPU is measured on few images."""
    count = min(pipeline.config.batch_size or 16, pipeline.config.num_samples)
    if pipeline.device.type == "cpu":
        count = min(count, 16) if pipeline.side <= 64 else 1
    condition = pipeline.condition(range(count))
    x = torch.zeros(count, *pipeline.x_shape, device=pipeline.device)
    t = torch.zeros(count, dtype=torch.int64, device=pipeline.device)

    def timed(work: Callable[[], object]) -> float:
        work()  # the first call does not count
        return seconds(work) / count

    with torch.no_grad():
        network = timed(lambda: pipeline.denoiser(x, t, condition))
        return network, timed(lambda: pipeline.cond_fn(x, t, **condition)) if pipeline.cond_fn else 0.0
