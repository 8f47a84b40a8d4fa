"""Small models that many tests use."""

from pathlib import Path

import torch

CONFIGS = Path(__file__).parents[1] / "configs"

EMBEDDED = {"config": CONFIGS / "emoji.yaml", "timestep_respacing": 2, "batch_size": 2}
"""Flags of a run of the embedded model in two steps."""

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
