"""Training losses and the variational bound (Ho et al. 2020; Nichol & Dhariwal 2021), in bits per dimension."""

import enum
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .denoiser import Condition, ModelMeanType, NetworkDenoiser, Prediction, spread
from .process import ForwardProcess


def mean_flat(tensor: Tensor) -> Tensor:
    """Mean over all dimensions but the first: [N, ...] to [N]."""
    return tensor.flatten(1).mean(dim=1)


class LossType(enum.Enum):
    """MSE adds the bound of a learned variance as it is, RESCALED_MSE times T/1000; KL is the bound itself."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        """Whether it is the bound alone."""
        return self in (LossType.KL, LossType.RESCALED_KL)


def normal_kl(mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """KL divergence of two diagonal Gaussians in nats, elementwise; arguments broadcast."""
    logvar1, logvar2 = torch.as_tensor(logvar1), torch.as_tensor(logvar2)
    return 0.5 * (logvar2 - logvar1 - 1 + (logvar1 - logvar2).exp() + (mean1 - mean2) ** 2 * (-logvar2).exp())


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """Φ(x) ≈ (1 + tanh(√(2/π)(x + 0.044715 x³)))/2, as in the published bounds."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """log P of 8-bit values x (scaled to [−1, 1]) under a Gaussian integrated over each value's bin, in nats."""
    precision = (-log_scales).exp()
    upper = approx_standard_normal_cdf(precision * (x - means + 1 / 255))
    lower = approx_standard_normal_cdf(precision * (x - means - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def vb_terms_bpd(prediction: Prediction, x0: Tensor) -> Tensor:
    """One term of the variational bound for each row, [N] bits/dim: KL to the posterior, or −log p(x_0) at t = 0."""
    process, t, x_t = prediction.process, prediction.t, prediction.x_t
    log_variance = spread(prediction.log_variance)
    kl = normal_kl(
        process.q_posterior_mean(x0, x_t, t),
        process.at("posterior_log_variance_clipped", t, x_t),
        prediction.mean,
        log_variance,
    )
    nll = -discretized_gaussian_log_likelihood(x0, means=prediction.mean, log_scales=0.5 * log_variance)
    return torch.where(t == 0, mean_flat(nll), mean_flat(kl)) / math.log(2)


def prior_bpd(process: ForwardProcess, x0: Tensor) -> Tensor:
    """KL of q(x_T | x_0) from the standard normal, [N] bits/dim."""
    t = torch.full((len(x0),), process.num_timesteps - 1, device=x0.device)
    mean = process.at("sqrt_alphas_cumprod", t, x0) * x0
    log_variance = process.at("log_one_minus_alphas_cumprod", t, x0)
    return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2)


Bound = Callable[[Callable[..., Tensor], Tensor], Tensor]
"""Terms of the bound [N], in bits/dim, of a network at x_t."""


def training_losses(
    denoiser: NetworkDenoiser,
    loss_type: LossType,
    x0: Tensor,
    t: Tensor,
    condition: Condition,
    noise: Tensor,
    bound: Bound,
) -> dict[str, Tensor]:
    """Losses of one batch, each [N]: `loss`, and its parts `mse` and `vb` where there are two.

    x0: [N, C, H, W] in [−1, 1]; t: [N] steps; noise: of x0's shape. The bound trains only the variance in the MSE
    losses (its mean is detached: L_hybrid of Nichol & Dhariwal, Eq. 16).
    """
    process, var_type = denoiser.process, denoiser.var_type
    assert var_type is not None, "a loss is of networks whose Σ is known"
    x_t = process.q_sample(x0, t, noise)
    if loss_type.is_vb():
        loss = bound(denoiser.network, x_t)
        return {"loss": loss * process.num_timesteps if loss_type is LossType.RESCALED_KL else loss}
    output = denoiser.network(x_t, process.network_timesteps(t), **condition)
    value, learned = output.split(x0.shape[1], dim=1) if var_type.learned else (output, None)
    target = {
        ModelMeanType.EPSILON: lambda: noise,
        ModelMeanType.START_X: lambda: x0,
        ModelMeanType.VELOCITY: lambda: process.velocity(x0, t, noise),
        ModelMeanType.PREVIOUS_X: lambda: process.q_posterior_mean(x0, x_t, t),
    }[denoiser.mean_type]()
    mse = mean_flat((target - value) ** 2)
    if learned is None:
        return {"loss": mse, "mse": mse}
    frozen = torch.cat([value.detach(), learned], dim=1)
    vb = bound(lambda *_arguments, **_condition: frozen, x_t)
    if loss_type is LossType.RESCALED_MSE:
        vb = vb * process.num_timesteps / 1000
    return {"loss": mse + vb, "mse": mse, "vb": vb}


Term = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of (x_t, t): a term of the bound [N], in bits/dim, and x̂_0 of x_t's shape."""


@torch.no_grad()
def bpd_loop(
    process: ForwardProcess,
    x0: Tensor,
    noise_of: Callable[[int], Tensor],
    term: Term,
    prior: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """The whole variational bound of x0, [N, C, H, W] in [−1, 1].

    noise_of: the noise of a step, of x0's shape. prior: of x0, [N] bits/dim. Returns `total_bpd` and `prior_bpd` [N] in
    bits/dim, and for each step (last first) `vb` [N, T] in bits/dim, `xstart_mse` and `mse` (of ε) [N, T].
    """
    vb, xstart_mse, mse = [], [], []
    for time in reversed(range(process.num_timesteps)):
        t = torch.full((len(x0),), time, device=x0.device)
        noise = noise_of(time)
        x_t = process.q_sample(x0, t, noise)
        bits, predicted = term(x_t, t)
        vb.append(bits)
        xstart_mse.append(mean_flat((predicted - x0) ** 2))
        mse.append(mean_flat((process.eps_from_x0(x_t, t, predicted) - noise) ** 2))
    prior_bits = prior(x0)
    terms = torch.stack(vb, dim=1)
    return {
        "total_bpd": terms.sum(dim=1) + prior_bits,
        "prior_bpd": prior_bits,
        "vb": terms,
        "xstart_mse": torch.stack(xstart_mse, dim=1),
        "mse": torch.stack(mse, dim=1),
    }
