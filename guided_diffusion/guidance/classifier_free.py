"""Classifier-free guidance (Ho & Salimans 2022): away from what the network predicts without a condition."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..diffusion.denoiser import Condition
from .base import Guidance, NullCondition, Step


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassifierFreeGuidance(Guidance):
    """Δ = ε(x_t, c) − ε(x_t, ∅); scale is s_c of Hong et al., Eq. 25: `guidance_scale` of other tools is 1 + s_c.

    null: makes c into ∅. Conditional and unconditional pass are one batch of twice the rows, and count two network
    evaluations. All guidances of a step share the pass. channels: DiT's published numbers are of 3 of its 4; the
    others, as Σ, are then those of the conditional pass.
    """

    passes: ClassVar[int] = 0

    null: NullCondition

    def unconditional_by(self) -> NullCondition:
        return self.null

    def difference(self, step: Step) -> Tensor:
        return step.conditional.eps - step.base.eps

    def x0_difference(self, step: Step) -> Tensor:
        return step.conditional.raw_x0 - step.base.raw_x0


def null_class(label: int) -> NullCondition:
    """Every row's class `y` becomes the null label."""

    def null(condition: Condition) -> Condition:
        return {**condition, "y": torch.full_like(condition["y"], label)}

    return null
