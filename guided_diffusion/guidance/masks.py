"""Masks: which pixels a guidance degrades."""

import math

import torch.nn.functional as F
from torch import Tensor


def token_grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a feature map with so many tokens, of an image of height × width."""
    factor = math.isqrt(height * width // tokens)
    rows, columns = height // factor, width // factor
    if rows * columns != tokens:
        raise ValueError(f"a map of {tokens} tokens does not tile an image of {height}×{width} pixels")
    return rows, columns


def attention_mask(score: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """M = 1(A > ψ): scores [N, T] to a bool mask [N, 1, H, W], nearest-upsampled to size (H, W)."""
    grid = token_grid(score.shape[1], *size)
    selected = (score > threshold).float().reshape(-1, 1, *grid)
    return F.interpolate(selected, size, mode="nearest").bool()
