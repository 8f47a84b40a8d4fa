"""Masks: which pixels a guidance degrades."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.noise import sent
from .base import Observation

Masking = Callable[[Observation], Tensor]
"""Chooses the pixels of a step that are degraded: [N, 1, H, W] bool, or [N, 1, h, w] of another size, upsampled."""

ROUNDING = 2e-6
"""How far above ψ a score must be: uniform attention scores 1 only up to float32 rounding."""


def upsampled(mask: Tensor, size: Sequence[int]) -> Tensor:
    """A bool mask [N, 1, h, w] at size (H, W), each pixel taking the value of the cell it lies in."""
    return F.interpolate(mask.float(), size, mode="nearest").bool()


def attention_mask(score: Tensor, size: Sequence[int], threshold: float) -> Tensor:
    """M = 1(A > ψ): scores [N, h, w] to a bool mask [N, 1, H, W], nearest-upsampled to size (H, W).

    A score that exceeds ψ by rounding alone (`ROUNDING`) does not count.
    """
    return upsampled((score > threshold + ROUNDING)[:, None], size)


def top_share(score: Tensor, share: float) -> Tensor:
    """The cells with the highest scores, round(share · h · w) of each row: [N, h, w] to [N, 1, h, w] bool.

    Of equal scores, the first in reading order.
    """
    n, height, width = score.shape
    order = score.flatten(1).argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros(n, height * width, dtype=torch.bool, device=score.device)
    chosen.scatter_(1, order[:, : round(share * height * width)], True)
    return chosen.reshape(n, 1, height, width)


def everywhere(step: Observation) -> Tensor:
    """All pixels: blur guidance (Hong et al., Table 5, global)."""
    return torch.ones_like(step.base.x_t[:, :1], dtype=torch.bool)


@dataclass(frozen=True)
class _Share:
    """share: the part of the image that is covered, 0 to 1; 0.4 is what the paper's attention masks cover."""

    share: float = 0.4

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"sag_mask_share: wanted 0 to 1, got {self.share}")


@dataclass(frozen=True)
class HighFrequency(_Share):
    """The pixels where x̂_0 has most high frequencies (Hong et al., Table 5, high-frequency).

    The magnitude, over the channels, of x̂_0 without its frequencies below `cutoff` cycles a pixel (0.5 is the highest
    along an axis). The paper does not tell the cutoff.
    """

    cutoff: float = 0.125

    def __call__(self, step: Observation) -> Tensor:
        x0 = step.base.x0.float()
        height, width = x0.shape[2:]
        # Mirrored, so that opposite borders that differ do not count as detail.
        x0 = torch.cat([x0, x0.flip(2)], dim=2)
        x0 = torch.cat([x0, x0.flip(3)], dim=3)
        down = torch.fft.fftfreq(x0.shape[2], device=x0.device)[:, None]
        across = torch.fft.rfftfreq(x0.shape[3], device=x0.device)
        high = down.square() + across.square() >= self.cutoff**2
        detail = torch.fft.irfft2(torch.fft.rfft2(x0) * high, s=x0.shape[2:])[:, :, :height, :width]
        return top_share(detail.square().sum(dim=1), self.share)


@dataclass(frozen=True)
class RandomCells(_Share):
    """Cells of a grid at random, anew at every step (Hong et al., Table 5, random).

    cells: of the grid along each side of the image, no more than it has pixels. The paper does not tell their size; 32
    is the grid of its self-attention mask in that table. The choice belongs to sample and step, not to the batch.
    """

    cells: int = 32

    def __call__(self, step: Observation) -> Tensor:
        grid = [min(self.cells, side) for side in step.base.x_t.shape[2:]]
        chosen = top_share(step.uniform(math.prod(grid)).reshape(-1, *grid), self.share)
        return sent(chosen, step.base.x_t.device)


@dataclass(frozen=True)
class CentredSquare(_Share):
    """A square in the middle of the image (Hong et al., Table 5, square; the paper does not tell where it stands).

    The number of pixels is exact: an outermost ring that is not needed whole is filled in reading order.
    """

    def __call__(self, step: Observation) -> Tensor:
        x = step.base.x_t
        down, across = (torch.arange(side, device=x.device) - (side - 1) / 2 for side in x.shape[2:])
        distance = torch.maximum(down.abs()[:, None], across.abs())
        return top_share(-distance.expand(len(x), -1, -1), self.share)


@dataclass(frozen=True, eq=False, kw_only=True)
class GivenMaps(_Share):
    """Maps made elsewhere, DINO's attention for example: sample i has map i, round and round.

    maps: [M, h, w] of any size; bool is the mask itself, of numbers the highest are covered.
    """

    maps: Tensor

    def __post_init__(self):
        super().__post_init__()
        if self.maps.ndim != 3 or not self.maps.numel():
            raise ValueError(f"maps: wanted [maps, height, width], got {list(self.maps.shape)}")
        if not self.maps.isfinite().all():
            raise ValueError("maps: holds numbers that are not finite")

    def __call__(self, step: Observation) -> Tensor:
        if self not in step.memory:
            maps = self.maps[torch.as_tensor(step.indices) % len(self.maps)].to(step.base.x_t.device)
            step.memory[self] = maps[:, None] if maps.dtype is torch.bool else top_share(maps, self.share)
        return step.memory[self]
