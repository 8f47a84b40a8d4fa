"""A guided step never waits for the device, and is one static graph.

The device is torch's `meta`, which has shapes and no numbers: to read one is an error.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion.diffusion import samplers
from guided_diffusion.diffusion.denoiser import ModelMeanType
from guided_diffusion.diffusion.diffusion import Diffusion
from guided_diffusion.diffusion.flow import LinearPath
from guided_diffusion.diffusion.losses import LossType
from guided_diffusion.diffusion.noise import SampleNoise, Samples
from guided_diffusion.diffusion.solvers import SAMPLERS
from guided_diffusion.diffusion.times import every_row, known, on_host
from guided_diffusion.guidance.base import Guidance, GuidedDenoiser
from guided_diffusion.guidance.classifier import with_classifier
from guided_diffusion.guidance.classifier_free import ClassifierFreeGuidance, null_class
from guided_diffusion.guidance.masked_blur import MaskGuidance
from guided_diffusion.guidance.masks import CentredSquare, GivenMaps, HighFrequency, RandomCells, everywhere
from guided_diffusion.guidance.methods.autoguidance import Autoguidance
from guided_diffusion.guidance.methods.independent_condition import IndependentConditionGuidance
from guided_diffusion.guidance.methods.momentum import MomentumGuidance
from guided_diffusion.guidance.methods.skipped_layers import SkippedLayersGuidance
from guided_diffusion.guidance.methods.time_step import TimeStepGuidance
from guided_diffusion.guidance.methods.token_perturbation import TokenPerturbationGuidance
from guided_diffusion.guidance.methods.transforms import FrequencyScale, ProjectedGuidance, optimised
from guided_diffusion.guidance.perturbed_attention import PerturbedAttentionGuidance
from guided_diffusion.guidance.schedule import Schedule
from guided_diffusion.guidance.self_attention import SelfAttentionGuidance
from guided_diffusion.guidance.smoothed_energy import SmoothedEnergyGuidance
from guided_diffusion.networks.attention import find_block
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.settings.runs import FLOW_SAMPLERS
from small import SMALL, randomised

META = torch.device("meta")
TINY = SMALL | {"channel_mult": "1", "attention_resolutions": "16", "timestep_respacing": "3"}


class Reading(Guidance):
    """What must not be: it asks the device for a number."""

    def difference(self, step):
        return step.base.eps * (2 if step.base.x0.mean() > 0 else 1)


class Sent(TorchDispatchMode):
    """Counts what is sent from the host to the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if isinstance(out, torch.Tensor) and out.device == META and any(arg.device.type == "cpu" for arg in tensors):
            self.count += any(arg.device.type == "cpu" and arg.ndim for arg in tensors)
        return out


GUIDANCES = {
    "SAG": lambda it: [SelfAttentionGuidance(scale=1.0, block=it.block)],
    "SAG reference": lambda it: [SelfAttentionGuidance(scale=1.0, block=it.block, reference_heads=2)],
    "SAG every 2, part of the way": lambda it: [
        SelfAttentionGuidance(scale=1.0, block=it.block, schedule=Schedule(0.2, 0.9, every=2, curve=((0, 1), (1, 0.5))))
    ],
    "CFG": lambda _: [ClassifierFreeGuidance(scale=1.0, null=null_class(4))],
    "SAG + CFG": lambda it: [
        SelfAttentionGuidance(scale=1.0, block=it.block), ClassifierFreeGuidance(scale=1.0, null=null_class(4))
    ],
    "PAG": lambda it: [PerturbedAttentionGuidance(scale=1.0, blocks=(it.block,))],
    "SEG": lambda it: [SmoothedEnergyGuidance(scale=1.0, blocks=(it.block,))],
    "SEG blurred": lambda it: [SmoothedEnergyGuidance(scale=1.0, blocks=(it.block,), sigma=2.0)],
    "a weak network": lambda it: [Autoguidance(scale=1.0, weak=it.denoiser)],
    "a disturbed timestep": lambda it: [TimeStepGuidance(scale=1.0, embedder=it.network.time_embed)],
    "another class": lambda _: [IndependentConditionGuidance(scale=1.0, num_classes=4)],
    "shuffled tokens": lambda it: [TokenPerturbationGuidance(scale=1.0, blocks=(it.block,))],
    "a skipped layer": lambda it: [SkippedLayersGuidance(scale=1.0, layers=(it.block,))],
    "a drawn layer": lambda it: [SkippedLayersGuidance(scale=1.0, layers=(it.block,), drawn=1)],
    "momentum, all transforms": lambda _: [
        MomentumGuidance(scale=1.0, transforms=(optimised, ProjectedGuidance(0.5, 2.0, -0.5), FrequencyScale(0.5)))
    ],
} | {
    name: lambda _, mask=mask: [
        MaskGuidance(scale=1.0, masking=mask), ClassifierFreeGuidance(scale=1.0, null=null_class(4))
    ]
    for name, mask in {
        "everywhere": everywhere,
        "high-frequency": HighFrequency(),
        "random": RandomCells(),
        "square": CentredSquare(),
        "given maps": GivenMaps(maps=torch.rand(3, 4, 4)),
        "given masks": GivenMaps(maps=torch.rand(3, 4, 4) > 0.5),
    }.items()
}  # fmt: skip


DRAWN = ("random", "another class", "a disturbed timestep", "shuffled tokens", "a drawn layer")
"""Those that draw something at every step."""


@pytest.fixture(scope="module")
def on_meta():
    with META:
        network, diffusion = create_model_and_diffusion(**TINY, class_cond=True, num_classes=4, null_label=True)
    network.eval().requires_grad_(False).convert_to(torch.float16)
    return network, diffusion


def guidances_of(on_meta, name):
    network, diffusion = on_meta
    block, denoiser = find_block(network, "middle_block.1"), diffusion.denoiser(network)
    return GUIDANCES[name](SimpleNamespace(block=block, network=network, denoiser=denoiser))


def trajectory(on_meta, guidances, sampler="ddpm", cond_fn=None, labels=2):
    """How often a step waits to send something, in all but the first, which makes what is kept."""
    network, diffusion = on_meta
    if sampler in FLOW_SAMPLERS:
        path = LinearPath(np.arange(1, 4) / 3)
        diffusion = Diffusion(path, ModelMeanType.VELOCITY, None, LossType.MSE).called_by(sampler)
    samples = Samples(0, range(2))
    guided = GuidedDenoiser(diffusion.denoiser(network), diffusion.process, guidances, samples)
    denoiser = with_classifier(guided, cond_fn) if cond_fn else guided
    noise = SampleNoise(0, range(2), (3, 16, 16), META)
    y = {"y": torch.zeros(labels, dtype=torch.int64, device=META)}
    states = SAMPLERS[sampler](denoiser, diffusion.process, noise.x_T(), y, noise)
    next(states)
    with Sent() as sent:
        for _ in states:
            pass
    return sent.count


@pytest.mark.parametrize("name", GUIDANCES)
def test_no_guided_step_reads_the_device(on_meta, name):
    """Nor does it send anything itself but what is drawn anew; noise is sent from its own thread."""
    assert trajectory(on_meta, guidances_of(on_meta, name)) == 2 * (name in DRAWN)


@pytest.mark.parametrize("name", ["SAG + CFG", "another class"])
def test_nor_does_one_whose_rows_share_a_label(on_meta, name):
    assert trajectory(on_meta, guidances_of(on_meta, name), labels=1) == 2 * (name in DRAWN)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_reads_the_device(on_meta, sampler):
    assert trajectory(on_meta, guidances_of(on_meta, "SAG"), sampler, lambda x, t, y: -x) == 0


def test_the_doors_loops_do_not_either(on_meta):
    network, diffusion = on_meta
    guidance = guidances_of(on_meta, "SAG")
    y = {"y": torch.zeros(2, dtype=torch.int64, device=META)}
    for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        assert loop(network, (2, 3, 16, 16), model_kwargs=y, guidance=guidance, device=META).device == META


def test_what_reads_the_device_is_noticed(on_meta):
    network, diffusion = on_meta
    with pytest.raises(RuntimeError, match="meta"):
        trajectory(on_meta, [Reading(scale=1.0)])
    sag = guidances_of(on_meta, "SAG")
    guided = GuidedDenoiser(diffusion.denoiser(network), diffusion.process, sag)
    x, t = torch.zeros(2, 3, 16, 16, device=META), torch.zeros(2, dtype=torch.int64, device=META)
    with pytest.raises(RuntimeError, match="meta"):
        guided(x, t, {"y": t})


def test_the_host_knows_a_time_until_it_is_changed():
    t = every_row(5, torch.zeros(3, 1, device=META))
    assert on_host(t) == [5, 5, 5]
    assert t.tolist() == [5, 5, 5] if t.device != META else True
    t = every_row(5, torch.zeros(3, 1))
    t -= 1
    assert on_host(t) == on_host(t[:]) == [4, 4, 4]
    assert on_host(torch.tensor([3, 1])) == [3, 1]
    with torch.inference_mode():
        assert on_host(every_row(2, torch.zeros(1, 1))) == [2]


def test_a_step_is_one_static_graph_for_every_t():
    """Traced at one t, it says at others what is computed there, to the last bit."""
    torch.manual_seed(0)
    network, diffusion = create_model_and_diffusion(**TINY)
    randomised(network)
    sag = SelfAttentionGuidance(scale=0.7, block=find_block(network, "middle_block.1"), blur_sigma=2.0)

    def step(x, t, noise):
        guided = GuidedDenoiser(diffusion.denoiser(network), diffusion.process, [sag])
        return samplers.ddpm_step(guided(x, known(t, 1), {}), noise)

    x, noise = torch.randn(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    t = torch.full((2,), 1)
    step(x, t, noise)  # fills the tables
    graph = make_fx(step)(x, t, noise)
    assert len(graph.graph.nodes) > 200
    for other in (2, 1, 0):
        t = torch.full((2,), other)
        assert torch.equal(graph(x * 0.9, t, noise), step(x * 0.9, t, noise))
