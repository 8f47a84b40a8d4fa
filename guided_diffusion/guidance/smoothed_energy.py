"""Smoothed Energy Guidance (Hong, NeurIPS 2024, arXiv 2408.00760)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from guided_diffusion.guidance.blur import gaussian_blur
from guided_diffusion.guidance.masks import token_grid
from guided_diffusion.guidance.replaced_attention import ReplacedAttention


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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        n, heads, tokens, width = q.shape
        grid = token_grid(tokens, *size)
        image = q.transpose(-1, -2).reshape(n, heads * width, *grid)
        blurred = gaussian_blur(image, self.sigma).reshape(n, heads, width, tokens).transpose(-1, -2)
        return F.scaled_dot_product_attention(blurred, k, v)
