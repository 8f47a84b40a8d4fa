"""Guidance by earlier steps: Momentum Guidance (Liao et al. 2026, arXiv 2602.20360), SG-prev (arXiv 2412.05827)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..base import Guidance, Step


@dataclass(frozen=True, eq=False, kw_only=True)
class MomentumGuidance(Guidance):
    """Δ = v_i − m_i as ε, with m_0 = v_0 and m_{i+1} = β m_i + (1 − β) v_i; scale is the paper's α (Eq. 11–12).

    v is what the network puts out: the velocity of flow models, which the paper is about; ε where that is predicted, as
    with x_t = √ᾱ (x_0 + σ ε) the path that DDIM follows is d(x_t/√ᾱ)/dσ = ε. decay: β; 0 is the v of the step before,
    SG-prev (Li et al. 2024). It sees the conditional prediction, without other guidances, of guided steps alone: at the
    first of them Δ = 0.
    """

    uses_base: ClassVar[bool] = False
    passes: ClassVar[int] = 0

    decay: float = 0.6

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ValueError(f"momentum_decay: wanted 0 to less than 1, got {self.decay}")

    def difference(self, step: Step) -> Tensor:
        given = step.conditional
        average = step.memory.get(self, given.output)
        step.memory[self] = self.decay * average + (1 - self.decay) * given.output
        return given.eps - given.with_output(average).eps
