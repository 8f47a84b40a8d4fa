"""Guidance of a transformer: every number of the golden cases, and what SAG, PAG and SEG are on its blocks."""

import re
from functools import cache

import pytest
import torch

import dits
import golden
from guided_diffusion.guidance.base import GuidedDenoiser
from guided_diffusion.guidance.classifier_free import ClassifierFreeGuidance, null_class
from guided_diffusion.guidance.masks import attention_mask
from guided_diffusion.guidance.perturbed_attention import PerturbedAttentionGuidance
from guided_diffusion.guidance.self_attention import SelfAttentionGuidance
from guided_diffusion.guidance.smoothed_energy import SmoothedEnergyGuidance
from guided_diffusion.networks.attention import find_block, replace_attention
from guided_diffusion.script_util import create_gaussian_diffusion


class Case:
    def __init__(self, name):
        self.case, self.reference = golden.load("dit", name)
        case = self.case
        self.network = dits.golden_dit(case)
        self.block = find_block(self.network, f"blocks.{case['block']}")
        self.diffusion = create_gaussian_diffusion(
            steps=1000, learn_sigma=True, timestep_respacing=case["timestep_respacing"]
        )
        self.denoiser = self.diffusion.denoiser(self.network, clip_denoised=False)
        self.condition = {"y": self.reference["y"]}
        null = null_class(case["num_classes"])
        self.cfg = ClassifierFreeGuidance(scale=case["cfg_scale"] - 1, null=null, channels=case["cfg_channels"])
        self.sag = self.of(SelfAttentionGuidance, block=self.block, threshold=case["threshold"])

    def of(self, kind, **settings):
        scale = {"scale": self.case["sag_scale"]}
        sigma = {"blur_sigma": self.case["blur_sigma"]} if kind is SelfAttentionGuidance else {}
        return kind(**scale | sigma | settings)

    def steps(self):
        return self.reference["steps"].tolist()

    def input(self, step):
        size, batch = self.case["input_size"], self.case["batch"]
        return golden.normal(self.case["seed"] + 100 + step, batch, 4, size, size), torch.full((batch,), step)

    def guided(self, *guidances):
        return GuidedDenoiser(self.denoiser, self.diffusion.process, guidances)


@cache
def load(name):
    return Case(name)


@pytest.fixture(params=dits.CASES)
def case(request):
    return load(request.param)


def test_every_number_of_a_guided_step(case):
    for step in case.steps():
        x_t, t = case.input(step)
        guided = case.guided(case.cfg, case.sag)
        prediction = guided(x_t, t, case.condition)
        last = guided.last_step
        assert guided.evaluations == 3
        score = last.recorded[case.sag][case.block]
        mask = case.sag.mask(last)
        degraded = case.sag.degrade(last.base, mask)
        with_cfg = case.guided(case.cfg)(x_t, t, case.condition)
        found = {
            "eps_cond": last.conditional.eps,
            "eps_uncond": last.base.eps,
            "score": score,
            "degraded": degraded,
            "eps_degraded": last.denoise(degraded, t, last.base.condition).eps,
            "eps_cfg": with_cfg.eps,
            "eps_guided": prediction.eps,
            "mean": prediction.mean,
            "log_variance": prediction.log_variance,
            "pred_xstart": prediction.x0,
            "mean_cfg": with_cfg.mean,
        }
        for name, ours in found.items():
            golden.assert_close(ours, case.reference[f"t{step}_{name}"])
        tokens = score > case.case["threshold"]
        assert torch.equal(tokens, case.reference[f"t{step}_mask"].bool())
        assert torch.equal(mask, attention_mask(score, x_t.shape[2:], case.case["threshold"]))
        assert torch.equal(mask[:, 0], tokens.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert {name.partition("_")[2] for name in case.reference if re.match(r"t\d", name)} == {*found, "mask"}


def test_the_first_channels_alone_are_guided(case):
    """Of every guidance: on the other channels ε is that of the conditional pass, and so is Σ everywhere."""
    x_t, t = case.input(case.steps()[1])
    plain = case.denoiser(x_t, t, case.condition)
    for make in (
        lambda channels: ClassifierFreeGuidance(scale=2.0, null=case.cfg.null, channels=channels),
        lambda channels: case.of(SelfAttentionGuidance, block=case.block, channels=channels),
        lambda channels: case.of(PerturbedAttentionGuidance, blocks=(case.block,), channels=channels),
    ):
        of_all, of_three = (case.guided(make(channels))(x_t, t, case.condition) for channels in (None, 3))
        assert torch.equal(of_three.eps[:, :3], of_all.eps[:, :3])
        torch.testing.assert_close(of_three.eps[:, 3], plain.eps[:, 3])
        assert not torch.allclose(of_all.eps[:, 3], plain.eps[:, 3], atol=1e-3)
        torch.testing.assert_close(of_three.log_variance, plain.log_variance)
    with pytest.raises(ValueError, match="channels: wanted 1 or more, got 0"):
        ClassifierFreeGuidance(scale=1.0, null=case.cfg.null, channels=0)


GUIDANCES = {
    "sag": lambda case, **more: case.of(SelfAttentionGuidance, block=case.block, **more),
    "pag": lambda case, **more: case.of(PerturbedAttentionGuidance, blocks=(case.block,), **more),
    "seg": lambda case, **more: case.of(SmoothedEnergyGuidance, blocks=(case.block,), **{"sigma": 1.0} | more),
}


@pytest.mark.parametrize("name", GUIDANCES)
def test_a_scale_of_zero_calls_nothing(case, name):
    x_t, t = case.input(case.steps()[0])
    guided = case.guided(GUIDANCES[name](case, scale=0.0))
    prediction = guided(x_t, t, case.condition)
    assert guided.evaluations == 1
    assert torch.equal(prediction.eps, case.denoiser(x_t, t, case.condition).eps)
    on = case.guided(GUIDANCES[name](case))
    assert not torch.allclose(on(x_t, t, case.condition).eps, prediction.eps, atol=1e-4)
    assert on.evaluations == 2


def test_the_difference_is_that_of_a_network_with_another_attention(case):
    x_t, t = case.input(case.steps()[1])
    plain = case.denoiser(x_t, t, case.condition).eps
    with replace_attention(case.block, fn=lambda q, k, v: v):
        identity = case.denoiser(x_t, t, case.condition).eps
    pag = case.guided(GUIDANCES["pag"](case))(x_t, t, case.condition)
    torch.testing.assert_close(pag.eps, plain + case.case["sag_scale"] * (plain - identity))

    def uniform_queries(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q.mean(dim=2, keepdim=True).expand_as(q), k, v)

    with replace_attention(case.block, fn=uniform_queries):
        mean_query = case.denoiser(x_t, t, case.condition).eps
    seg = case.guided(GUIDANCES["seg"](case, sigma=float("inf")))(x_t, t, case.condition)
    torch.testing.assert_close(seg.eps, plain + case.case["sag_scale"] * (plain - mean_query))
