"""Schedules, respacing and the forward process."""

import numpy as np
import pytest
import torch

from guided_diffusion.diffusion.denoiser import ModelMeanType, ModelVarType, NetworkDenoiser
from guided_diffusion.diffusion.process import (
    NOISE_ALONE,
    ForwardProcess,
    NoiseLevels,
    get_named_beta_schedule,
    half_log_snr,
    kept_timesteps,
    space_timesteps,
)
from guided_diffusion.script_util import create_gaussian_diffusion

X0 = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
EPS = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def test_linear_schedule():
    betas = get_named_beta_schedule("linear", 1000)
    assert betas[0] == pytest.approx(1e-4)
    assert betas[-1] == pytest.approx(0.02)
    assert get_named_beta_schedule("linear", 4000)[-1] == pytest.approx(0.005)


def test_cosine_schedule_is_the_cosine_but_for_its_cap():
    betas = get_named_beta_schedule("cosine", 1000)
    time = np.arange(1, 901) / 1000
    expected = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - betas)[:900], expected, rtol=1e-9)
    assert betas.max() == 0.999


@pytest.mark.parametrize(("name", "steps"), [("linear", 10), ("quadratic", 1000)])
def test_impossible_schedules_are_refused(name, steps):
    with pytest.raises(ValueError, match=r"diffusion_steps|noise_schedule"):
        get_named_beta_schedule(name, steps)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ("5", {0, 2, 4, 7, 9}),
        ([10], set(range(10))),
        ("ddim5", {0, 2, 4, 6, 8}),
        ("1,3", {0, 5, 7, 9}),
        ("1", {0}),
    ],
)
def test_respacing(sections, expected):
    assert space_timesteps(10, sections) == expected


def test_respacing_by_thirds():
    kept = space_timesteps(300, "10,15,20")
    assert [sum(low <= step < low + 100 for step in kept) for low in (0, 100, 200)] == [10, 15, 20]


@pytest.mark.parametrize(
    "sections", ["0", "-3", "1001", "ddim0", "ddim7000", "ddim-1", "ddim999", "abc", "10,", "ddim"]
)
def test_impossible_respacing_is_refused(sections):
    with pytest.raises(ValueError, match="timestep_respacing"):
        space_timesteps(1000, sections)


def test_half_log_snr():
    assert half_log_snr(np.array([1.0, 0.5, 0.8, 0.0])).tolist() == [np.inf, 0, pytest.approx(np.log(2)), -np.inf]


@pytest.mark.parametrize("count", [1, 2, 7, 20, 100, 999, 1000])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_steps_evenly_spread_in_the_signal_to_noise_ratio(schedule, count):
    betas = get_named_beta_schedule(schedule, 1000)
    kept = sorted(kept_timesteps(betas, f"logsnr{count}"))
    assert len(kept) == count
    assert 0 <= kept[0] <= kept[-1] < 1000
    assert kept[0] == 0 or count == 1
    levels = half_log_snr(np.cumprod(1 - betas))
    if count < 900:
        assert levels[kept[-1]] == pytest.approx(max(levels[-1], NOISE_ALONE), abs=0.15)
    if 1 < count < 20:
        wanted = np.linspace(levels[0], max(levels[-1], NOISE_ALONE), count)
        nearest = [int(np.abs(levels - level).argmin()) for level in wanted]
        assert kept == nearest


def test_where_the_original_steps_are_too_far_apart_all_are_kept():
    betas = get_named_beta_schedule("linear", 1000)
    kept = sorted(kept_timesteps(betas, "logsnr100"))
    widths = -np.diff(half_log_snr(np.cumprod(1 - betas)))
    even = widths.sum() / 99
    wide = int((widths > even).argmin())
    assert wide > 3
    assert kept[: wide + 1] == list(range(wide + 1))
    assert (np.diff(kept)[50:] > 3).all()


def test_other_respacings_are_upstream_s():
    betas = get_named_beta_schedule("linear", 300)
    for respacing in ("25", "10,15,20", "ddim25", [300]):
        assert kept_timesteps(betas, respacing) == space_timesteps(300, respacing)


@pytest.mark.parametrize("respacing", ["logsnr", "logsnr0", "logsnr-1", "logsnr1001", "logsnr10,10", "logsnrx"])
def test_impossible_numbers_of_such_steps_are_refused(respacing):
    with pytest.raises(ValueError, match=r"timestep_respacing: .* is not logsnrN with an N from 1 to 1000"):
        kept_timesteps(get_named_beta_schedule("linear", 1000), respacing)


def test_respaced_process_has_the_same_noise_levels():
    betas = get_named_beta_schedule("linear", 100)
    whole, part = ForwardProcess(betas), ForwardProcess(betas, space_timesteps(100, "7"))
    assert part.num_timesteps == 7
    np.testing.assert_allclose(part.alphas_cumprod, whole.alphas_cumprod[part.timestep_map], rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 7])
@pytest.mark.parametrize("respacing", ["7", "logsnr7"])
def test_the_first_steps_are_a_process_with_the_same_tables(respacing, steps):
    betas = get_named_beta_schedule("cosine", 100)
    whole = ForwardProcess(betas, kept_timesteps(betas, respacing), rescale_timesteps=True)
    part = whole.first(steps)
    assert part.num_timesteps == steps
    assert part.original_num_steps == 100
    assert part.timestep_map == whole.timestep_map[:steps]
    tables = [name for name, table in vars(whole).items() if isinstance(table, np.ndarray) and len(table) == 7]
    assert {"betas", "alphas_cumprod", "posterior_mean_coef1", "fixed_large_log_variance", "timesteps"} <= {*tables}
    for name in tables:
        # The last step has none after it; of a single step the variance is none, and its logarithm stands for nothing.
        ends = 1 if name == "alphas_cumprod_next" and steps < 7 else 0
        if steps > 1 or "variance" not in name:
            kept = steps - ends
            assert np.array_equal(getattr(part, name)[:kept], getattr(whole, name)[:kept]), name
    levels = NoiseLevels(whole.alphas, whole.sigmas, whole.timesteps).first(steps)
    for name in ("alphas", "sigmas", "norms", "timesteps", "x0_factors"):
        assert len(getattr(levels, name)) == steps
    assert np.array_equal(levels.sigmas, part.sigmas)


def test_a_network_of_4000_steps_sees_timesteps_below_1000():
    diffusion = create_gaussian_diffusion(
        steps=4000, noise_schedule="cosine", rescale_timesteps=True, timestep_respacing="50"
    )
    t = torch.arange(50)
    seen = diffusion.process.network_timesteps(t)
    assert seen.dtype is torch.float32
    assert seen.min() == 0
    assert 990 < seen.max() < 1000
    torch.testing.assert_close(seen, torch.tensor(diffusion.timestep_map) / 4.0)


def test_without_rescaling_a_network_sees_original_steps():
    diffusion = create_gaussian_diffusion(steps=1000, timestep_respacing="ddim25")
    assert diffusion.process.network_timesteps(torch.tensor([0, 1, 24])).tolist() == [0, 40, 960]


def test_eps_and_x0_are_two_ways_to_say_one_thing():
    process = ForwardProcess(get_named_beta_schedule("linear", 1000))
    t = torch.tensor([20, 700])
    x_t = process.q_sample(X0, t, EPS)
    torch.testing.assert_close(process.x0_from_eps(x_t, t, EPS), X0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(process.eps_from_x0(x_t, t, X0), EPS, atol=1e-4, rtol=1e-4)
    mean = process.q_posterior_mean(X0, x_t, t)
    torch.testing.assert_close(process.x0_from_previous(x_t, t, mean), X0, atol=1e-3, rtol=1e-3)


def test_posterior_by_bayes():
    process = ForwardProcess(get_named_beta_schedule("linear", 20))
    t, previous = 6, 5
    alpha, alpha_bar_prev = 1 - process.betas[t], process.alphas_cumprod[previous]
    precision = alpha / process.betas[t] + 1 / (1 - alpha_bar_prev)
    assert process.posterior_variance[t] == pytest.approx(1 / precision)
    x0, x_t = 0.3, -1.2
    mean = (np.sqrt(alpha) / process.betas[t] * x_t + np.sqrt(alpha_bar_prev) / (1 - alpha_bar_prev) * x0) / precision
    ours = process.q_posterior_mean(torch.tensor([[x0]]), torch.tensor([[x_t]]), torch.tensor([t]))
    assert ours.item() == pytest.approx(mean, rel=1e-5)


def test_tables_survive_the_meta_device():
    with torch.device("meta"):
        process = create_gaussian_diffusion(steps=100).process
    rows = process.at("betas", torch.tensor([0, 99]), X0)
    assert rows.shape == (2, 1, 1, 1)
    torch.testing.assert_close(rows.flatten(), torch.tensor([0.001, 0.2]))


@pytest.mark.parametrize("mean_type", ModelMeanType)
@pytest.mark.parametrize("var_type", ModelVarType)
def test_every_parametrisation_says_the_same(mean_type, var_type):
    """A network that knows ε, said as each mean type, gives the same x̂_0, ε and posterior mean."""
    process = ForwardProcess(get_named_beta_schedule("linear", 1000))
    t = torch.tensor([400, 700])
    x_t = process.q_sample(X0, t, EPS)
    said = {
        ModelMeanType.EPSILON: EPS,
        ModelMeanType.START_X: X0,
        ModelMeanType.PREVIOUS_X: process.q_posterior_mean(X0, x_t, t),
        ModelMeanType.VELOCITY: process.velocity(X0, t, EPS),
    }[mean_type]
    extra = torch.full_like(X0, -0.4)
    output = torch.cat([said, extra], dim=1) if var_type.learned else said
    prediction = NetworkDenoiser(lambda x, steps: output, process, mean_type, var_type)(x_t, t, {})
    torch.testing.assert_close(prediction.eps, EPS, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(prediction.x0, X0, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(prediction.mean, process.q_posterior_mean(X0, x_t, t), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(prediction.variance, prediction.log_variance.exp(), atol=1e-6, rtol=1e-4)
    low, high = process.posterior_variance[400], process.betas[400]
    expected = {
        ModelVarType.LEARNED: np.exp(-0.4),
        ModelVarType.LEARNED_RANGE: np.exp(0.3 * np.log(high) + 0.7 * np.log(low)),
        ModelVarType.FIXED_SMALL: low,
        ModelVarType.FIXED_LARGE: high,
    }[var_type]
    assert prediction.variance[0, 0, 0, 0].item() == pytest.approx(expected, rel=1e-4)
    moved = prediction.with_eps(EPS + 0.01)
    torch.testing.assert_close(moved.raw_x0, process.x0_from_eps(x_t, t, EPS + 0.01))
    assert not torch.equal(moved.mean, prediction.mean)


LEVELS = {
    "variance kept": ([0.8, 0.6], [0.6, 0.8]),
    "variance growing": ([1.0, 1.0], [0.5, 12.0]),
    "no signal at the first step": ([0.8, 0.0], [0.6, 1.0]),
}


@pytest.mark.parametrize("scale", LEVELS)
@pytest.mark.parametrize("mean_type", [ModelMeanType.EPSILON, ModelMeanType.START_X, ModelMeanType.VELOCITY])
def test_noise_levels_of_any_scale_say_the_same(scale, mean_type):
    levels = NoiseLevels(*LEVELS[scale], torch.tensor([1.5, 999.0]))
    t = torch.tensor([0, 1])
    x_t = levels.q_sample(X0, t, EPS)
    alpha, sigma = (torch.tensor(values).reshape(2, 1, 1, 1) for values in LEVELS[scale])
    torch.testing.assert_close(x_t, alpha * X0 + sigma * EPS)
    # v of Salimans & Ho, at the level of the same signal-to-noise ratio whose variance is one.
    angle = torch.atan2(sigma, alpha)
    v = angle.cos() * EPS - angle.sin() * X0
    said = {ModelMeanType.EPSILON: EPS, ModelMeanType.START_X: X0, ModelMeanType.VELOCITY: v}[mean_type]
    told = []

    def network(_x, timesteps):
        told.append(timesteps.tolist())
        return said

    prediction = NetworkDenoiser(network, levels, mean_type, None, clip_denoised=False)(x_t, t, {})
    assert told == [[1.5, 999.0]]
    assert prediction.variance is None
    known = levels.has_signal(t, x_t).flatten() | (mean_type is not ModelMeanType.EPSILON)
    torch.testing.assert_close(prediction.eps, EPS, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prediction.raw_x0[known], X0[known], atol=1e-5, rtol=1e-5)
    assert known.all() == (mean_type is not ModelMeanType.EPSILON or scale != "no signal at the first step")
    torch.testing.assert_close(prediction.output[known], said[known], atol=1e-6, rtol=1e-6)
    other = prediction.with_output(said + 0.1)
    torch.testing.assert_close(other.output[known], said[known] + 0.1, atol=1e-5, rtol=1e-5)
    again = levels.q_sample(other.raw_x0, t, other.eps)
    torch.testing.assert_close(again[known], x_t[known], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mean_type", ModelMeanType)
def test_a_prediction_tells_the_output_it_stands_for(mean_type):
    process = ForwardProcess(get_named_beta_schedule("linear", 100))
    t = torch.tensor([30, 60])
    x_t = process.q_sample(X0, t, EPS)
    said = {
        ModelMeanType.EPSILON: EPS,
        ModelMeanType.START_X: X0,
        ModelMeanType.PREVIOUS_X: process.q_posterior_mean(X0, x_t, t),
        ModelMeanType.VELOCITY: process.velocity(X0, t, EPS),
    }[mean_type]
    prediction = NetworkDenoiser(lambda x, steps: said, process, mean_type, ModelVarType.FIXED_LARGE)(x_t, t, {})
    if mean_type is ModelMeanType.VELOCITY:
        torch.testing.assert_close(prediction.output, said)
    else:
        assert torch.equal(prediction.output, said)
    other = NetworkDenoiser(lambda x, steps: said + 0.1, process, mean_type, ModelVarType.FIXED_LARGE)(x_t, t, {})
    moved = prediction.with_output(said + 0.1)
    for name in ("eps", "raw_x0", "mean"):
        assert torch.equal(getattr(moved, name), getattr(other, name))


def test_where_no_signal_is_left_x0_is_kept():
    """ᾱ = 0 at the last step (zero terminal SNR): ε says nothing of x̂_0 there."""
    process = ForwardProcess(np.array([0.1, 0.5, 1.0]))
    t = torch.tensor([2, 1])
    denoiser = NetworkDenoiser(lambda x, steps: X0, process, ModelMeanType.START_X, ModelVarType.FIXED_LARGE)
    moved = denoiser(process.q_sample(X0, t, EPS), t, {}).with_eps(EPS + 1)
    assert torch.equal(moved.raw_x0[0], X0[0])
    assert not torch.equal(moved.raw_x0[1], X0[1])
    guided = moved.with_eps(EPS + 1, otherwise=X0 + 2)
    assert torch.equal(guided.raw_x0[0], X0[0] + 2)
    assert torch.equal(guided.raw_x0[1], moved.raw_x0[1])


@pytest.mark.parametrize(
    "process",
    [
        ForwardProcess(np.array([0.1, 0.5, 1.0])),
        NoiseLevels([0.9, 0.6, 0.0], [0.436, 0.8, 1.0], torch.arange(3)),
    ],
    ids=["forward process", "noise levels"],
)
def test_where_no_signal_is_left_x_t_is_the_noise(process):
    t = torch.tensor([2, 1])
    x_t = process.q_sample(X0, t, EPS)
    assert torch.equal(process.eps_from_x0(x_t, t, X0)[0], x_t[0])
    torch.testing.assert_close(process.eps_from_x0(x_t, t, X0), EPS)
    found = process.x0_from_eps(x_t, t, EPS)
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1], X0[1], atol=1e-5, rtol=1e-5)
    kept = process.x0_from_eps(x_t, t, EPS, otherwise=X0 + 2)
    assert torch.equal(kept[0], X0[0] + 2)
    assert torch.equal(kept[1], found[1])


def test_x0_and_eps_are_rounded_as_guided_diffusion_rounds_them():
    process = ForwardProcess(get_named_beta_schedule("cosine", 4000), range(0, 4000, 16))
    t = torch.arange(250)
    x_t, eps = torch.randn(2, 250, 3, generator=torch.Generator().manual_seed(2))
    recip, recipm1 = (
        torch.from_numpy(table).float()[:, None]
        for table in (process.sqrt_recip_alphas_cumprod, process.sqrt_recipm1_alphas_cumprod)
    )
    x0 = process.x0_from_eps(x_t, t, eps)
    assert torch.equal(x0, recip * x_t - recipm1 * eps)
    assert torch.equal(process.eps_from_x0(x_t, t, x0), (recip * x_t - x0) / recipm1)


def test_a_network_without_variance_is_told_from_one_with():
    diffusion = create_gaussian_diffusion(steps=100, learn_sigma=True)
    with pytest.raises(ValueError, match="learn_sigma"):
        diffusion.p_mean_variance(lambda x, t: x, X0, torch.tensor([1, 2]))
