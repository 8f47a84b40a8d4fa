"""Samplers: x_T down to x_0 by any denoiser. They know nothing of guidance, but for a classifier's gradient."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .denoiser import Condition, Denoiser, Prediction, spread
from .process import ForwardProcess, NoiseLevels
from .times import every_row

Noise = Callable[[int], Tensor]
"""Standard normal noise [N, C, H, W] of a step, counted in the respaced process; asked for once a step or never."""


@dataclass(frozen=True, eq=False)
class State:
    """After the step from x_t to x_{t−1}: `x` is x_{t−1}, `prediction` the belief at x_t; t is respaced."""

    t: int
    x: Tensor
    prediction: Prediction


def _noise_free(t: Tensor, x: Tensor) -> Tensor:
    return (t == 0).reshape(-1, *[1] * (x.ndim - 1))


def shifted_mean(mean: Tensor, variance: Tensor, gradient: Tensor) -> Tensor:
    """μ + Σ · ∇ log p(y | x_t), a classifier's effect on ancestral sampling (Dhariwal & Nichol 2021, Alg. 1)."""
    return mean + variance * gradient


def shifted_eps(process: NoiseLevels, t: Tensor, eps: Tensor, gradient: Tensor) -> Tensor:
    """ε − σ_t · ∇ log p(y | x_t), a classifier's effect on DDIM (Dhariwal & Nichol 2021, Alg. 2)."""
    return eps - process.at("sigmas", t, eps) * gradient


def ddpm_step(prediction: Prediction, noise: Tensor | None) -> Tensor:
    """x_{t−1} ~ N(μ, Σ) (Ho et al. 2020); a classifier shifts μ.

    noise: of x_t's shape, not used where t = 0; None adds none. A ValueError where the prediction has no Σ.
    """
    mean = prediction.mean
    if prediction.log_prob_grad is not None:
        mean = shifted_mean(mean, spread(prediction.variance), prediction.log_prob_grad)
    if noise is None:
        return mean
    std = (0.5 * spread(prediction.log_variance)).exp()
    return torch.where(_noise_free(prediction.t, mean), mean, mean + std * noise)


def ddim_belief(prediction: Prediction) -> tuple[Tensor, Tensor]:
    """(x̂_0, ε) that DDIM steps with: x̂_0 restricted and ε following it; a classifier moves ε."""
    process, x_t, t = prediction.process, prediction.x_t, prediction.t
    x0 = prediction.x0
    # Where x̂_0 was not changed, the network's own ε is the exact one.
    eps = torch.where(x0 == prediction.raw_x0, prediction.eps, process.eps_from_x0(x_t, t, x0))
    if prediction.log_prob_grad is not None:
        eps = shifted_eps(process, t, eps, prediction.log_prob_grad)
        x0 = process.x0_from_eps(x_t, t, eps, otherwise=x0)
    return x0, eps


def ddim_move(
    process: NoiseLevels, t: Tensor, x0: Tensor, eps: Tensor, noise: Tensor | None, eta: float = 0.0
) -> Tensor:
    """x_{t−1} of DDIM from a belief (x̂_0, ε) at t (Song et al. 2021, Eq. 12)."""
    alpha_bar = process.at("alphas_cumprod", t, x0)
    alpha_bar_prev = process.at("alphas_cumprod_prev", t, x0)
    sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)).sqrt()
    mean = x0 * alpha_bar_prev.sqrt() + (1 - alpha_bar_prev - sigma**2).sqrt() * eps
    return mean if noise is None else torch.where(_noise_free(t, x0), mean, mean + sigma * noise)


def ddim_reverse_move(process: NoiseLevels, t: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """x_{t+1} on the deterministic path of DDIM, from image to noise."""
    alpha_bar_next = process.at("alphas_cumprod_next", t, x0)
    return x0 * alpha_bar_next.sqrt() + (1 - alpha_bar_next).sqrt() * eps


def ddim_step(prediction: Prediction, noise: Tensor | None, eta: float = 0.0) -> Tensor:
    """x_{t−1} of DDIM; eta: 0 deterministic, 1 as random as DDPM."""
    return ddim_move(prediction.process, prediction.t, *ddim_belief(prediction), noise, eta)


def descend(
    advance: Callable[[Prediction, Tensor | None], Tensor],
    denoiser: Denoiser,
    process: NoiseLevels,
    x_T: Tensor,
    condition: Condition,
    noise: Noise | None,
) -> Iterator[State]:
    """One network call a step, from x_T, [N, C, H, W]; `advance` makes of its belief and of noise the next x."""
    x = x_T
    for t in reversed(range(process.num_timesteps)):
        with torch.no_grad():
            prediction = denoiser(x, every_row(t, x), condition)
            x = advance(prediction, noise(t) if noise and t else None)
        yield State(t, x, prediction)


def ddpm(
    denoiser: Denoiser, process: ForwardProcess, x_T: Tensor, condition: Condition, noise: Noise
) -> Iterator[State]:
    """Ancestral sampling from x_T, [N, C, H, W]: one State a step, the last one's x is the sample."""
    return descend(ddpm_step, denoiser, process, x_T, condition, noise)


def ddim(
    denoiser: Denoiser,
    process: ForwardProcess,
    x_T: Tensor,
    condition: Condition,
    noise: Noise | None = None,
    eta: float = 0.0,
) -> Iterator[State]:
    """DDIM from x_T, [N, C, H, W]; noise is asked for only where eta is not 0."""
    return descend(partial(ddim_step, eta=eta), denoiser, process, x_T, condition, noise if eta else None)
