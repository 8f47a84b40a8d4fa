"""Images ⇄ latents: diffusers' AutoencoderKL, of Stable Diffusion and of transformers that see its latents."""

from pathlib import Path

import torch
from torch import Tensor, nn

from .folders import check_unread, diffusers_for, read_network, said_of

VAE_UNREAD = ("shift_factor",)
"""Keys of its configuration that ask for what is not done here."""


class Autoencoder(nn.Module):
    """An AutoencoderKL whose latents have the scale that diffusion networks see (Stable Diffusion's: times 0.18215).

    channels: of the latents. factor: pixels of an image along a side of one latent pixel.
    """

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae
        self.channels: int = vae.config.latent_channels
        self.factor: int = 2 ** (len(vae.config.block_out_channels) - 1)

    def _moments(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """The mean of what is encoded to and its standard deviation in units of `scaling_factor`, by channel."""
        moments = self.vae.config.latents_mean, self.vae.config.latents_std
        if None in moments:
            return 0.0, 1.0
        mean, std = (torch.tensor(values).to(like).reshape(1, -1, 1, 1) for values in moments)
        return mean, std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, h, w] to images [N, 3, H, W], about [−1, 1]."""
        mean, std = self._moments(latents)
        return self.vae.decode(latents * std / self.vae.config.scaling_factor + mean, return_dict=False)[0]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [−1, 1] to latents [N, C, h, w], the likeliest ones."""
        encoded = self.vae.encode(images).latent_dist.mode()
        mean, std = self._moments(encoded)
        return (encoded - mean) * self.vae.config.scaling_factor / std


def load_autoencoder(path: str, channels: int, factor: int, device: torch.device | str = "cpu") -> Autoencoder:
    """The autoencoder in a local folder of diffusers' format, in float32; only .safetensors are read.

    channels, factor: of the latents that are wanted. A ValueError says what is missing, damaged or of another kind.
    """
    folder = Path(path)
    with said_of("vae_path"):
        if not folder.is_dir():
            raise ValueError(f"no such folder {path!r}")
        vae = read_network(folder, diffusers_for("an autoencoder").AutoencoderKL)
        check_unread(folder, vae.config, VAE_UNREAD)
        autoencoder = Autoencoder(vae)
        for key, wanted in (("channels", channels), ("factor", factor)):
            if (got := getattr(autoencoder, key)) != wanted:
                raise ValueError(f"{folder}: wanted latents of {key} {wanted}, got {got}")
    return autoencoder.to(device).float().eval().requires_grad_(False)
