"""Which timesteps a training batch looks at: uniform, or where the loss is large (Nichol & Dhariwal 2021, Eq. 18)."""

import torch
from torch import Tensor


class UniformSampler:
    """Every step equally often."""

    def __init__(self, num_timesteps: int):
        self.num_timesteps = num_timesteps

    def sample(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Steps [N] int64 of uniform numbers [N] float64 in [0, 1), and the weights [N] of their losses (all 1)."""
        return (uniform * self.num_timesteps).long(), torch.ones(len(uniform))

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Nothing is learned from losses."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """There is nothing to load."""


class LossSecondMomentSampler:
    """Steps with probability ∝ √E[L_t²] over each step's last losses, mixed with a little uniform; 1/p weights."""

    HISTORY = 10
    UNIFORM_SHARE = 0.001

    def __init__(self, num_timesteps: int, history: int = HISTORY, uniform_share: float = UNIFORM_SHARE):
        self.num_timesteps, self.uniform_share = num_timesteps, uniform_share
        self.losses = torch.zeros(num_timesteps, history, dtype=torch.float64)
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64)

    @property
    def warmed_up(self) -> bool:
        """Whether every step has its history."""
        return bool((self.counts >= self.losses.shape[1]).all())

    def probabilities(self) -> Tensor:
        """[T] float64, uniform until every step has its history."""
        if not self.warmed_up:
            return torch.full((self.num_timesteps,), 1 / self.num_timesteps, dtype=torch.float64)
        weights = self.losses.square().mean(dim=1).sqrt()
        return (1 - self.uniform_share) * weights / weights.sum() + self.uniform_share / self.num_timesteps

    def sample(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Steps [N] int64 of uniform numbers [N], and the weights [N] that keep the expected loss the same."""
        p = self.probabilities()
        t = torch.searchsorted(p.cumsum(dim=0), uniform, right=True).clamp(max=self.num_timesteps - 1)
        return t, (1 / (self.num_timesteps * p[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember the losses [N] of steps [N], those of all ranks, so that all keep the same history."""
        for step, loss in zip(t.tolist(), losses.double().tolist(), strict=True):
            self.losses[step, self.counts[step] % self.losses.shape[1]] = loss
            self.counts[step] += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a history, unless it is of another sampler or number of steps: then begin anew."""
        if state and state["losses"].shape == self.losses.shape:
            self.losses, self.counts = state["losses"].clone(), state["counts"].clone()


def create_named_schedule_sampler(name: str, num_timesteps: int) -> UniformSampler | LossSecondMomentSampler:
    """`uniform` or `loss-second-moment`."""
    if name == "uniform":
        return UniformSampler(num_timesteps)
    if name == "loss-second-moment":
        return LossSecondMomentSampler(num_timesteps)
    raise ValueError(f"schedule_sampler: {name!r} is neither uniform nor loss-second-moment")
