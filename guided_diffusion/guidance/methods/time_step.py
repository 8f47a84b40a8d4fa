"""Time-step guidance (Sadat et al., ICLR 2025, arXiv 2407.02687, Algorithm 2)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ...diffusion.noise import TIME_STEP, sent
from ...networks.altering import altered
from ..base import Guidance, Step


@dataclass(frozen=True, eq=False, kw_only=True)
class TimeStepGuidance(Guidance):
    """Δ = ε(x_t, t_emb) − ε(x_t, t̂_emb), t̂_emb = t_emb + s (t/T)^α std(t_emb) n, n ~ N(0, I); scale is w_TSG − 1.

    embedder: the layer that makes t_emb, as the network's blocks are given it, before the class is added. noise: s.
    power: α. n belongs to sample and step.
    """

    uses_base: ClassVar[bool] = False

    embedder: nn.Module
    noise: float = 1.0
    power: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        for name, value in (("tsg_noise", self.noise), ("tsg_power", self.power)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: wanted a finite number, 0 or more, got {value}")

    def difference(self, step: Step) -> Tensor:
        given = step.conditional
        time = (given.t.to(given.x_t.dtype) / given.process.num_timesteps)[:, None]

        def perturbed(_number: int, rows: slice, _input: Tensor, emb: Tensor) -> Tensor:
            n = sent(step.normal(emb.shape[1], TIME_STEP)[rows].to(emb.dtype), emb.device)
            return emb + self.noise * time[rows].to(emb) ** self.power * emb.std(dim=1, keepdim=True) * n

        with altered(self.embedder, rows=len(given.x_t), after=perturbed):
            return given.eps - step.denoise(given.x_t, given.t, given.condition).eps
