"""Flow models: SiT's formulas written out in its own time, straight paths, the order of convergence, guidance, runs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion.diffusion.denoiser import ModelMeanType, NetworkDenoiser, Prediction
from guided_diffusion.diffusion.diffusion import build_diffusion
from guided_diffusion.diffusion.flow import LinearPath
from guided_diffusion.diffusion.noise import SampleNoise
from guided_diffusion.diffusion.solvers import SAMPLERS
from guided_diffusion.guidance.base import GuidedDenoiser, evaluations
from guided_diffusion.guidance.blur import gaussian_blur
from guided_diffusion.guidance.classifier_free import ClassifierFreeGuidance, null_class
from guided_diffusion.guidance.self_attention import SelfAttentionGuidance
from guided_diffusion.networks.attention import find_block, record_attention
from guided_diffusion.networks.dit import DiT
from guided_diffusion.runs.prepare import Configs, image_run, load
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.settings.model import DiffusionConfig
from guided_diffusion.settings.options import parse_args
from guided_diffusion.settings.runs import FLOW_SAMPLERS
from guided_diffusion.settings.scripts import SCRIPTS
from running import refused, run
from small import SMALL, randomised

MEAN, STD = 0.3, 0.5
STEPS = 4
X_T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
each_sampler = pytest.mark.parametrize("sampler", FLOW_SAMPLERS)


def flow(sampler, steps=STEPS):
    config = DiffusionConfig(noise_schedule="linear_path", timestep_respacing=str(steps), learn_sigma=True)
    return build_diffusion(config, sampler).called_by(sampler)


def no_noise(_step):
    raise AssertionError("a solver of the ODE asked for noise")


def states(sampler, denoiser, process, x_T, condition=None):
    return list(SAMPLERS[sampler](denoiser, process, x_T, condition or {}, no_noise))


class Waves:
    """A network of twice the channels that is no line in x and depends on t; keeps what it is told."""

    def __init__(self):
        self.told = []

    def __call__(self, x, t):
        self.told.append(t)
        v = torch.sin(2 * x + 3 * t.reshape(-1, 1, 1, 1)) - 0.5 * x
        return torch.cat([v, torch.full_like(v, 1e6)], dim=1)


def of_sit(network, x, t, h, twice):
    """One step of SiT's ODE dx/dt = v(x, t) from t to t + h: Euler's, or Heun's where `twice`."""

    def v(x, t):
        return network(x, torch.full((len(x),), t))[:, :3]

    first = v(x, t)
    return x + h * (first + v(x + h * first, t + h)) / 2 if twice else x + h * first


def test_euler_is_sits():
    network = Waves()
    diffusion = flow("euler")
    denoiser = diffusion.denoiser(network, clip_denoised=False)
    found = states("euler", denoiser, diffusion.process, X_T)
    assert network.told[0].dtype is torch.float32
    assert [told.tolist() for told in network.told] == [[number / STEPS] * 2 for number in range(STEPS)]
    x = X_T
    for number, state in enumerate(found):
        x = of_sit(Waves(), x, number / STEPS, 1 / STEPS, twice=False)
        torch.testing.assert_close(state.x, x, atol=1e-6, rtol=1e-6)


def test_heun_is_sits():
    network = Waves()
    diffusion = flow("heun")
    found = states("heun", diffusion.denoiser(network, clip_denoised=False), diffusion.process, X_T)
    assert [told[0].item() for told in network.told] == [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    assert [state.t for state in found] == list(reversed(range(diffusion.num_timesteps)))
    x = X_T
    for number in range(STEPS):
        x = of_sit(Waves(), x, number / STEPS, 1 / STEPS, twice=number < STEPS - 1)
        after = found[min(2 * number + 1, len(found) - 1)].x
        torch.testing.assert_close(after, x, atol=2e-6, rtol=1e-6)


@each_sampler
@pytest.mark.parametrize("steps", [1, 3])
def test_straight_paths_are_exact(sampler, steps):
    """A network that knows its x_0 leads there in one step, and in any number."""
    image = torch.linspace(-0.9, 0.9, 48).reshape(1, 3, 4, 4)
    diffusion = flow(sampler, steps)

    def network(x, t):
        v = (image - x) / (1 - t.reshape(-1, 1, 1, 1))
        return torch.cat([v, v], dim=1)

    for state in states(sampler, diffusion.denoiser(network), diffusion.process, X_T):
        u = max(state.t - 1, -1) // 2 + 1 if sampler == "heun" else state.t
        torch.testing.assert_close(state.x, image + u / steps * (X_T - image), atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(state.x, image.expand_as(X_T), atol=1e-6, rtol=1e-6)


def exact(process, x, t, _condition):
    """The denoiser of data N(MEAN, STD²), in the precision of x."""
    u = torch.from_numpy(process.sigmas)[t].reshape(-1, 1)
    variance = ((1 - u) * STD) ** 2 + u**2
    slope = (u - (1 - u) * STD**2) / variance * (x - (1 - u) * MEAN) - MEAN
    return Prediction(process, x, t, {}, x + (1 - u) * slope, x - u * slope, predicts=ModelMeanType.VELOCITY)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(sampler, order):
    """Paths to N(MEAN, STD²) are curved: twice the steps make the error 2^order smaller."""
    x_T = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    errors = []
    for steps in (128, 256, 512):
        process = flow(sampler, steps).process
        found = states(sampler, lambda *asked, process=process: exact(process, *asked), process, x_T)[-1].x
        errors.append((found - (MEAN + STD * x_T)).abs().max().item())
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), order, atol=0.05)


def test_the_ends_of_the_path():
    process = flow("euler").process
    assert (process.alphas[-1], process.sigmas[-1], process.sigmas[0]) == (0, 1, 1 / STEPS)
    t = torch.tensor([STEPS - 1, 0])
    x0, eps = X_T.tanh(), X_T.flip(0)
    x_t = process.q_sample(x0, t, eps)
    assert torch.equal(x_t[0], eps[0])
    found = process.from_velocity(x_t, t, process.velocity(x0, t, eps))
    torch.testing.assert_close(found, (x0, eps))
    assert torch.equal(process.x0_from_eps(x_t, t, eps, otherwise=x0)[0], x0[0])
    torch.testing.assert_close(process.eps_from_x0(x_t, t, x0), eps)


def test_a_part_of_the_path_is_one():
    process = flow("euler").process.first(2)
    assert isinstance(process, LinearPath)
    assert process.for_heun().timesteps.tolist() == [0.75, 0.75, 0.5]
    assert process.widths.tolist() == [0.25, 0.25]
    with pytest.raises(ValueError, match="for_heun"):
        states("heun", None, process, X_T)


@each_sampler
def test_x0_is_clamped_and_the_noise_follows(sampler):
    diffusion = flow(sampler)
    denoiser = diffusion.denoiser(lambda x, t: torch.full_like(x, 9.0).repeat(1, 2, 1, 1))
    for state in states(sampler, denoiser, diffusion.process, X_T):
        assert state.x.isfinite().all()
    torch.testing.assert_close(state.x, torch.ones_like(X_T))


def test_guidance_is_the_formulas():
    """CFG on 3 of 4 channels and SAG on SiT's velocities, step by step: Eq. 25 in ε = x − t v, x̂_0 = x + (1 − t) v."""
    torch.manual_seed(0)
    network = randomised(DiT(16, 2, 4, hidden_size=32, depth=2, num_heads=2, num_classes=4))
    block, null, sigma, s_c, s = find_block(network, "blocks.1"), null_class(4), 1.5, 0.5, 0.8
    y = {"y": torch.tensor([1, 2])}
    diffusion = flow("euler", 3)
    cfg = ClassifierFreeGuidance(scale=s_c, null=null, channels=3)
    sag = SelfAttentionGuidance(scale=s, block=block, blur_sigma=sigma)
    guided = GuidedDenoiser(diffusion.denoiser(network, clip_denoised=False), diffusion.process, [sag, cfg])
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))

    def v(x, t, condition):
        return network(x, torch.full((2,), t), **condition)[:, :4]

    moved = []
    for number, state in enumerate(states("euler", guided, diffusion.process, x, y)):
        t = number / 3
        with record_attention(block) as scores:
            v_u = v(x, t, null(y))
        v_c = v(x, t, y)
        mask = (scores[block] > 1).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)[:, None]
        assert 0.1 < mask.float().mean() < 0.9
        eps = x - t * v_u
        degraded = torch.where(mask, t * gaussian_blur(x + (1 - t) * v_u, sigma) + (1 - t) * eps, x)
        of_sag = eps - (degraded - t * v(degraded, t, null(y)))
        of_cfg = torch.cat([(v_c - v_u)[:, :3], torch.zeros_like(x[:, 3:])], dim=1)
        # v = (x − ε)/t: at t = 0, where ε is the noise itself, SAG does not act.
        v_guided = v_c + s_c * of_cfg - (s * of_sag / t if t else 0)
        moved.append([(v_guided - v_c)[:, channels].abs().max().item() for channels in (slice(3), slice(3, 4))])
        x = x + v_guided / 3
        torch.testing.assert_close(state.x, x, atol=2e-5, rtol=1e-5)
        x = state.x
    assert moved[0][1] == 0  # CFG's three channels alone
    assert min(moved[0][0], *moved[1], *moved[2]) > 1e-3


def test_a_difference_of_velocities_is_one_of_the_output(small):
    """`space="model"` on the path: v + s (v(x) − v(x̂)), as if both had been made at x."""
    network, _ = small
    process = flow("euler", 3).process
    denoiser = NetworkDenoiser(network, process, ModelMeanType.VELOCITY, None, clip_denoised=False)
    sag = SelfAttentionGuidance(scale=2.0, block=find_block(network, "middle_block.1"), space="model")
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)), torch.full((2,), 1)
    guided = GuidedDenoiser(denoiser, process, [sag])
    found = guided(x, t, {})
    degraded = sag.degrade(guided.last_step.base, sag.mask(guided.last_step))
    v, other = (network(each, process.network_timesteps(t))[:, :3] for each in (x, degraded))
    torch.testing.assert_close(found.output, v + 2 * (v - other), atol=2e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "network.pt"
    torch.save(randomised(DiT(16, 2, 3, hidden_size=32, depth=2, num_heads=2, num_classes=4)).state_dict(), path)
    return {
        "model_path": path, "network": "DiT-32x2x2/2", "image_size": 16, "learn_sigma": True, "class_cond": True,
        "num_classes": 4, "null_label": True, "noise_schedule": "linear_path", "timestep_respacing": 3,
        "sag_scale": 0.5, "sag_block": "blocks.1", "cfg_scale": 0.5, "cfg_channels": 2, "batch_size": 1,
    }  # fmt: skip


def test_a_run_goes_on(flags, tmp_path):
    """One sample, then two: the folder's first shard stays, and both are the samples of one run."""
    flags = flags | {"sampler": "heun"}
    for count in (1, 2):
        run("image_sample", **flags, num_samples=count, out_dir=tmp_path)
    about = json.loads((tmp_path / "manifest.json").read_text())
    assert (about["identity"]["noise_schedule"], about["identity"]["sampler"]) == ("linear_path", "heun")
    assert about["network_evaluations_per_sample"] == 15  # five calls, of three passes each
    with np.load(tmp_path / "samples_2x16x16x3.npz") as file:
        images = file["arr_0"]
    pipeline = load(**flags)
    assert evaluations(pipeline.guidances, pipeline.diffusion.process) == 15
    np.testing.assert_array_equal(images, pipeline.sample(2))
    assert images.std() > 10


def test_it_begins_with_images(flags, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images)
    pipeline = load(**flags, sampler="heun", init_image=tmp_path / "images.npz", strength=0.6)
    [first, *others] = [state for state, _ in pipeline.trajectory([0])]
    assert len(others) == 2
    assert first.prediction.process.sigmas.tolist() == [1 / 3, 1 / 3, 2 / 3]
    noise = SampleNoise(0, [0], (3, 16, 16)).x_T()
    x0 = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(first.prediction.x_t, x0 / 3 + noise * 2 / 3)


def test_sit_as_published():
    """Its tensors are DiT-XL/2's; what a sample takes is 249 calls, each of both passes."""
    configs = Configs.of(parse_args("", SCRIPTS["image_sample"].groups, ["--config", "sit_xl_256", "--sag_scale", "1"]))
    pipeline = image_run(configs, torch.device("meta"), weights=False).pipeline
    assert sum(parameter.numel() for parameter in pipeline.network.parameters()) == 675_129_632
    assert (pipeline.network.out_channels, pipeline.x_shape) == (8, (4, 32, 32))
    sag, cfg = pipeline.guidances
    assert (cfg.scale, cfg.channels, sag.channels) == (0.5, 3, None)
    assert evaluations([cfg], pipeline.diffusion.process) == 2 * 249
    assert evaluations([sag, cfg], pipeline.diffusion.process) == 3 * 249


TOGETHER = "sampler, noise_schedule: "
REFUSED = [
    ({}, f"{TOGETHER}a linear_path is sampled with euler or heun, got ddpm and linear_path"),
    ({"sampler": "unipc"}, f"{TOGETHER}a linear_path is sampled with euler or heun, got unipc and linear_path"),
    (
        {"sampler": "heun", "noise_schedule": "cosine"},
        f"{TOGETHER}euler and heun sample a linear_path, got heun and cosine",
    ),
    ({"sampler": "euler", "timestep_respacing": "ddim25"}, "timestep_respacing: a linear_path takes a number of steps"),
    ({"sampler": "euler", "timestep_respacing": "0"}, "timestep_respacing: a linear_path takes a number of steps"),
    ({"sampler": "euler", "timestep_respacing": "", "diffusion_steps": 0}, "diffusion_steps: a linear_path takes a"),
    (
        {"sampler": "euler", "predict_xstart": True},
        "predict_xstart: on a linear_path the network predicts the velocity",
    ),
    ({"sampler": "euler", "rescale_timesteps": True}, "rescale_timesteps: on a linear_path the network predicts"),
]


@pytest.mark.parametrize(("more", "said"), REFUSED)
def test_what_does_not_go_together_is_refused(flags, tmp_path, capsys, more, said):
    assert said in refused(capsys, "image_sample", **flags | more, out_dir=tmp_path / "out")


def test_it_is_neither_trained_nor_measured(flags, tmp_path, capsys):
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    settings = SMALL | {"noise_schedule": "linear_path", "data_dir": tmp_path}
    for script, more in (("image_train", {}), ("image_nll", {"model_path": flags["model_path"]})):
        said = refused(capsys, script, **settings, **more, out_dir=tmp_path / script)
        assert "neither trained nor measured" in said
    with pytest.raises(ValueError, match="neither trained nor measured"):
        flow("euler").training_losses(Waves(), X_T, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="linear_path is for --sampler euler or heun"):
        create_gaussian_diffusion(noise_schedule="linear_path")
    with pytest.raises(ValueError, match="no noisy-image classifier"):
        load(**flags, sampler="euler", classifier_path=flags["model_path"], classifier_scale=1.0)
