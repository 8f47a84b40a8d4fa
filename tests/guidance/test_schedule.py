"""When a guidance acts, and how strongly."""

import math

import numpy as np
import pytest
import torch

from guided_diffusion.diffusion.process import NoiseLevels
from guided_diffusion.guidance.base import GuidedDenoiser, evaluations
from guided_diffusion.guidance.perturbed_attention import PerturbedAttentionGuidance
from guided_diffusion.guidance.schedule import Schedule, changed
from guided_diffusion.networks.attention import find_block

SIGMAS = [0.1, 0.3, 1.0, 3.0, math.inf]
"""σ of each step; the last one is noise alone."""

PROCESS = NoiseLevels(
    [1 / math.hypot(1, s) for s in SIGMAS[:-1]] + [0.0],
    [s / math.hypot(1, s) for s in SIGMAS[:-1]] + [1.0],
    np.arange(5),
)


@pytest.mark.parametrize(
    ("text", "factors"),
    [
        ("", [1, 1, 1, 1, 1]),
        ("t=0.2,0.6", [0, 1, 1, 0, 0]),
        ("sigma=0.3,3", [0, 0, 1, 1, 0]),  # Kynkäänniemi et al.: low < σ ≤ high
        ("sigma=0,inf", [1, 1, 1, 1, 1]),
        ("t=0.4,1 sigma=0,1", [0, 0, 1, 0, 0]),
        ("scale=0:2,0.4:1,0.8:0", [2, 1.5, 1, 0.5, 0]),
        ("sigma_scale=0.1:1,1:3", [1, 1 + 2 * math.log(3) / math.log(10), 3, 3, 3]),
        ("scale=0:2 sigma_scale=1:1,3:0 every=3", [2, 2, 2, 0, 0]),
    ],
)
def test_factors(text, factors):
    schedule = changed(Schedule(), "cfg_schedule", text)
    np.testing.assert_allclose(schedule.factors(PROCESS), factors, rtol=1e-12)
    assert schedule.every == (3 if "every" in text else 1)


def test_a_text_changes_only_what_it_names():
    base = Schedule(0.1, 0.9, start=4, every=2)
    assert changed(base, "sag_schedule", "sigma=0.2,5") == Schedule(
        0.1, 0.9, start=4, every=2, sigma_low=0.2, sigma_high=5
    )
    assert changed(base, "sag_schedule", "every=1 t=0,1") == Schedule(start=4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0,1", "cfg_schedule: wanted words of t=lo,hi, .*got '0,1'"),
        ("t=0.5", "cfg_schedule: t: wanted lo,hi; got 't=0.5'"),
        ("t=0.5,0.2", "cfg_schedule: .*0 ≤ low < high ≤ 1, got 0.5,0.2"),
        ("sigma=3,1", "cfg_schedule: sigma: wanted 0 ≤ low < high, got 3,1"),
        ("every=2,3", "cfg_schedule: every: wanted int, got '2,3'"),
        ("every=0", "cfg_schedule: .*wanted 1 or more, got 0"),
        ("scale=1,2", "cfg_schedule: scale: wanted place:factor"),
        ("scale=0.5:1,0.2:1", "cfg_schedule: scale: wanted rising places from 0 on, got 0.5, 0.2"),
        ("scale=0:nan", "cfg_schedule: scale: wanted finite numbers"),
        ("sigma_scale=0:1", "cfg_schedule: sigma_scale: wanted rising places"),
    ],
)
def test_what_is_no_schedule_is_one_sentence(text, said):
    with pytest.raises(ValueError, match=said):
        changed(Schedule(), "cfg_schedule", text)


def test_the_scale_follows_the_step_and_steps_of_factor_zero_cost_nothing(small):
    network, diffusion = small
    block = find_block(network, "middle_block.1")

    def pag(scale, **schedule):
        return PerturbedAttentionGuidance(scale=scale, blocks=(block,), schedule=Schedule(**schedule))

    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    def eps(guidance, t):
        guided = GuidedDenoiser(diffusion.denoiser(network), diffusion.process, [guidance])
        return guided(x, torch.tensor(t), {}).eps, guided.evaluations

    fading = {"curve": ((0.0, 1.0), (0.5, 0.0))}
    for t, factor in ((0, 1.0), (2, 0.5), (3, 0.25)):
        torch.testing.assert_close(eps(pag(0.8, **fading), [t, t]), eps(pag(0.8 * factor), [t, t]))
    assert eps(pag(0.8, **fading), [4, 4])[1] == 1
    rows, _ = eps(pag(0.8, **fading), [2, 6])
    torch.testing.assert_close(rows[0], eps(pag(0.4), [2, 6])[0][0])
    assert torch.equal(rows[1], eps(pag(0.0), [2, 6])[0][1])
    assert evaluations([pag(0.8, **fading)], diffusion.process) == 8 + 4


def test_for_people():
    process = PROCESS
    assert Schedule().described(process) == "5 of 5 steps"
    schedule = Schedule(0.2, every=2, sigma_curve=((0.3, 0.5), (3.0, 2.0)))
    assert schedule.described(process) == "4 of 5 steps, every 2, scale × 0.5 to 2"
