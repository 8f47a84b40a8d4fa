"""Diffusion on some of the original steps."""

from collections.abc import Iterable
from typing import Any

from .diffusion.process import ForwardProcess, space_timesteps
from .gaussian_diffusion import GaussianDiffusion

__all__ = ["SpacedDiffusion", "space_timesteps"]


class SpacedDiffusion(GaussianDiffusion):
    """A GaussianDiffusion that keeps only the original steps `use_timesteps`; networks still see original steps."""

    def __init__(self, use_timesteps: Iterable[int], *, betas: Any, rescale_timesteps: bool = False, **kinds: Any):
        super().__init__(betas=betas, **kinds)
        self.process = ForwardProcess(betas, use_timesteps, rescale_timesteps)
