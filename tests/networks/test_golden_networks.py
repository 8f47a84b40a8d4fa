"""Networks, schedules, losses and p_mean_variance against guided-diffusion's own numbers."""

import numpy as np
import pytest
import torch

import golden
from guided_diffusion.script_util import create_classifier, create_model_and_diffusion, sr_create_model_and_diffusion

CASES = golden.names("unet")
DIFFUSION_CASES = [name for name in CASES if "classifier" not in name]


def build(case):
    """(network, diffusion or None, side, network arguments besides x and timesteps)."""
    flags, seed, extra = golden.flags(case["flags"]), case["seed"], {}
    if case["kind"] == "classifier":
        side = int(flags.pop("image_size"))
        return golden.fill(create_classifier(side, **flags)), None, side, extra
    if case["kind"] == "sr":
        side, small = int(flags.pop("large_size")), int(flags.pop("small_size"))
        network, diffusion = sr_create_model_and_diffusion(side, small, **flags)
        extra["low_res"] = golden.normal(seed + 2, 2, 3, small, small)
    else:
        side = int(flags["image_size"])
        network, diffusion = create_model_and_diffusion(**flags)
    if flags.get("class_cond") == "True":
        extra["y"] = golden.labels(seed, 2)
    return golden.fill(network), diffusion, side, extra


@pytest.mark.parametrize("name", CASES)
def test_network_output(name):
    case, reference = golden.load("unet", name)
    network, _, side, extra = build(case)
    x = 0.5 * golden.normal(case["seed"], 2, 3, side, side)
    golden.assert_close(network(x, torch.tensor(case["timesteps_model"]), **extra), reference["output"])


@pytest.mark.parametrize("name", DIFFUSION_CASES)
def test_schedule(name):
    case, reference = golden.load("unet", name)
    _, diffusion, _, _ = build(case)
    np.testing.assert_allclose(diffusion.betas, reference["betas"].numpy(), rtol=1e-10)
    np.testing.assert_allclose(diffusion.alphas_cumprod, reference["alphas_cumprod"].numpy(), rtol=1e-10)
    assert diffusion.timestep_map == reference["timestep_map"].tolist()


@pytest.mark.parametrize("name", DIFFUSION_CASES)
def test_losses(name):
    case, reference = golden.load("unet", name)
    network, diffusion, side, extra = build(case)
    seed = case["seed"]
    x0 = (0.5 * golden.normal(seed, 2, 3, side, side)).clamp(-1, 1)
    noise = golden.normal(seed + 1, 2, 3, side, side)
    t = torch.tensor([diffusion.num_timesteps - 1, 2])
    golden.assert_close(diffusion.q_sample(x0, t, noise), reference["q_sample"])
    losses = diffusion.training_losses(network, x0, t, extra, noise)
    wanted = [key for key in reference if key.startswith("loss_")]
    assert wanted
    for key in wanted:
        golden.assert_close(losses[key.removeprefix("loss_")], reference[key])


@pytest.mark.parametrize("name", DIFFUSION_CASES)
def test_mean_and_variance(name):
    case, reference = golden.load("unet", name)
    network, diffusion, side, extra = build(case)
    x = 0.5 * golden.normal(case["seed"], 2, 3, side, side)
    t = torch.tensor([diffusion.num_timesteps - 1, 2])
    result = diffusion.p_mean_variance(network, x, t, model_kwargs=extra)
    golden.assert_close(result["mean"], reference["p_mean"])
    golden.assert_close(result["log_variance"], reference["p_log_variance"])
    torch.testing.assert_close(result["variance"], result["log_variance"].exp())
