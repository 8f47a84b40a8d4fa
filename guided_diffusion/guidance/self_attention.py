"""Self-Attention Guidance (Hong et al., ICCV 2023, arXiv 2210.00939, Algorithm 1)."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..diffusion.denoiser import Prediction
from ..networks.attention import Attends, Scores, record_attention, split_legacy
from .base import Observation
from .masked_blur import MaskedBlur
from .masks import attention_mask

REFERENCE_KERNEL = 31


@dataclass(frozen=True, eq=False, kw_only=True)
class SelfAttentionGuidance(MaskedBlur):
    """Δ = ε(x_t) − ε(x̂_t), where x̂_t is x_t blurred in the regions that the network itself attends to.

    block: the attention block whose score A_t selects. threshold: ψ, in units of the mean score. reference_heads: None
    follows the paper; a number reproduces the authors' code, which reads the attention as that many heads in legacy
    order, and re-noises the clamped x̂_0 also outside the mask.
    """

    block: Attends
    threshold: float = 1.0
    reference_heads: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if not math.isfinite(self.threshold):
            raise ValueError(f"sag_threshold: wanted a finite number, got {self.threshold}")

    @property
    def fidelity(self) -> str:
        """`corrected` (the paper) or `reference` (the authors' code)."""
        return "corrected" if self.reference_heads is None else "reference"

    def record(self) -> AbstractContextManager[Scores]:
        if self.reference_heads is None:
            return record_attention(self.block)
        return record_attention(self.block, split=partial(split_legacy, num_heads=self.reference_heads))

    def mask(self, step: Observation) -> Tensor:
        """M_t = 1(A_t > ψ), [N, 1, H, W] bool."""
        return attention_mask(step.recorded[self][self.block], step.base.x_t.shape[2:], self.threshold)

    def degrade(self, base: Prediction, mask: Tensor) -> Tensor:
        if self.fidelity == "reference":
            return base.process.q_sample(torch.where(mask, self.blurred(base), base.x0), base.t, base.eps)
        return super().degrade(base, mask)
