"""What each training loss is made of, and what it trains: against the reference's numbers and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

import golden
from guided_diffusion.diffusion.denoiser import ModelMeanType, ModelVarType
from guided_diffusion.diffusion.losses import LossType, bpd_loop, prior_bpd
from guided_diffusion.diffusion.process import ForwardProcess, get_named_beta_schedule
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.training.schedule_sampler import LossSecondMomentSampler

STEPS = 50
X0 = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
NOISE = torch.randn(X0.shape, generator=torch.Generator().manual_seed(1))


def diffusion_of(loss_type, mean_type=ModelMeanType.EPSILON, var_type=ModelVarType.LEARNED_RANGE):
    return GaussianDiffusion(
        betas=get_named_beta_schedule("linear", STEPS),
        model_mean_type=mean_type,
        model_var_type=var_type,
        loss_type=loss_type,
    )


@pytest.mark.parametrize(
    ("name", "kind", "part", "factor"),
    [
        ("adm32_kl_linear", LossType.KL, "loss", 1 / 100),  # the reference ran the rescaled bound, of 100 steps
        ("iddpm32_cosine_learned", LossType.MSE, "vb", 1000 / 4000),  # and this one rescaled for 4000
    ],
)
def test_the_other_scale_of_a_reference_loss(name, kind, part, factor):
    case, reference = golden.load("unet", name)
    network, diffusion = create_model_and_diffusion(**golden.flags(case["flags"]))
    assert diffusion.loss_type is not kind
    diffusion.loss_type = kind
    x0 = (0.5 * golden.normal(case["seed"], 2, 3, 32, 32)).clamp(-1, 1)
    t = torch.tensor([diffusion.num_timesteps - 1, 2])
    losses = diffusion.training_losses(golden.fill(network), x0, t, noise=golden.normal(case["seed"] + 1, 2, 3, 32, 32))
    golden.assert_close(losses[part], factor * reference[f"loss_{part}"])
    if "mse" in losses:
        golden.assert_close(losses["mse"], reference["loss_mse"])
        torch.testing.assert_close(losses["loss"], losses["mse"] + losses["vb"])


def truth(diffusion, t):
    """What a network that knows everything says of x_t."""
    x_t = diffusion.q_sample(X0, t, NOISE)
    return {
        ModelMeanType.EPSILON: NOISE,
        ModelMeanType.START_X: X0,
        ModelMeanType.VELOCITY: diffusion.process.velocity(X0, t, NOISE),
        ModelMeanType.PREVIOUS_X: diffusion.process.q_posterior_mean(X0, x_t, t),
    }[diffusion.model_mean_type]


@pytest.mark.parametrize("mean_type", ModelMeanType)
def test_a_network_that_knows_everything_has_no_loss(mean_type):
    """The squared error is 0; so is the bound where the variance is the posterior's (the lower end of its range)."""
    t = torch.tensor([1, 10, 30, STEPS - 1])
    for loss_type in LossType:
        diffusion = diffusion_of(loss_type, mean_type)
        output = torch.cat([truth(diffusion, t), torch.full_like(X0, -1.0)], dim=1)
        losses = diffusion.training_losses(lambda x, steps, output=output: output, X0, t, noise=NOISE)
        assert set(losses) == ({"loss"} if "KL" in loss_type.name else {"loss", "mse", "vb"})
        for value in losses.values():
            torch.testing.assert_close(value, torch.zeros(4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("mean_type", ModelMeanType)
def test_the_squared_error_is_that_of_what_the_network_predicts(mean_type):
    diffusion = diffusion_of(LossType.MSE, mean_type, ModelVarType.FIXED_LARGE)
    t = torch.tensor([0, 10, 30, STEPS - 1])
    output = truth(diffusion, t) + torch.tensor([0.0, 0.5, 1.0, 2.0])[:, None, None, None]
    losses = diffusion.training_losses(lambda x, steps: output, X0, t, noise=NOISE)
    torch.testing.assert_close(losses["mse"], torch.tensor([0, 0.25, 1, 4]))
    assert torch.equal(losses["loss"], losses["mse"])


@pytest.mark.parametrize("loss_type", LossType)
def test_the_bound_trains_only_the_variance_in_the_hybrid_loss(loss_type):
    diffusion = diffusion_of(loss_type)
    t = torch.tensor([0, 10, 30, STEPS - 1])
    output = torch.cat([NOISE + 0.3, torch.zeros_like(X0)], dim=1).requires_grad_()
    losses = diffusion.training_losses(lambda x, steps: output, X0, t, noise=NOISE)

    def moved(part):
        [gradient] = torch.autograd.grad(losses[part].sum(), output, retain_graph=True)
        return [bool((half != 0).any()) for half in gradient.chunk(2, dim=1)]

    assert moved("loss") == [True, True]
    if "vb" in losses:
        assert moved("vb") == [False, True]
        assert moved("mse") == [True, False]


def test_a_wrong_mean_costs_its_square_in_units_of_the_variance():
    """KL of two Gaussians of one variance, and by closed form between the ends of the range of variances."""
    t = torch.tensor([1, 10, 30, STEPS - 1])
    diffusion = diffusion_of(LossType.KL, ModelMeanType.PREVIOUS_X)
    low = torch.tensor(diffusion.process.posterior_variance)[t]
    high = torch.tensor(diffusion.betas)[t]
    for fraction, shift in [(-1.0, 0.1), (1.0, 0.0), (0.5, 0.2)]:
        output = torch.cat([truth(diffusion, t) + shift, torch.full_like(X0, fraction)], dim=1)
        losses = diffusion.training_losses(lambda x, steps, output=output: output, X0, t, noise=NOISE)
        variance = torch.exp((1 + fraction) / 2 * high.log() + (1 - fraction) / 2 * low.log())
        expected = ((variance / low).log() - 1 + low / variance + shift**2 / variance) / 2 / math.log(2)
        torch.testing.assert_close(losses["loss"], expected.float(), atol=1e-4, rtol=1e-3)


def test_the_last_term_is_the_likelihood_of_the_pixels():
    diffusion = diffusion_of(LossType.KL, ModelMeanType.PREVIOUS_X)
    t, fraction = torch.zeros(4, dtype=torch.int64), 0.7
    process = diffusion.process
    log_variance = 0.85 * np.log(process.betas[0]) + 0.15 * process.posterior_log_variance_clipped[0]
    mean = X0.clamp(-0.98, 0.98) + 0.004
    output = torch.cat([mean, torch.full_like(X0, fraction)], dim=1)
    losses = diffusion.training_losses(lambda x, steps: output, X0, t, noise=NOISE)
    pixels, scale = X0.double().numpy(), math.exp(log_variance / 2)
    upper = np.where(pixels > 0.999, np.inf, pixels + 1 / 255)
    lower = np.where(pixels < -0.999, -np.inf, pixels - 1 / 255)
    shares = norm.cdf(upper, mean, scale) - norm.cdf(lower, mean, scale)
    bits = -np.log2(np.maximum(shares, 1e-12)).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(losses["loss"], bits, rtol=5e-3)


def test_the_bound_is_the_prior_and_every_term():
    process = ForwardProcess(np.full(3, 0.1))
    terms = {0: 1.0, 1: 10.0, 2: 100.0}
    found = bpd_loop(
        process,
        X0,
        lambda _: torch.zeros_like(X0),
        lambda x_t, t: (torch.tensor([terms[int(step)] for step in t]), x_t),
        lambda x0: torch.arange(len(x0)) + 1000.0,
    )
    assert found["total_bpd"].tolist() == [1111.0 + i for i in range(len(X0))]
    assert found["vb"][0].tolist() == [100.0, 10.0, 1.0]


def test_the_prior_term():
    process = diffusion_of(LossType.KL).process
    end = process.alphas_cumprod[-1]
    ours = torch.distributions.Normal(math.sqrt(end) * X0, math.sqrt(1 - end))
    bits = torch.distributions.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0)).mean(dim=(1, 2, 3)) / math.log(
        2
    )
    torch.testing.assert_close(prior_bpd(process, X0), bits, atol=1e-6, rtol=1e-4)


def test_weights_of_the_second_moment_sampler():
    """p ∝ √E[L²] of each step's last ten losses, with a thousandth of uniform; weights 1/(T p)."""
    sampler = LossSecondMomentSampler(3)
    losses = torch.tensor([[1.0, 2.0, 4.0]]).T * (1 + torch.arange(25) / 10)  # 25 losses a step, growing
    for column in losses.T:
        sampler.update(torch.arange(3), column)
    root = losses[:, -10:].square().mean(dim=1).sqrt().double()
    expected = 0.999 * root / root.sum() + 0.001 / 3
    np.testing.assert_allclose(sampler.probabilities(), expected, rtol=1e-6)
    t, weights = sampler.sample(torch.rand(3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    np.testing.assert_allclose(weights, 1 / (3 * expected[t]), rtol=1e-6)
    np.testing.assert_allclose(torch.bincount(t) / 3000, expected, atol=0.03)


def test_the_second_moment_sampler_is_uniform_until_every_step_has_ten_losses():
    sampler = LossSecondMomentSampler(2)
    sampler.update(torch.tensor([0] * 30 + [1] * 9), torch.arange(39.0))
    assert sampler.probabilities().tolist() == [0.5, 0.5]
    assert sampler.sample(torch.rand(9))[1].tolist() == [1.0] * 9
    sampler.update(torch.tensor([1]), torch.tensor([1.0]))
    assert sampler.probabilities()[0] < sampler.probabilities()[1]
