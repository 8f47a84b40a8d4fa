"""DINOv2 features (Oquab et al. 2024), for FD-DINOv2 (Stein et al. 2023); needs the package transformers."""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluations.networks import FeatureNetwork, Features, sha256

SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DinoV2(nn.Module):
    """uint8 images [N, 3, H, W] to the class token after the last norm, [N, D]; bicubic resize to 224 × 224."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        for name, numbers in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(numbers)[:, None, None])

    def forward(self, images: Tensor) -> Features:
        if images.shape[2:] != (SIDE, SIDE):
            images = F.interpolate(images.float(), (SIDE, SIDE), mode="bicubic", antialias=True).round().clamp(0, 255)
        return Features(self.network((images.float() / 255 - self.mean) / self.std).pooler_output)


def dinov2(folder: str | Path, device: torch.device) -> FeatureNetwork:
    """The network of a local folder in Hugging Face's format (config.json, model.safetensors)."""
    try:
        from transformers import Dinov2Model
    except ImportError:
        raise ValueError("--features dinov2 needs the package transformers: pip install transformers") from None
    weights = Path(folder) / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"{weights}: no such file; --weights names a folder with config.json and model.safetensors")
    try:
        network = Dinov2Model.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except Exception as error:  # whatever a wrong configuration raises in that package
        raise ValueError(f"{folder}: not a DINOv2 model ({' '.join(str(error).split())[:120]})") from None
    digest = hashlib.sha256(f"{sha256(weights)}{sha256(Path(folder) / 'config.json')}".encode()).hexdigest()
    return FeatureNetwork("dinov2", DinoV2(network).to(device).eval(), digest, device=device)
