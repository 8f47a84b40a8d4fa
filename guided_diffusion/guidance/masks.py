"""Masks: which pixels a guidance degrades."""

import math

import torch.nn.functional as F
from torch import Tensor

ROUNDING = 2e-6
"""How far above ψ a score must be: uniform attention scores 1 only up to float32 rounding."""


def token_grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a feature map with so many tokens, of an image of height × width."""
    factor = math.isqrt(height * width // tokens)
    rows, columns = height // factor, width // factor
    if rows * columns != tokens:
        raise ValueError(f"a map of {tokens} tokens does not tile an image of {height}×{width} pixels")
    return rows, columns


def attention_mask(score: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """M = 1(A > ψ): scores [N, T] to a bool mask [N, 1, H, W], nearest-upsampled to size (H, W).

    A score that exceeds ψ by rounding alone (`ROUNDING`) does not count.
    """
    grid = token_grid(score.shape[1], *size)
    selected = (score > threshold + ROUNDING).float().reshape(-1, 1, *grid)
    return F.interpolate(selected, size, mode="nearest").bool()
