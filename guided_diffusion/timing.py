"""How long things take."""

import time
from collections.abc import Callable

import torch

from guided_diffusion.sampling import Sampler


def seconds(work: Callable[[], object]) -> float:
    """The time of one call; waits for a GPU."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def seconds_per_step(sampler: Sampler) -> tuple[float, float]:
    """One network evaluation, and one classifier gradient, for one image; a CPU is measured on few images."""
    count = min(sampler.config.batch_size or 16, sampler.config.num_samples)
    if sampler.device.type == "cpu":
        count = min(count, 16) if sampler.side <= 64 else 1
    condition = {name: rows.to(sampler.device) for name, rows in sampler.condition_of(range(count)).items()}
    x = torch.zeros(count, 3, sampler.side, sampler.side, device=sampler.device)
    t = torch.zeros(count, dtype=torch.int64, device=sampler.device)

    def timed(work: Callable[[], object]) -> float:
        work()  # the first call does not count
        return seconds(work) / count

    with torch.no_grad():
        network = timed(lambda: sampler.network(x, t, **condition))
        return network, timed(lambda: sampler.cond_fn(x, t, **condition)) if sampler.cond_fn else 0.0
