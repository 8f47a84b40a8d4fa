"""Diffusion on some of the original steps."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .diffusion.process import ForwardProcess, space_timesteps
from .gaussian_diffusion import GaussianDiffusion

__all__ = ["SpacedDiffusion", "space_timesteps"]


class SpacedDiffusion(GaussianDiffusion):
    """A GaussianDiffusion that keeps only the original steps `use_timesteps`; networks still see original steps."""

    def __init__(self, use_timesteps: Iterable[int], **kwargs: Any):
        super().__init__(**kwargs)
        self.use_timesteps = set(use_timesteps)
        self.process = ForwardProcess(kwargs["betas"], self.use_timesteps, kwargs.get("rescale_timesteps", False))

    def p_mean_variance(self, model: Callable[..., Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def training_losses(self, model: Callable[..., Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return super().training_losses(self._wrap_model(model), *args, **kwargs)

    def condition_mean(self, cond_fn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    def condition_score(self, cond_fn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return super().condition_score(self._wrap_model(cond_fn), *args, **kwargs)

    def _wrap_model(self, model: Callable[..., Tensor]) -> "_WrappedModel":
        if isinstance(model, _WrappedModel):
            return model
        return _WrappedModel(model, self.timestep_map, self.rescale_timesteps, self.original_num_steps)

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        """As they are: the wrapped model translates them."""
        return t


@functools.cache
def _as_tensor(timestep_map: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(timestep_map, device=device, dtype=dtype)


class _WrappedModel:
    """A network or a cond_fn that is called with respaced steps, and sees original ones."""

    def __init__(
        self,
        model: Callable[..., Tensor],
        timestep_map: Sequence[int],
        rescale_timesteps: bool,
        original_num_steps: int,
    ):
        self.model = model
        self.timestep_map = timestep_map
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = original_num_steps

    def __call__(self, x: Tensor, ts: Tensor, **kwargs: Any) -> Tensor:
        original = _as_tensor(tuple(self.timestep_map), ts.device, ts.dtype)[ts]
        if self.rescale_timesteps:
            original = original.float() * (1000.0 / self.original_num_steps)
        return self.model(x, original, **kwargs)
