"""Samplers with denoisers whose answer is known, and the door's loops."""

import pytest
import torch

from guided_diffusion.diffusion import samplers
from guided_diffusion.diffusion.denoiser import ModelMeanType, ModelVarType, NetworkDenoiser
from guided_diffusion.diffusion.noise import SampleNoise, sample_labels
from guided_diffusion.diffusion.process import ForwardProcess, get_named_beta_schedule
from guided_diffusion.script_util import create_gaussian_diffusion, create_guidance

SHAPE = (2, 3, 16, 16)


def gaussian_data(process, mean, std):
    """The exact denoiser of data N(mean, std²)."""

    def network(x, timesteps):
        alpha_bar = process.at("alphas_cumprod", timesteps, x)
        spread = alpha_bar * std**2 + 1 - alpha_bar
        return (x - alpha_bar.sqrt() * mean) * (1 - alpha_bar).sqrt() / spread

    return NetworkDenoiser(network, process, ModelMeanType.EPSILON, ModelVarType.FIXED_SMALL, clip_denoised=False)


@pytest.mark.parametrize(("name", "eta"), [("ddpm", None), ("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0)])
def test_samplers_reach_the_data(name, eta):
    process = ForwardProcess(get_named_beta_schedule("linear", 1000))
    torch.manual_seed(0)
    x_T = torch.randn(20000, 1, 1, 1)
    settings = {} if eta is None else {"eta": eta}
    denoiser = gaussian_data(process, 0.3, 0.1)
    *_, last = getattr(samplers, name)(denoiser, process, x_T, {}, lambda _: torch.randn_like(x_T), **settings)
    assert last.x.mean().item() == pytest.approx(0.3, abs=0.01)
    assert last.x.std().item() == pytest.approx(0.1, rel=0.05)


def test_ddim_with_eta_1_is_ddpm_with_the_small_variance():
    process = ForwardProcess(get_named_beta_schedule("cosine", 100))
    x_t, noise = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 3, 40, 90])
    prediction = gaussian_data(process, 0.3, 0.5)(x_t, t, {})
    ddim, ddpm = samplers.ddim_step(prediction, noise, eta=1.0), samplers.ddpm_step(prediction, noise)
    torch.testing.assert_close(ddim[1:], ddpm[1:], atol=1e-4, rtol=1e-4)


def test_no_noise_at_the_last_step():
    process = ForwardProcess(get_named_beta_schedule("linear", 50))
    x_t = torch.randn(2, 3, 4, 4)
    prediction = gaussian_data(process, 0.0, 1.0)(x_t, torch.tensor([0, 1]), {})
    for step in (samplers.ddpm_step, lambda p, noise: samplers.ddim_step(p, noise, eta=1.0)):
        with_noise, without = step(prediction, torch.ones_like(x_t)), step(prediction, None)
        assert torch.equal(with_noise[0], without[0])
        assert not torch.equal(with_noise[1], without[1])


def test_ancestral_sampling_needs_a_variance():
    process = ForwardProcess(get_named_beta_schedule("linear", 50))
    denoiser = NetworkDenoiser(lambda x, _t: x, process, ModelMeanType.EPSILON, None)
    x_T = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="variance: ddpm and the variational bound need a denoiser with one"):
        next(samplers.ddpm(denoiser, process, x_T, {}, lambda _: x_T))


def test_ddim_can_be_reversed():
    diffusion = create_gaussian_diffusion(steps=1000, noise_schedule="cosine")
    process = diffusion.process
    model = gaussian_data(process, 0.1, 0.5).network
    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    t = torch.full((4,), 499)
    up = diffusion.ddim_reverse_sample(model, x, t, clip_denoised=False)["sample"]
    down = diffusion.ddim_sample(model, up, t + 1, clip_denoised=False)["sample"]
    torch.testing.assert_close(down, x, atol=1e-4, rtol=1e-3)


def test_classifier_shifts_the_mean_in_ddpm_and_eps_in_ddim():
    diffusion = create_gaussian_diffusion(steps=100)
    process = diffusion.process
    model = gaussian_data(process, 0.0, 1.0).network
    x, t = torch.randn(SHAPE), torch.full((2,), 50)
    noise = torch.zeros(SHAPE)
    seen = []

    def cond_fn(x, timesteps, y):
        seen.append((x, timesteps.tolist(), y.tolist()))
        return torch.full_like(x, 2.0)

    def network(x, timesteps, **_labels):
        return model(x, timesteps)

    kwargs = {"model_kwargs": {"y": torch.tensor([4, 7])}, "clip_denoised": False, "noise": noise}
    plain = diffusion.p_sample(network, x, t, **kwargs)["sample"]
    shifted = diffusion.p_sample(network, x, t, cond_fn=cond_fn, **kwargs)["sample"]
    torch.testing.assert_close(shifted - plain, torch.full_like(x, 2.0 * process.betas[50]), atol=1e-5, rtol=1e-3)
    [(seen_x, seen_t, seen_y)] = seen
    assert seen_x is x
    assert (seen_t, seen_y) == ([50, 50], [4, 7])
    out = diffusion.ddim_sample(network, x, t, cond_fn=cond_fn, **kwargs)
    eps = model(x, t) - 2.0 * process.sqrt_one_minus_alphas_cumprod[50]
    torch.testing.assert_close(out["pred_xstart"], process.x0_from_eps(x, t, eps), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_loops_are_their_single_steps(small, loop):
    network, diffusion = small
    guidance = create_guidance(network, guide_scale=1.5, sag_block="middle_block.1", guide_start=5)
    noises = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(3))
    x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    whole = getattr(diffusion, loop)(
        network, SHAPE, noise=x_T, guidance=guidance, step_noise=lambda step: noises[step], progress=False
    )
    single = getattr(diffusion, loop.removesuffix("_loop"))
    x = x_T
    for step in reversed(range(8)):
        out = single(network, x, torch.full((2,), step), guidance=guidance, noise=noises[step])
        x = out["sample"]
    assert torch.equal(x, whole)
    assert out["pred_xstart"].abs().max() <= 1
    unguided = getattr(diffusion, loop)(network, SHAPE, noise=x_T, step_noise=lambda step: noises[step])
    assert not torch.equal(unguided, whole)


def test_denoised_fn_comes_before_the_clamp(small):
    network, diffusion = small
    x, t = torch.randn(SHAPE), torch.full((2,), 3)
    out = diffusion.p_mean_variance(network, x, t, denoised_fn=lambda x0: torch.full_like(x0, 5.0))
    assert (out["pred_xstart"] == 1).all()


def test_bound_is_the_sum_of_its_terms(small):
    network, diffusion = small
    x0 = torch.rand(SHAPE) * 2 - 1
    bpd = diffusion.calc_bpd_loop(network, x0)
    assert bpd["vb"].shape == bpd["mse"].shape == bpd["xstart_mse"].shape == (2, 8)
    torch.testing.assert_close(bpd["total_bpd"], bpd["vb"].sum(dim=1) + bpd["prior_bpd"])
    assert (bpd["total_bpd"] > 0).all()


def test_noise_belongs_to_the_sample():
    one = SampleNoise(7, range(5), (3, 4, 4))
    other = SampleNoise(7, [3, 1], (3, 4, 4))
    assert torch.equal(one.x_T()[[3, 1]], other.x_T())
    for step in (9, 8, 7, 2, 1):  # in order (drawn ahead) and out of order
        assert torch.equal(one(step)[[3, 1]], other(step))
    assert not torch.equal(one(5), one(4))
    assert not torch.equal(one(5), one.x_T())
    assert not torch.equal(one.x_T(), SampleNoise(8, range(5), (3, 4, 4)).x_T())


def test_noise_is_standard_normal():
    noise = SampleNoise(0, range(100), (3, 32, 32))(4).double()
    assert noise.mean().abs() < 0.01
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    rows = noise.flatten(1)
    assert (torch.corrcoef(rows) - torch.eye(100)).abs().max() < 0.1


def test_noise_stays_what_it_is():
    """These numbers are in every sample ever made: they may not change."""
    noise = SampleNoise(1, [2], (1, 1, 2))
    torch.testing.assert_close(noise.x_T().flatten(), torch.tensor([-0.3608266, -0.2086328]), rtol=0, atol=1e-6)
    torch.testing.assert_close(noise(3).flatten(), torch.tensor([2.6426227, 0.8621097]), rtol=0, atol=1e-6)
    assert sample_labels(5, range(4), 1000).tolist() == [838, 499, 437, 741]


def test_labels_belong_to_the_sample():
    labels = sample_labels(3, range(1000), 10)
    assert torch.equal(sample_labels(3, [999, 5], 10), labels[[999, 5]])
    assert labels.unique().tolist() == list(range(10))
    assert torch.bincount(labels).min() > 60


def test_large_seeds_are_seeds_of_their_own():
    seeds = [0, 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1]
    drawn = [SampleNoise(seed, [0], (1, 2, 2)).x_T() for seed in seeds]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_impossible_seeds_are_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        SampleNoise(seed, [0], (1,))
