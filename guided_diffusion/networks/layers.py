"""Layers and small tensor helpers shared by the networks."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm32(nn.GroupNorm):
    """Group normalisation with 32 groups, computed in float32 whatever the input's dtype."""

    def __init__(self, channels: int):
        super().__init__(32, channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class Upsample(nn.Module):
    """Double the side by nearest neighbour; with `use_conv`, a 3×3 convolution follows."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Downsample(nn.Module):
    """Halve the side: a strided 3×3 convolution with `use_conv`, else 2×2 averages."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def zero_module(module: nn.Module) -> nn.Module:
    """Set every parameter of `module` to zero and return it (residual branches start as identities)."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoidal embedding, cosines first: [N] timesteps, possibly fractional, to [N, dim] float32."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * steps / half)[None]
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


@torch.no_grad()
def update_ema(targets: list[Tensor], sources: list[Tensor], rate: float) -> None:
    """Move `targets` in place towards `sources`: target = rate · target + (1 − rate) · source."""
    torch._foreach_lerp_(targets, [source.detach() for source in sources], 1 - rate)
