"""Guidance by earlier steps: Momentum Guidance (Liao et al. 2026, arXiv 2602.20360), SG-prev (arXiv 2412.05827)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..base import Guidance, Step


@dataclass(frozen=True, eq=False, kw_only=True)
class MomentumGuidance(Guidance):
    """Δ = ε_i − m_i, with m_0 = ε_0 and m_{i+1} = β m_i + (1 − β) ε_i; scale is the paper's α (Algorithm 1, Eq. 11–12).

    The paper's velocity v is ε here: with x_t = √ᾱ (x_0 + σ ε), the ODE that DDIM follows is d(x_t/√ᾱ)/dσ = ε.
    decay: β; 0 is the ε of the step before, SG-prev (Li et al. 2024). It sees the conditional ε, without other
    guidances, of guided steps alone: at the first of them Δ = 0.
    """

    uses_base: ClassVar[bool] = False
    passes: ClassVar[int] = 0

    decay: float = 0.6

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ValueError(f"momentum_decay: wanted 0 to less than 1, got {self.decay}")

    def difference(self, step: Step) -> Tensor:
        eps = step.conditional.eps
        average = step.memory.get(self, eps)
        step.memory[self] = self.decay * average + (1 - self.decay) * eps
        return eps - average
