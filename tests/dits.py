"""Small transformers that several tests use: the golden ones, and their recipe."""

import golden
from guided_diffusion.networks.dit import DiT

CASES = golden.names("dit")
ARGUMENTS = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")


def filled(network):
    """The network with the golden weights; its positions are not learned and stay."""
    positions = network.pos_embed.clone()
    golden.fill(network).pos_embed.data.copy_(positions)
    return network


def golden_dit(case):
    return filled(DiT(**{name: case[name] for name in ARGUMENTS}))
