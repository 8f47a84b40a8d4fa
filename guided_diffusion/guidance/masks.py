"""Masks: which pixels a guidance degrades."""

import torch.nn.functional as F
from torch import Tensor

ROUNDING = 2e-6
"""How far above ψ a score must be: uniform attention scores 1 only up to float32 rounding."""


def attention_mask(score: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """M = 1(A > ψ): scores [N, h, w] to a bool mask [N, 1, H, W], nearest-upsampled to size (H, W).

    A score that exceeds ψ by rounding alone (`ROUNDING`) does not count.
    """
    selected = (score > threshold + ROUNDING).float()[:, None]
    return F.interpolate(selected, size, mode="nearest").bool()
