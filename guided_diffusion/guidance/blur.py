"""Gaussian blur of images: any σ, any image size."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..networks.layers import without_autocast


def check_blur(sigma: float, kernel: int | None) -> None:
    """Raise a ValueError for a σ or a kernel size that means no blur at all."""
    if not sigma >= 0:
        raise ValueError(f"blur_sigma: wanted 0 or more (inf: the mean pixel), got {sigma}")
    if kernel is not None and (kernel < 1 or kernel % 2 == 0):
        raise ValueError(f"blur_kernel: wanted an odd number of pixels, got {kernel}")


def _weights(sigma: float, half_width: int, like: Tensor) -> Tensor:
    positions = torch.arange(-half_width, half_width + 1, dtype=torch.float32, device=like.device)
    weights = torch.exp(-0.5 * (positions / sigma) ** 2)
    return (weights / weights.sum()).to(like.dtype)


def gaussian_blur(x: Tensor, sigma: float, kernel: int | None = None) -> Tensor:
    """Blur every channel of x, [N, C, H, W], with a Gaussian of σ pixels and reflected borders.

    sigma: 0 changes nothing, inf gives each channel's mean. kernel: odd width of the window in pixels; by default
    it reaches ⌈3σ⌉ to each side. The window never reaches further than a reflection can (side − 1).
    """
    check_blur(sigma, kernel)
    if sigma == 0:
        return x
    if math.isinf(sigma):
        return x.mean(dim=(2, 3), keepdim=True).expand_as(x)
    channels, height, width = x.shape[1:]
    reach = math.ceil(3 * sigma) if kernel is None else kernel // 2
    rows, columns = min(reach, height - 1), min(reach, width - 1)
    x = F.pad(x, (columns, columns, rows, rows), mode="reflect")
    across = _weights(sigma, columns, x).expand(channels, 1, 1, -1)
    down = _weights(sigma, rows, x)[:, None].expand(channels, 1, -1, -1)
    with without_autocast(x.device):
        return F.conv2d(F.conv2d(x, across, groups=channels), down, groups=channels)
