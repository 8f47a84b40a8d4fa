"""Independent condition guidance (Sadat et al., ICLR 2025, arXiv 2407.02687, Algorithm 1)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...diffusion.noise import OTHER_CLASS, sent
from ..base import Guidance, Step


@dataclass(frozen=True, eq=False, kw_only=True)
class IndependentConditionGuidance(Guidance):
    """Δ = ε(x_t, y) − ε(x_t, ŷ), ŷ a class that has nothing to do with x_t; scale is w_ICG − 1.

    For conditional networks that know no null label: where ŷ is independent of x_t, ε(x_t, ŷ) estimates the
    unconditional ε. num_classes: ŷ is drawn from so many, y among them, anew for every sample and step.
    """

    uses_base: ClassVar[bool] = False

    num_classes: int

    def __post_init__(self):
        super().__post_init__()
        if self.num_classes < 2:
            raise ValueError(f"num_classes: wanted 2 or more to choose another class from, got {self.num_classes}")

    def difference(self, step: Step) -> Tensor:
        given = step.conditional
        y = given.condition["y"]
        other = sent((step.uniform(1, OTHER_CLASS)[:, 0] * self.num_classes).to(y.dtype), y.device)
        return given.eps - step.denoise(given.x_t, given.t, {**given.condition, "y": other}).eps
