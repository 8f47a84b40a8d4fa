"""Solvers of few steps: their order, their fixed points, diffusers' numbers, and the flag."""

import json
from functools import partial

import numpy as np
import pytest
import torch

import latents
from guided_diffusion.diffusion import samplers, solvers
from guided_diffusion.diffusion.denoiser import ModelMeanType, NetworkDenoiser, Prediction
from guided_diffusion.diffusion.noise import SampleNoise
from guided_diffusion.diffusion.process import ForwardProcess, get_named_beta_schedule, kept_timesteps, space_timesteps
from guided_diffusion.guidance.base import GuidedDenoiser
from guided_diffusion.guidance.classifier import with_classifier
from guided_diffusion.runs.pipeline import SAMPLERS
from guided_diffusion.script_util import create_guidance, create_model_and_diffusion
from guided_diffusion.settings.runs import FLOW_SAMPLERS
from running import refused, run
from small import SMALL, randomised

ODE = {"ddim": samplers.ddim, "dpm++2m": solvers.dpm_solver_2m, "unipc": solvers.unipc}
DIFFUSION = {name: sample for name, sample in SAMPLERS.items() if name not in FLOW_SAMPLERS}
NEW = {name: sample for name, sample in DIFFUSION.items() if name not in ("ddpm", "ddim")}
each_new = pytest.mark.parametrize("sample", NEW.values(), ids=NEW)
SHAPE = (2, 3, 16, 16)
MEAN, STD = 0.3, 0.5


def no_noise(_step):
    raise AssertionError("a solver of the ODE asked for noise")


def evenly_spaced(steps, low=-4.0, high=3.0):
    """A process of so many steps, evenly spaced in λ."""
    alphas_cumprod = 1 / (1 + np.exp(-2 * np.linspace(high, low, steps)))
    return ForwardProcess(1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))


def exact(process, x, t, _condition):
    """The denoiser of data N(MEAN, STD²), in the precision of x."""
    alpha_bar = torch.from_numpy(process.alphas_cumprod)[t].reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    alpha, variance = alpha_bar.sqrt(), 1 - alpha_bar
    eps = (x - alpha * MEAN) * variance.sqrt() / (alpha_bar * STD**2 + variance)
    return Prediction(process, x, t, {}, eps, (x - variance.sqrt() * eps) / alpha)


def error(sample, steps):
    """How far the last noisy state is from the exact path; the jump from there to x_0 is no matter of order."""
    process = evenly_spaced(steps)
    x_T = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    *_, before, _ = sample(partial(exact, process), process, x_T, {}, no_noise)
    spreads = [np.sqrt(alpha_bar * STD**2 + 1 - alpha_bar) for alpha_bar in process.alphas_cumprod[[-1, 0]]]
    start, end = np.sqrt(process.alphas_cumprod[[-1, 0]]) * MEAN
    return (before.x - (end + (x_T - start) * spreads[1] / spreads[0])).abs().max().item()


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpm++2m", 2), ("unipc", 3)])
def test_order_of_convergence(name, order):
    """Twice the steps make the error 2^order smaller; UniPC-2's corrector adds one to the order it is named for."""
    errors = [error(ODE[name], steps) for steps in (81, 161, 321)]
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), order, atol=0.05)


def certain(process, image):
    """The denoiser that always believes in one image."""
    return NetworkDenoiser(lambda x, t: image.expand_as(x), process, ModelMeanType.START_X, None)


@pytest.mark.parametrize("name", ["dpm++2m", "unipc"])
def test_one_image_is_reached_on_its_exact_path(name):
    process = ForwardProcess(get_named_beta_schedule("cosine", 1000), space_timesteps(1000, "9"))
    image = torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4)
    x_T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    eps = (x_T - process.sqrt_alphas_cumprod[-1] * image) / process.sqrt_one_minus_alphas_cumprod[-1]
    for state in NEW[name](certain(process, image), process, x_T, {}, no_noise):
        if state.t:
            wanted = process.q_sample(image.expand_as(x_T), torch.full((2,), state.t - 1), eps.float())
            torch.testing.assert_close(state.x, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(state.x, image.expand_as(x_T))


def test_the_sde_has_the_noise_of_every_level():
    process = ForwardProcess(get_named_beta_schedule("linear", 1000), space_timesteps(1000, "9"))
    image = torch.full((1, 1, 1, 1), 0.7)
    generator = torch.Generator().manual_seed(1)
    x_T = torch.randn(40000, 1, 1, 1, generator=generator)
    asked = []

    def noise(step):
        asked.append(step)
        return torch.randn(x_T.shape, generator=generator)

    for state in NEW["dpm++2m-sde"](certain(process, image), process, x_T, {}, noise):
        if state.t:
            assert state.x.mean().item() == pytest.approx(process.sqrt_alphas_cumprod[state.t - 1] * 0.7, abs=0.02)
            assert state.x.std().item() == pytest.approx(process.sqrt_one_minus_alphas_cumprod[state.t - 1], rel=0.02)
    assert torch.equal(state.x, image.expand_as(x_T))
    assert asked == list(range(8, 0, -1))


def test_the_sde_reaches_the_data():
    process = evenly_spaced(60)
    torch.manual_seed(2)
    x_T = torch.randn(20000, 1)
    *_, last = NEW["dpm++2m-sde"](partial(exact, process), process, x_T, {}, lambda _: torch.randn_like(x_T))
    assert last.x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert last.x.std().item() == pytest.approx(STD, rel=0.02)


@each_new
def test_one_step_is_the_prediction(sample):
    process = evenly_spaced(1)
    x_T = torch.randn(4, 1)
    [state] = sample(partial(exact, process), process, x_T, {}, no_noise)
    assert state.t == 0
    assert torch.equal(state.x, state.prediction.x0)


DIFFUSERS = {
    "dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}),
}


def waves(x, timesteps):
    """A network that is no line in x and depends on the timestep."""
    return (x + 0.3 * torch.sin(3 * x + timesteps.reshape(-1, 1, 1, 1) / 100)) * 0.9


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
@pytest.mark.parametrize("respacing", ["3", "12", "ddim20", "logsnr12"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", DIFFUSERS)
def test_every_state_is_that_of_diffusers(name, schedule, respacing):
    betas = get_named_beta_schedule(schedule, 1000)
    process = ForwardProcess(betas, kept_timesteps(betas, respacing))
    kind, settings = DIFFUSERS[name]
    theirs = getattr(latents.diffusers(), kind)(
        trained_betas=betas, lower_order_final=True, final_sigmas_type="zero", **settings
    )
    theirs.set_timesteps(process.num_timesteps)
    theirs.timesteps = torch.tensor(process.timestep_map[::-1])
    alphas_cumprod = process.alphas_cumprod[::-1]
    theirs.sigmas = torch.tensor(np.append(np.sqrt((1 - alphas_cumprod) / alphas_cumprod), 0.0))
    x = x_T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    noises = torch.randn(process.num_timesteps, 2, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    denoiser = NetworkDenoiser(waves, process, ModelMeanType.EPSILON, None, clip_denoised=False)
    for state in NEW[name](denoiser, process, x_T, {}, lambda step: noises[step]):
        timestep = torch.tensor(process.timestep_map[state.t])
        random = {"variance_noise": noises[state.t]} if name == "dpm++2m-sde" else {}
        x = theirs.step(waves(x, timestep.expand(2)), timestep, x, return_dict=False, **random)[0]
        torch.testing.assert_close(state.x, x, atol=1e-4, rtol=1e-4)


def of_label(denoiser, value, spread):
    """`denoiser` of Gaussian data with the exact gradient of log p(y = value | x_t), where y = x_0 + spread · noise."""

    def gradient(x, t):
        alpha_bar = torch.from_numpy(denoiser.args[0].alphas_cumprod).float()[t].reshape(-1, 1)
        slope = alpha_bar.sqrt() * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar)
        mean = MEAN + slope * (x - alpha_bar.sqrt() * MEAN)
        variance = STD**2 * (1 - alpha_bar.sqrt() * slope) + spread**2
        return slope * (value - mean) / variance

    return with_classifier(denoiser, gradient)


@pytest.mark.parametrize("name", [name for name in DIFFUSION if name != "ddpm"])
def test_a_classifier_leads_to_the_data_of_its_class(name):
    """Bayes: N(MEAN, STD²) seen through y of spread τ is N((MEAN τ² + y STD²) / (STD² + τ²), STD² τ² / (STD² + τ²))."""
    process = evenly_spaced(200)
    torch.manual_seed(5)
    x_T = torch.randn(20000, 1)
    value, spread = 1.0, 0.4
    denoiser = of_label(partial(exact, process), value, spread)
    *_, last = SAMPLERS[name](denoiser, process, x_T, {}, lambda _: torch.randn_like(x_T))
    total = STD**2 + spread**2
    assert last.x.mean().item() == pytest.approx((MEAN * spread**2 + value * STD**2) / total, abs=0.01)
    assert last.x.std().item() == pytest.approx(STD * spread / total**0.5, rel=0.03)


@pytest.mark.parametrize("name", ["ddim", *NEW])
@pytest.mark.parametrize("guided_by_classifier", [False, True])
def test_a_process_that_begins_without_signal(name, guided_by_classifier):
    """Zero terminal SNR, λ_T = −∞: the first step mixes x̂_0 and pure noise, and nothing is remembered of its width."""
    process = ForwardProcess(np.append(get_named_beta_schedule("cosine", 8)[:7], 1.0))
    denoiser = NetworkDenoiser(lambda x, _: torch.tanh(x), process, ModelMeanType.START_X, None)
    if guided_by_classifier:
        denoiser = with_classifier(denoiser, lambda x, _: 0.1 * x)
    x_T = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(6))
    noises = torch.randn(8, 2, 1, 4, 4, generator=torch.Generator().manual_seed(7))
    states = list(SAMPLERS[name](denoiser, process, x_T, {}, lambda step: noises[step]))
    assert torch.equal(states[0].prediction.eps, x_T)
    fresh = noises[7] if name == "dpm++2m-sde" else x_T
    if name == "ddim" and guided_by_classifier:
        fresh = x_T - 0.1 * x_T  # ε moves against the gradient
    wanted = process.q_sample(torch.tanh(x_T), torch.full((2,), 6), fresh)
    torch.testing.assert_close(states[0].x, wanted, atol=1e-6, rtol=1e-6)
    if name == "dpm++2m":
        torch.testing.assert_close(states[1].x, samplers.ddim_step(states[1].prediction, None), atol=1e-6, rtol=1e-5)
    assert all(state.x.isfinite().all() for state in states)


@each_new
@pytest.mark.parametrize("respacing", ["", "10", "logsnr10"])
def test_the_noisy_end_of_the_cosine_schedule(sample, respacing):
    """σ/α is 20,000 there, so that x̂_0 of a network of ε is anything, until it is clamped."""
    betas = get_named_beta_schedule("cosine", 1000)
    process = ForwardProcess(betas, kept_timesteps(betas, respacing or [1000]))
    denoiser = NetworkDenoiser(waves, process, ModelMeanType.EPSILON, None)
    torch.manual_seed(8)
    x_T = torch.randn(2, 3, 4, 4)
    for state in sample(denoiser, process, x_T, {}, lambda _: torch.randn_like(x_T)):
        assert state.x.isfinite().all()
        assert state.x.abs().max() < 10
    assert state.x.abs().max() <= 1


@each_new
def test_guidance_is_the_denoiser_s_own(sample, small):
    network, diffusion = small
    noise = SampleNoise(0, range(2), SHAPE[1:])

    def last(scale, every=1):
        sag = create_guidance(network, sag_scale=scale, sag_block="middle_block.1", guide_every=every)
        guided = GuidedDenoiser(diffusion.denoiser(network), diffusion.process, [sag])
        *_, state = sample(guided, diffusion.process, noise.x_T(), {}, noise)
        return state.x, guided.evaluations

    *_, plain = sample(diffusion.denoiser(network), diffusion.process, noise.x_T(), {}, noise)
    off, guided, reused = last(0.0), last(0.5), last(0.5, every=4)
    assert torch.equal(off[0], plain.x)
    assert not torch.equal(guided[0], plain.x)
    assert [evaluations for _, evaluations in (off, guided, reused)] == [8, 16, 10]


@each_new
def test_the_variance_of_the_network_does_not_matter(sample, small):
    network, diffusion = small
    noise = SampleNoise(0, range(2), SHAPE[1:])
    without = NetworkDenoiser(network, diffusion.process, ModelMeanType.EPSILON, None)
    *_, one = sample(diffusion.denoiser(network), diffusion.process, noise.x_T(), {}, noise)
    *_, other = sample(without, diffusion.process, noise.x_T(), {}, noise)
    assert torch.equal(one.x, other.x)


@each_new
def test_sample_i_is_sample_i(sample):
    process = ForwardProcess(get_named_beta_schedule("linear", 1000), space_timesteps(1000, "9"))
    denoiser = NetworkDenoiser(waves, process, ModelMeanType.EPSILON, None)

    def made(indices):
        noise = SampleNoise(9, indices, (3, 4, 4))
        *_, last = sample(denoiser, process, noise.x_T(), {}, noise)
        return last.x

    assert torch.equal(made(range(5))[[3, 1]], made([3, 1]))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "network.pt"
    torch.save(randomised(create_model_and_diffusion(**SMALL)[0]).state_dict(), path)
    return path


@pytest.fixture
def flags(weights):
    return SMALL | {"model_path": weights, "timestep_respacing": 4, "num_samples": 2, "batch_size": 2}


def sampled(flags, out_dir, **more):
    """The images of a run."""
    run("image_sample", **flags, out_dir=out_dir, **more)
    [path] = out_dir.glob("samples_*.npz")
    with np.load(path) as file:
        return file["arr_0"]


def test_every_sampler_makes_other_images(flags, tmp_path):
    made = [sampled(flags, tmp_path / name, sampler=name) for name in DIFFUSION]
    for i, one in enumerate(made):
        assert not any(np.array_equal(one, other) for other in made[:i])


def test_two_names_of_one_sampler(flags, tmp_path, capsys):
    by_default, ddpm = sampled(flags, tmp_path / "default"), sampled(flags, tmp_path / "ddpm", sampler="ddpm")
    assert np.array_equal(by_default, ddpm)
    flags = flags | {"ddim_eta": 0.5}
    settings = [{"use_ddim": True}, {"sampler": "ddim"}, {"sampler": "ddim", "use_ddim": True}]
    ddim = [sampled(flags, tmp_path / f"ddim{i}", **given) for i, given in enumerate(settings)]
    assert np.array_equal(ddim[0], ddim[1])
    assert np.array_equal(ddim[0], ddim[2])
    capsys.readouterr()
    said = refused(capsys, "image_sample", **flags, sampler="unipc", use_ddim=True, out_dir=tmp_path / "both")
    assert said == "error: sampler, use_ddim: unipc is not ddim; give one of the two\n"
    said = refused(capsys, "image_sample", **flags, sampler="pndm", out_dir=tmp_path / "pndm")
    assert "sampler: wanted ddpm, ddim, dpm++2m, dpm++2m-sde, unipc, euler, heun, got 'pndm'" in said


def test_a_sampler_replaces_use_ddim_of_a_file(flags, tmp_path):
    (tmp_path / "ddim.yaml").write_text("use_ddim: true\n")
    sampled(flags, tmp_path / "out", config=tmp_path / "ddim.yaml", sampler="unipc")
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert (settings["sampler"], settings["use_ddim"]) == ("unipc", False)


def test_folders_older_than_the_flag_stay_what_they_are(flags, tmp_path, capsys):
    sampled(flags, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "sampler" in manifest["settings"]
    assert "sampler" not in manifest["identity"]
    capsys.readouterr()
    said = refused(capsys, "image_sample", **flags, sampler="unipc", out_dir=tmp_path / "out")
    assert "sampler was the default, is 'unipc'" in said
