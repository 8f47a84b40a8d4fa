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
    """uint8 images [N, 3, 32, 32] to the means of all four blocks' maps, [N, 320], in units of their spread.

    The first blocks see grain and blur, the last one what is drawn. spread: the standard deviation of each mean over
    pictures disturbed in many ways, so that no dimension weighs by its scale alone.
    """

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 3, 1, 1)
        self.blocks = nn.ModuleList(
            Block(inputs, outputs, 2) for inputs, outputs in zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False)
        )
        self.register_buffer("spread", torch.ones(sum(WIDTHS)))

    def means(self, images: Tensor) -> list[Tensor]:
        """The mean of each block's map: [N, 32], [N, 64], [N, 96], [N, 128]."""
        if images.shape[1:] != (3, 32, 32):
            raise ValueError(f"emoji features: wanted images of 3×32×32, got {'×'.join(map(str, images.shape[1:]))}")
        maps, means = self.stem(images / 127.5 - 1), []
        for block in self.blocks:
            maps = block(maps)
            means.append(maps.mean(dim=(2, 3)))
        return means

    def forward(self, images: Tensor) -> Features:
        return Features(torch.cat(self.means(images), dim=1) / self.spread)


def emoji_features(path: str | Path = WEIGHTS, device: torch.device | None = None) -> FeatureNetwork:
    """The embedded network."""
    device = device or torch.device("cpu")
    with torch.device("meta"):
        module = EmojiFeatures()
    return FeatureNetwork("emoji", module, load_weights(module, path, device), sum(WIDTHS), device=device)
