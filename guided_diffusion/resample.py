"""guided-diffusion's schedule samplers: which timesteps a batch looks at, drawn from numpy's global generator."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .training.schedule_sampler import LossSecondMomentSampler


def create_named_schedule_sampler(name: str, diffusion: Any) -> "ScheduleSampler":
    """`uniform` or `loss-second-moment`."""
    if name == "uniform":
        return UniformSampler(diffusion)
    if name == "loss-second-moment":
        return LossSecondMomentResampler(diffusion)
    raise NotImplementedError(f"schedule_sampler: {name!r} is neither uniform nor loss-second-moment")


class ScheduleSampler(ABC):
    """Draws timesteps in proportion to `weights`, and weighs their losses so that the expected loss is the same."""

    @abstractmethod
    def weights(self) -> np.ndarray:
        """[T], positive, of any sum."""

    def sample(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Timesteps [N] int64, and the weights [N] float32 of their losses."""
        weights = self.weights()
        p = weights / np.sum(weights)
        t = np.random.choice(len(p), size=(batch_size,), p=p)  # noqa: NPY002 clients seed the global generator
        of_losses = (1 / (len(p) * p[t])).astype(np.float32)
        return torch.from_numpy(t).long().to(device), torch.from_numpy(of_losses).to(device)


class UniformSampler(ScheduleSampler):
    """Every timestep equally often."""

    def __init__(self, diffusion: Any):
        self.diffusion = diffusion

    def weights(self) -> np.ndarray:
        return np.ones(self.diffusion.num_timesteps)


class LossAwareSampler(ScheduleSampler):
    """Learns its weights from losses."""

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Learn from the losses [N] at timesteps [N] of all ranks, each of which calls this with its own."""
        found = [(local_ts.tolist(), local_losses.tolist())]
        if dist.is_initialized() and dist.get_world_size() > 1:
            found *= dist.get_world_size()
            dist.all_gather_object(found, found[0])
        ts, losses = (list(chain(*column)) for column in zip(*found, strict=True))
        self.update_with_all_losses(ts, losses)

    @abstractmethod
    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Learn from the losses at timesteps, the same on all ranks."""


class LossSecondMomentResampler(LossAwareSampler):
    """Timesteps with probability ∝ √E[L_t²] over the last losses of each (Nichol & Dhariwal 2021, Eq. 18)."""

    def __init__(self, diffusion: Any, history_per_term: int = 10, uniform_prob: float = 0.001):
        self.diffusion = diffusion
        self._sampler = LossSecondMomentSampler(diffusion.num_timesteps, history_per_term, uniform_prob)

    def weights(self) -> np.ndarray:
        return self._sampler.probabilities().numpy()

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        self._sampler.update(torch.tensor(ts), torch.tensor(losses, dtype=torch.float64))

    def _warmed_up(self) -> bool:
        return self._sampler.warmed_up
