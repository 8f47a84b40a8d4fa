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
            chosen = log_probs.gather(1, y.reshape(-1, 1))
            return torch.autograd.grad(chosen.sum(), x)[0] * self.scale


def with_classifier(denoiser: Denoiser, cond_fn: Callable[..., Tensor]) -> Denoiser:
    """A denoiser whose predictions carry cond_fn(x_t, original timestep, **condition) as `log_prob_grad`."""

    def denoise(x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        prediction = denoiser(x_t, t, condition)
        gradient = cond_fn(x_t, prediction.process.network_timesteps(t), **condition)
        return replace(prediction, log_prob_grad=gradient.float())

    return denoise
