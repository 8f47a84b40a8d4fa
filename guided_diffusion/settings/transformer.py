"""The settings of diffusion transformers (DiT): their sizes, which a name says, and the latents that they see."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from .options import option

MOST_WIDTH, MOST_DEPTH, MOST_PATCH = 2**14, 2**10, 2**8
"""Of transformers: far beyond any that was trained."""


class Sizes(NamedTuple):
    """A transformer's width, blocks and heads, and the latent pixels along a side of a token."""

    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int


NAMED = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
"""Width, depth and heads of DiT-S, -B, -L and -XL (Peebles & Xie 2023, Table 1)."""

PATCHES = (2, 4, 8)

DIT_NAMES = tuple(f"DiT-{size}/{patch}" for size in NAMED for patch in PATCHES)


def dit_sizes(name: str) -> Sizes:
    """The sizes of DiT-XL/2 and the like, or of DiT-WIDTHxDEPTHxHEADS/PATCH; a ValueError if the name says none."""
    if name in DIT_NAMES:
        size, patch = name.removeprefix("DiT-").split("/")
        return Sizes(*NAMED[size], int(patch))
    own = re.fullmatch(r"DiT-(\d{1,9})x(\d{1,9})x(\d{1,9})/(\d{1,9})", name)
    if not own:
        raise ValueError(f"network: wanted {', '.join(DIT_NAMES)} or DiT-WIDTHxDEPTHxHEADS/PATCH, got {name!r}")
    sizes = Sizes(*map(int, own.groups()))
    limits = Sizes(MOST_WIDTH, MOST_DEPTH, MOST_WIDTH, MOST_PATCH)
    for what, size, most in zip(("width", "depth", "heads", "patch"), sizes, limits, strict=True):
        if not 1 <= size <= most:
            raise ValueError(f"network: {name}: {what}: wanted 1 to {most}, got {size}")
    if sizes.hidden_size % 4 or sizes.hidden_size % sizes.num_heads:
        raise ValueError(
            f"network: {name}: wanted a width that is a multiple of 4 and of its {sizes.num_heads} heads, got "
            f"{sizes.hidden_size}"
        )
    return sizes


def dit_name(hidden_size: int, depth: int, patch_size: int) -> str:
    """The name of a transformer of these sizes, with a ? for the heads where it has none of the known names."""
    for size, (width, blocks, _) in NAMED.items():
        if (width, blocks) == (hidden_size, depth) and patch_size in PATCHES:
            return f"DiT-{size}/{patch_size}"
    return f"DiT-{hidden_size}x{depth}x?/{patch_size}"


@dataclass(frozen=True)
class TransformerConfig:
    """transformer (a DiT in the place of the UNet; it has class_cond and null_label)"""

    network: str = option(
        "",
        "DiT-S, DiT-B, DiT-L or DiT-XL with the side of its patches (2, 4, 8), like DiT-XL/2; or of other sizes, "
        "DiT-WIDTHxDEPTHxHEADS/PATCH; empty: the UNet",
        later=True,
    )
    latent_factor: int = option(
        0,
        "pixels along a side of one pixel of the latents that the transformer sees, those of vae_path; 0: it sees the "
        "images themselves",
        later=True,
        most=2**10,
    )
    vae_path: str = option(
        "",
        "autoencoder of the latents: a local folder of diffusers' format, with config.json and .safetensors",
        path=True,
        later=True,
    )

    def __post_init__(self):
        if self.network:
            dit_sizes(self.network)
        if self.latent_factor < 0:
            raise ValueError(f"latent_factor: wanted 0 or more, got {self.latent_factor}")
        if self.latent_factor and not self.network:
            raise ValueError("latent_factor: the UNet sees images; give --network a transformer")
        if self.vae_path and not self.latent_factor:
            raise ValueError(
                "vae_path: goes with a network of latents; give --latent_factor (8 for Stable Diffusion's)"
            )

    @property
    def in_channels(self) -> int:
        """What the transformer sees: 4 channels of latents, as those of Stable Diffusion's autoencoders, or RGB."""
        return 4 if self.latent_factor else 3

    def input_size(self, image_size: int) -> int:
        """The side of what the transformer sees; a ValueError where images of that size have no such latents."""
        factor = self.latent_factor or 1
        patch = dit_sizes(self.network).patch_size
        if image_size % (factor * patch):
            raise ValueError(
                f"image_size: wanted a multiple of {factor * patch} for {self.network}"
                f"{f' in latents of 1/{factor} the side' if self.latent_factor else ''}, got {image_size}"
            )
        return image_size // factor
