"""Classifier guidance (Dhariwal & Nichol 2021): ∇ log p(y | x_t) beside a prediction; each sampler applies it."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion.denoiser import Condition, Denoiser, Prediction


class ClassifierGradient(nn.Module):
    """cond_fn(x, t, y) = scale · ∇_x log p(y | x) of a noisy-image classifier, of x's shape."""

    def __init__(self, classifier: nn.Module, scale: float):
        super().__init__()
        self.classifier = classifier
        self.scale = scale

    def forward(self, x: Tensor, t: Tensor, y: Tensor, **_other_conditions: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_probs = F.log_softmax(self.classifier(x, t), dim=-1)
            self._check(y, log_probs.shape[-1])
            chosen = log_probs.gather(1, y.reshape(-1, 1))
            return torch.autograd.grad(chosen.sum(), x)[0] * self.scale

    @staticmethod
    def _check(y: Tensor, classes: int) -> None:
        """Raise a ValueError where y holds no classes; out of range only on a CPU, a GPU says it itself."""
        wanted = f"y: wanted classes of the classifier, int64 from 0 to {classes - 1}"
        if y.dtype is not torch.int64:
            raise ValueError(f"{wanted}; got {str(y.dtype).removeprefix('torch.')}")
        if y.device.type == "cpu" and not ((y >= 0) & (y < classes)).all():
            raise ValueError(f"{wanted}; got {y.min()} to {y.max()}")


def gradient_of(cond_fn: Callable[..., Tensor], x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
    """`cond_fn(x, timesteps, **condition)`, also under inference mode, where nothing has a gradient.

    A ValueError if it gives no tensor.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            x, timesteps = x.clone(), timesteps.clone()
            condition = {name: part.clone() if isinstance(part, Tensor) else part for name, part in condition.items()}
            return gradient_of(cond_fn, x, timesteps, condition)
    gradient = cond_fn(x, timesteps, **condition)
    if not isinstance(gradient, Tensor):
        raise ValueError(f"cond_fn: wanted ∇ log p(y | x), a tensor of x's shape, got {type(gradient).__name__}")
    return gradient


def with_classifier(denoiser: Denoiser, cond_fn: Callable[..., Tensor]) -> Denoiser:
    """A denoiser whose predictions carry `cond_fn(x_t, original timestep, **condition)` as `log_prob_grad`."""

    def denoise(x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        prediction = denoiser(x_t, t, condition)
        gradient = gradient_of(cond_fn, x_t, prediction.process.network_timesteps(t), condition)
        return replace(prediction, log_prob_grad=gradient.float())

    return denoise
