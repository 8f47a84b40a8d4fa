"""Networks larger than the memory, and resolutions that no map has."""

import pytest
import torch

from guided_diffusion.networks import building
from guided_diffusion.settings.model import NetworkConfig
from small import SMALL

CONFIG = NetworkConfig(**{name: value for name, value in SMALL.items() if name in vars(NetworkConfig())})


def test_a_network_larger_than_the_memory_is_refused_before_it_is_made(monkeypatch):
    torch.manual_seed(0)
    first = next(building.build_network(CONFIG, True).parameters())
    torch.manual_seed(0)
    assert torch.equal(torch.nn.Linear(32, 128).weight, first)  # looking at the size draws no number
    monkeypatch.setattr(building, "memory", lambda: 10**5)
    with pytest.raises(ValueError, match=r"has [0-9,]+ parameters, .* that this process may have"):
        building.build_network(CONFIG, True)
    with building.unfilled():
        building.build_network(CONFIG, True)


def test_attention_at_more_than_the_image_is_said(caplog):
    building.build_network(NetworkConfig(image_size=8, num_channels=32, channel_mult="1,2", num_head_channels=16), True)
    assert "image_size 8 has maps of 8, 4 pixels a side, none of more than 8" in caplog.text
