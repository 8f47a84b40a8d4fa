"""Smoothed Energy Guidance (Hong, NeurIPS 2024, arXiv 2408.00760)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .blur import gaussian_blur
from .replaced_attention import ReplacedAttention


def token_grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a feature map with so many tokens, of an image of height × width."""
    factor = math.isqrt(height * width // tokens)
    rows, columns = height // factor, width // factor
    if rows * columns != tokens:
        raise ValueError(f"a map of {tokens} tokens does not tile an image of {height}×{width} pixels")
    return rows, columns


@dataclass(frozen=True, eq=False, kw_only=True)
class SmoothedEnergyGuidance(ReplacedAttention):
    """ε' attends with blurred queries in `blocks` (SEG).

    sigma: σ in tokens of the Gaussian over the grid of queries, with reflected borders; 0 changes nothing, inf (the
    default) gives all tokens the mean query.
    """

    sigma: float = float("inf")

    def __post_init__(self):
        super().__post_init__()
        if not self.sigma >= 0:
            raise ValueError(f"seg_sigma: wanted 0 or more (inf: the mean query), got {self.sigma}")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, size: Sequence[int]) -> Tensor:
        n, heads, tokens, width = q.shape
        grid = token_grid(tokens, *size)
        image = q.transpose(-1, -2).reshape(n, heads * width, *grid)
        blurred = gaussian_blur(image, self.sigma).reshape(n, heads, width, tokens).transpose(-1, -2)
        return F.scaled_dot_product_attention(blurred, k, v)
