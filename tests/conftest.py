"""Small objects that several tests use."""

import pytest
import torch

from guided_diffusion.script_util import create_model_and_diffusion

SMALL = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "16,8",
    "num_head_channels": 16,
    "learn_sigma": True,
    "timestep_respacing": "8",
}


def randomised(network, seed=0):
    """The network with random numbers also where it begins with zeros."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network.eval().requires_grad_(False)


@pytest.fixture(params=[False, True], ids=["legacy order", "new order"])
def any_order(request):
    """A small network of either qkv order."""
    torch.manual_seed(0)
    return randomised(create_model_and_diffusion(**SMALL, use_new_attention_order=request.param)[0])


@pytest.fixture
def small():
    """(network, diffusion): 16×16, attention everywhere, 8 respaced steps."""
    torch.manual_seed(0)
    network, diffusion = create_model_and_diffusion(**SMALL)
    return randomised(network), diffusion


@pytest.fixture
def small_conditional():
    """As `small`, with 4 classes and a null label."""
    torch.manual_seed(0)
    network, diffusion = create_model_and_diffusion(**SMALL, class_cond=True, num_classes=4, null_label=True)
    return randomised(network), diffusion
