"""No step of a scheduler reads the device, as its timesteps are on the host.

The device is torch's `meta`, which has no numbers to read.
"""

import pytest
import torch

import latents
from guided_diffusion.diffusion.denoiser import NetworkDenoiser
from guided_diffusion.guidance.base import GuidedDenoiser
from guided_diffusion.guidance.classifier_free import ClassifierFreeGuidance
from guided_diffusion.stable_diffusion.network import LatentNetwork
from guided_diffusion.stable_diffusion.schedulers import (
    SCHEDULERS,
    choose_scheduler,
    diffuse,
    mean_type,
    noise_levels,
    start,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


class Unet:
    dtype = torch.float16

    def __call__(self, x, timesteps, scale, **_return_dict):
        return (x * scale * timesteps[:, None, None, None].half(),)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_scheduler_reads_the_device(name):
    latents.diffusers()
    scheduler = start(choose_scheduler(latents.golden_scheduler("eps"), name), 5)
    levels = noise_levels(scheduler)
    denoiser = NetworkDenoiser(LatentNetwork(Unet(), scheduler), levels, mean_type(scheduler), None, False)
    scale = torch.ones(2, 1, 1, 1, device="meta", dtype=torch.float16)
    by_prompt = ClassifierFreeGuidance(scale=1.0, null=lambda _condition: {"scale": scale})
    guided = GuidedDenoiser(denoiser, levels, [by_prompt])
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    x_T = torch.empty(2, 4, 8, 8, device="meta")
    *_, last = diffuse(scheduler, guided, x_T, {"scale": scale}, generators)
    assert last.x.device.type == "meta"
