"""The toy: its score is that of its density, and guidances move its points where they must."""

import json

import numpy as np
import pytest
import torch

from guided_diffusion.analysis.toy import CLASSES, ExactDenoiser, branches, compare, guidances, sampled
from guided_diffusion.diffusion.diffusion import build_diffusion
from guided_diffusion.settings.model import DiffusionConfig
from running import run

PROCESS = build_diffusion(DiffusionConfig(noise_schedule="cosine", timestep_respacing="25")).process
TRUTH = branches()
Y = torch.arange(400) % CLASSES


@pytest.mark.parametrize("label", [1, CLASSES])
@pytest.mark.parametrize("step", [0, 10, 24])
def test_eps_is_the_gradient_of_the_density_at_its_noise_level(label, step):
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    y = torch.full((6,), label)
    alpha, sigma = float(PROCESS.alphas[step]), float(PROCESS.sigmas[step])
    variance = alpha**2 * TRUTH.std**2 + sigma**2
    squares = (x[:, None] - alpha * TRUTH.means.double()).square().sum(dim=2)
    density = TRUTH.weights.double() * torch.exp(-squares / (2 * variance)) / (2 * torch.pi * variance)
    density = density[:, TRUTH.classes == label] if label < CLASSES else density / CLASSES
    # Far from everything a density of exactly 0 has no logarithm.
    x.retain_grad()
    log_density = density.sum(dim=1).clamp_min(1e-300).log()
    near = density.sum(dim=1) > 1e-200
    [gradient] = torch.autograd.grad(log_density.sum(), x)
    points = x.detach().float()[:, :, None, None]
    prediction = ExactDenoiser(TRUTH, PROCESS)(points, torch.full((6,), step), {"y": y})
    torch.testing.assert_close(prediction.eps[near][:, :, 0, 0].double(), -sigma * gradient[near], rtol=2e-3, atol=2e-3)
    assert near.any()
    if step == 0:
        return
    got = TRUTH.logits(points[:, :, 0, 0], y, alpha, sigma).logsumexp(dim=1)
    torch.testing.assert_close(got[near].double(), log_density[near].detach(), rtol=1e-3, atol=1e-3)


def test_points_without_guidance_are_those_of_the_density():
    points = sampled(ExactDenoiser(TRUTH, PROCESS), (), Y, seed=0)
    drawn, again = (TRUTH.draw(Y, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    found, chance = compare(points, Y, TRUTH, drawn), compare(again, Y, TRUTH, drawn)
    assert found.distance < chance.distance + 0.01
    assert found.outside < 0.05
    assert compare(drawn, Y, TRUTH, drawn).moved == 0
    far = compare(drawn + 5, Y, TRUTH, drawn)
    assert far.outside == 1
    assert far.distance > 1


def test_autoguidance_takes_points_in_that_a_blurred_score_left_outside():
    model, weak = (ExactDenoiser(TRUTH.smoothed(by), PROCESS) for by in (0.05, 0.15))
    drawn = TRUTH.draw(Y, torch.Generator().manual_seed(1))
    by_name = guidances(weak)
    outside = {
        name: compare(sampled(model, by_name[name], Y, seed=0), Y, TRUTH, drawn).outside
        for name in ("none", "autoguidance, s = 1")
    }
    assert outside["autoguidance, s = 1"] < outside["none"] / 3


def test_the_command_writes_a_figure_and_numbers(tmp_path, capsys):
    run("toy", points=40, steps=3, out=tmp_path / "toy.png", json=tmp_path / "toy.json")
    lines = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "toy.json").read_text())["found"]
    assert len(lines) == 1 + len(found) == 2 + len(guidances(None))
    assert lines[3].split("  ")[0] == "autoguidance, s = 1"
    assert "3 + 3" in lines[3]
    assert (tmp_path / "toy.png").stat().st_size > 1000
    assert all(np.isfinite(list(numbers.values())).all() for numbers in found.values())


def test_refusals(capsys):
    for flag, value, said in (("points", 4, "wanted a whole number from 8"), ("smoothing", -1, "wanted 0 or more")):
        with pytest.raises(SystemExit) as stop:
            run("toy", **{flag: value})
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
