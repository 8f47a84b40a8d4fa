"""Guidance by what blurring takes away under a mask, whatever chooses the mask (Hong et al., Table 5)."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.denoiser import Prediction
from .base import Guidance, Observation, Step
from .blur import check_blur, gaussian_blur
from .masks import Masking, upsampled


@dataclass(frozen=True, eq=False, kw_only=True)
class MaskedBlur(Guidance):
    """Δ = ε(x_t) − ε(x̂_t), where x̂_t is x_t blurred under a mask.

    blur_sigma: σ in pixels, 0 (identity) to inf (mean pixel). blur_kernel: odd width of the blur's window in pixels,
    default ⌈3σ⌉ to each side. space: `eps`, the paper's rule, or `model`: the difference is taken between the network's
    outputs, whatever they stand for, as if both had been made at x_t (the rule of diffusers' pipeline). For networks
    that predict ε the two are one.
    """

    blur_sigma: float = 3.0
    blur_kernel: int | None = None
    space: str = "eps"

    def __post_init__(self):
        super().__post_init__()
        check_blur(self.blur_sigma, self.blur_kernel)
        if self.space not in ("eps", "model"):
            raise ValueError(f"sag_space: wanted eps or model, got {self.space!r}")

    @abstractmethod
    def mask(self, step: Observation) -> Tensor:
        """M_t, which pixels are blurred: [N, 1, H, W] bool."""

    def difference(self, step: Step) -> Tensor:
        base = step.base
        degraded = self.degrade(base, self.mask(step))
        other = step.denoise(degraded, base.t, base.condition)
        return base.eps - (base.with_output(other.output) if self.space == "model" else other).eps

    def blurred(self, base: Prediction) -> Tensor:
        """x̃_0, the blurred x̂_0."""
        return gaussian_blur(base.x0, self.blur_sigma, self.blur_kernel)

    def degrade(self, base: Prediction, mask: Tensor) -> Tensor:
        """x̂_t = (1 − M_t) ⊙ x_t + M_t ⊙ x̃_t, where x̃_t is the blurred x̂_0 with the same ε put back."""
        return torch.where(mask, base.process.q_sample(self.blurred(base), base.t, base.eps), base.x_t)


@dataclass(frozen=True, eq=False, kw_only=True)
class MaskGuidance(MaskedBlur):
    """Self-attention guidance with another mask than attention's. masking: chooses it, a function of the step."""

    masking: Masking

    def mask(self, step: Observation) -> Tensor:
        return upsampled(self.masking(step), step.base.x_t.shape[2:])
