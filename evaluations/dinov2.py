"""DINOv2 features (Oquab et al. 2024), for FD-DINOv2 (Stein et al. 2023); needs the package transformers."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from evaluations.networks import FeatureNetwork, Features, sha256

SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _as_edm2(images: Tensor) -> Tensor:
    """Not rounded, and beyond [0, 255] where bicubic overshoots (Karras et al. 2024)."""
    return F.interpolate(images.float(), (SIDE, SIDE), mode="bicubic", antialias=True)


def _as_dgm_eval(images: Tensor) -> Tensor:
    """Pillow's, whose pixels are uint8 again (Stein et al. 2023)."""
    pictures = images.permute(0, 2, 3, 1).cpu().numpy()
    small = [np.asarray(Image.fromarray(each).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for each in pictures]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).to(images.device)


RESIZES: dict[str, Callable[[Tensor], Tensor]] = {"edm2": _as_edm2, "dgm-eval": _as_dgm_eval}
"""How uint8 images [N, 3, H, W] become [N, 3, 224, 224] in [0, 255]."""


def set_positions(network: nn.Module) -> None:
    """Give a network of transformers' the position embeddings of DINOv2's own code for images of 224 × 224.

    Both resize their grid, of 37 × 37 for the published weights. DINOv2's scale is (16 + 0.1)/37, transformers' 16/37:
    other features, which no published number is of.
    """
    positions = network.embeddings.position_embeddings.detach()
    side, wanted = round((positions.shape[1] - 1) ** 0.5), SIDE // network.config.patch_size
    if side == wanted:
        return
    grid = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(wanted + 0.1) / side, mode="bicubic")
    whole = torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    network.embeddings.position_embeddings = nn.Parameter(whole, requires_grad=False)


class DinoV2(nn.Module):
    """uint8 images [N, 3, H, W], resized to 224 × 224, to the class token after the last norm, [N, D]."""

    def __init__(self, network: nn.Module, resize: str):
        super().__init__()
        set_positions(network)
        self.network, self.resize = network, RESIZES[resize]
        for name, numbers in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(numbers)[:, None, None])

    def forward(self, images: Tensor) -> Features:
        if images.shape[2:] != (SIDE, SIDE):
            images = self.resize(images)
        return Features(self.network((images.float() / 255 - self.mean) / self.std).pooler_output)


def dinov2(folder: str | Path, device: torch.device, resize: str = "edm2") -> FeatureNetwork:
    """The network of a local folder in Hugging Face's format (config.json, model.safetensors)."""
    try:
        from transformers import Dinov2Model
    except ImportError:
        raise ValueError("--features dinov2 needs the package transformers: pip install transformers") from None
    weights = Path(folder) / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"{weights}: no such file; --weights names a folder with config.json and model.safetensors")
    try:
        network, loaded = Dinov2Model.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # whatever a wrong configuration raises in that package
        raise ValueError(f"{folder}: not a DINOv2 model ({' '.join(str(error).split())[:120]})") from None
    # What is missing transformers fills with random numbers; a mask token is of training alone.
    if not_there := sorted({*loaded["missing_keys"]} - {"embeddings.mask_token"}):
        raise ValueError(f"{folder}: not a DINOv2 model ({weights.name} holds no {not_there[0]})")
    digest = hashlib.sha256(f"{sha256(weights)}{sha256(Path(folder) / 'config.json')}".encode()).hexdigest()
    module = DinoV2(network.float(), resize).to(device).eval()
    return FeatureNetwork(f"dinov2-{resize}", module, digest, network.config.hidden_size, device=device)
