"""How long a row of a table takes: a network evaluation and a classifier's gradient, timed."""

from collections.abc import Callable

import torch

from ..runs.pipeline import ImagePipeline
from ..runs.timing import seconds


def seconds_per_step(pipeline: ImagePipeline) -> tuple[float, float]:
    """One network evaluation, and one classifier gradient, for one image; a CPU is measured on few images."""
    count = min(pipeline.config.batch_size or 16, pipeline.config.num_samples)
    if pipeline.device.type == "cpu":
        count = min(count, 16) if pipeline.side <= 64 else 1
    condition = pipeline.condition(range(count))
    x = torch.zeros(count, 3, pipeline.side, pipeline.side, device=pipeline.device)
    t = torch.zeros(count, dtype=torch.int64, device=pipeline.device)

    def timed(work: Callable[[], object]) -> float:
        work()  # the first call does not count
        return seconds(work) / count

    with torch.no_grad():
        network = timed(lambda: pipeline.denoiser(x, t, condition))
        return network, timed(lambda: pipeline.cond_fn(x, t, **condition)) if pipeline.cond_fn else 0.0
