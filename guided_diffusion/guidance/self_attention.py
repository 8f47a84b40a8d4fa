"""Self-Attention Guidance (Hong et al., ICCV 2023, arXiv 2210.00939, Algorithm 1)."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from guided_diffusion.attention import Attends, record_attention, split_legacy
from guided_diffusion.denoiser import Prediction
from guided_diffusion.guidance.base import Guidance, Step
from guided_diffusion.guidance.blur import check_blur, gaussian_blur
from guided_diffusion.guidance.masks import attention_mask

REFERENCE_KERNEL = 31


@dataclass(frozen=True, eq=False, kw_only=True)
class SelfAttentionGuidance(Guidance):
    """Δ = ε(x_t) − ε(x̂_t), where x̂_t is x_t blurred in the regions that the network itself attends to.

    block: the attention block whose score A_t selects. threshold: ψ, in units of the mean score. blur_sigma: σ in
    pixels, 0 (identity) to inf (mean pixel). blur_kernel: odd width of the blur's window in pixels, default ⌈3σ⌉ to
    each side. reference_heads: None follows the paper; a number reproduces the authors' code, which reads the
    attention as that many heads in legacy order, and re-noises the clamped x̂_0 also outside the mask. space: `eps`,
    the paper's rule, or `model`: the difference is taken between the network's outputs, whatever they stand for, as if
    both had been made at x_t (diffusers' pipeline). For networks that predict ε the two are one.
    """

    block: Attends
    threshold: float = 1.0
    blur_sigma: float = 3.0
    blur_kernel: int | None = None
    reference_heads: int | None = None
    space: str = "eps"

    def __post_init__(self):
        super().__post_init__()
        if not math.isfinite(self.threshold):
            raise ValueError(f"sag_threshold: wanted a finite number, got {self.threshold}")
        check_blur(self.blur_sigma, self.blur_kernel)
        if self.space not in ("eps", "model"):
            raise ValueError(f"sag_space: wanted eps or model, got {self.space!r}")

    @property
    def fidelity(self) -> str:
        """`corrected` (the paper) or `reference` (the authors' code)."""
        return "corrected" if self.reference_heads is None else "reference"

    def record(self) -> AbstractContextManager[dict[Attends, Tensor]]:
        if self.reference_heads is None:
            return record_attention(self.block)
        return record_attention(self.block, split=partial(split_legacy, num_heads=self.reference_heads))

    def difference(self, step: Step) -> Tensor:
        base = step.base
        degraded = self.degrade(base, self.mask(step))
        other = step.denoise(degraded, base.t, base.condition)
        return base.eps - (base.with_output(other.output) if self.space == "model" else other).eps

    def mask(self, step: Step) -> Tensor:
        """M_t = 1(A_t > ψ), [N, 1, H, W] bool."""
        score = step.recorded[self][self.block]
        return attention_mask(score, step.base.x_t.shape[2:], self.threshold)

    def degrade(self, base: Prediction, mask: Tensor) -> Tensor:
        """x̂_t = (1 − M_t) ⊙ x_t + M_t ⊙ x̃_t, where x̃_t is the blurred x̂_0 with the same ε put back."""
        x0, blurred = base.x0, gaussian_blur(base.x0, self.blur_sigma, self.blur_kernel)
        if self.fidelity == "reference":
            return base.process.q_sample(torch.where(mask, blurred, x0), base.t, base.eps)
        return torch.where(mask, base.process.q_sample(blurred, base.t, base.eps), base.x_t)
