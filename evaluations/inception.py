"""The Inception-v3 graph of 2015-12-05, by which FID, sFID, IS, precision and recall are defined, as a torch module.

Szegedy et al. 2016, as TensorFlow's frozen graph computes it: its bilinear resize, its padding, its pools. Channel
counts and module names are those of the well-known file of its weights.
"""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from evaluations.networks import FeatureNetwork, Features, load_weights, sha256

ADDRESS = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIDE = 299
SPATIAL_CHANNELS = 7


def tf_resize(x: Tensor, side: int = SIDE) -> Tensor:
    """TensorFlow 1's bilinear resize of [N, C, H, W] to side × side (align_corners=False, no half-pixel centres).

    Output pixel i lies at i·size/side of the input and mixes the pixels below and above; rows are mixed first along
    the width, then along the height. No antialiasing.
    """

    def along(x: Tensor, dim: int) -> Tensor:
        size = x.shape[dim]
        if size == side:
            return x
        place = torch.arange(side, dtype=torch.float32, device=x.device) * torch.tensor(size / side)
        low = place.long()
        fraction = place - low
        below, above = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=size - 1))
        return torch.lerp(below, above, fraction if dim == 3 else fraction[:, None])

    return along(along(x, 3), 2)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm (ε = 1e-3), ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        self.bn.num_batches_tracked = None  # the weights file holds no such tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fuse(self) -> None:
        """Fold the batch norm into the convolution, for inference."""
        self.conv = fuse_conv_bn_eval(self.conv, self.bn)
        self.bn = nn.Identity()


def _average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class MixedA(nn.Module):
    """35×35: 1×1, 5×5, double 3×3, average pool."""

    def __init__(self, inputs: int, pool: int):
        super().__init__()
        self.branch1x1 = ConvNorm(inputs, 64, 1)
        self.branch5x5_1 = ConvNorm(inputs, 48, 1)
        self.branch5x5_2 = ConvNorm(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvNorm(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, padding=1)
        self.branch_pool = ConvNorm(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average_pool(x))], dim=1)


class ReductionA(nn.Module):
    """35×35 to 17×17."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = ConvNorm(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvNorm(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class MixedB(nn.Module):
    """17×17: 1×1, 7×7 in two, 7×7 in four, average pool."""

    def __init__(self, inner: int):
        super().__init__()
        row, column = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = ConvNorm(768, 192, 1)
        self.branch7x7_1 = ConvNorm(768, inner, 1)
        self.branch7x7_2 = ConvNorm(inner, inner, **row)
        self.branch7x7_3 = ConvNorm(inner, 192, **column)
        self.branch7x7dbl_1 = ConvNorm(768, inner, 1)
        self.branch7x7dbl_2 = ConvNorm(inner, inner, **column)
        self.branch7x7dbl_3 = ConvNorm(inner, inner, **row)
        self.branch7x7dbl_4 = ConvNorm(inner, inner, **column)
        self.branch7x7dbl_5 = ConvNorm(inner, 192, **row)
        self.branch_pool = ConvNorm(768, 192, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, and that of its 1×1 branch."""
        single = self.branch1x1(x)
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([single, seven, double, self.branch_pool(_average_pool(x))], dim=1), single


class ReductionB(nn.Module):
    """17×17 to 8×8."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = ConvNorm(768, 192, 1)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvNorm(768, 192, 1)
        self.branch7x7x3_2 = ConvNorm(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvNorm(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], dim=1)


class MixedC(nn.Module):
    """8×8: 1×1, 3×3 in two halves, double 3×3 in two halves, a pool (in the last block of the graph the maximum)."""

    def __init__(self, inputs: int, max_pool: bool):
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = ConvNorm(inputs, 320, 1)
        self.branch3x3_1 = ConvNorm(inputs, 384, 1)
        self.branch3x3_2a = ConvNorm(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvNorm(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvNorm(inputs, 448, 1)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvNorm(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvNorm(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = ConvNorm(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else _average_pool(x)
        parts = [
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(parts, dim=1)


class Inception(nn.Module):
    """uint8 images [N, 3, H, W] of any size to pool_3 [N, 2048], spatial [N, 2023] and logits [N, 1008].

    spatial: channels 0 to 6 of `Mixed_6d.branch1x1`, as H, W, C. logits: without their bias, as the Inception score
    wants them.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.Mixed_5b = MixedA(192, 32)
        self.Mixed_5c = MixedA(256, 64)
        self.Mixed_5d = MixedA(288, 64)
        self.Mixed_6a = ReductionA(288)
        self.Mixed_6b = MixedB(128)
        self.Mixed_6c = MixedB(160)
        self.Mixed_6d = MixedB(160)
        self.Mixed_6e = MixedB(192)
        self.Mixed_7a = ReductionB()
        self.Mixed_7b = MixedC(1280, max_pool=False)
        self.Mixed_7c = MixedC(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> Features:
        x = (tf_resize(images.float()) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x, _ = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))[0])
        x, spatial = self.Mixed_6d(x)
        x, _ = self.Mixed_6e(x)
        pool = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean(dim=(2, 3))
        spatial = spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pool, spatial, F.linear(pool, self.fc.weight))


def inception(path: str | Path, device: torch.device) -> FeatureNetwork:
    """The network with the weights of a file, ready for inference."""
    with torch.device("meta"):
        module = Inception()
    weights = load_weights(module, path, device)
    for part in [part for part in module.modules() if isinstance(part, ConvNorm)]:
        part.fuse()
    module.to(memory_format=torch.channels_last)
    return FeatureNetwork("inception", module, weights, 2048, distance="fid", device=device)


def published_weights(cache: Path) -> Path:
    """The well-known weights file in a cache folder, fetched on first use; a ValueError if it cannot be had whole."""
    path = cache / os.path.basename(ADDRESS)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(ADDRESS, str(path), hash_prefix=SHA256)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"inception: {ADDRESS} cannot be fetched ({' '.join(str(error).split())[:80]}); fetch it by hand and "
                "give --inception FILE"
            ) from None
    if (got := sha256(path)) != SHA256:
        raise ValueError(f"{path}: wanted SHA-256 {SHA256}, got {got}; delete it to fetch it again")
    return path
