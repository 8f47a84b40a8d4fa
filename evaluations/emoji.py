"""Features for 32×32 emoji: a small network trained for this project (emoji_features.md)."""

from pathlib import Path

import torch
from torch import Tensor, nn

from evaluations.networks import FeatureNetwork, Features, load_weights

WEIGHTS = Path(__file__).parent / "emoji_features.safetensors"
WIDTHS = (32, 64, 96, 128)


class Block(nn.Sequential):
    """Two convolutions; the first one may halve the side."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class EmojiFeatures(nn.Module):
    """uint8 images [N, 3, 32, 32] to the mean of the last feature map, [N, 128]."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 3, 1, 1)
        self.blocks = nn.Sequential(
            *(Block(inputs, outputs, 2) for inputs, outputs in zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False))
        )

    def forward(self, images: Tensor) -> Features:
        if images.shape[1:] != (3, 32, 32):
            raise ValueError(f"emoji features: wanted images of 3×32×32, got {'×'.join(map(str, images.shape[1:]))}")
        return Features(self.blocks(self.stem(images / 127.5 - 1)).mean(dim=(2, 3)))


def emoji_features(path: str | Path = WEIGHTS, device: torch.device | None = None) -> FeatureNetwork:
    """The embedded network."""
    device = device or torch.device("cpu")
    with torch.device("meta"):
        module = EmojiFeatures()
    return FeatureNetwork("emoji", module, load_weights(module, path, device), device=device)
