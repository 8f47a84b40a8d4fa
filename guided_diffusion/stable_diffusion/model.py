"""A Stable Diffusion model from a folder of diffusers' format: loading, text to condition, latents to pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..storage.hashes import check_beside
from .autoencoder import VAE_UNREAD, Autoencoder
from .folders import (
    check_class,
    check_unread,
    diffusers_for,
    loaded,
    part,
    read_json,
    read_network,
    read_scheduler,
    read_tokenizer,
    said_of,
)

Part = Callable[[Path, Any], nn.Module]
"""How the network of a class is read, by the folder with its configuration."""

COMPONENTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
"""The parts that diffusers loads, and the one class of each that is understood."""

INPAINTING_CHANNELS = 9

UNREAD = ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
"""Keys of the UNet's configuration that ask for what is not done here."""


@dataclass(frozen=True, eq=False)
class StableDiffusion:
    """The networks of one model, its scheduler, and tokenizer and text encoder (SDXL: two of each).

    empty_is_zero: SDXL's way of being unconditional without a negative prompt, all embeddings zero.
    """

    unet: nn.Module
    vae: nn.Module
    scheduler: Any
    tokenizers: Sequence[Any]
    text_encoders: Sequence[nn.Module]
    empty_is_zero: bool = False

    @property
    def is_xl(self) -> bool:
        return self.unet.config.addition_embed_type == "text_time"

    @property
    def inpaints(self) -> bool:
        return self.unet.config.in_channels == INPAINTING_CHANNELS

    @cached_property
    def autoencoder(self) -> Autoencoder:
        return Autoencoder(self.vae)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image; a ValueError if its size, in pixels, cannot be made."""
        factor = self.autoencoder.factor
        for name, size in (("height", height), ("width", width)):
            if size < 1 or size % factor:
                raise ValueError(f"{name}: wanted a multiple of {factor}, got {size}")
        return self.autoencoder.channels, height // factor, width // factor

    def check_prompts(self, prompts: Sequence[str], flag: str = "prompt") -> None:
        """Raise a ValueError for a prompt that a text encoder could not read to its end."""
        for tokenizer in self.tokenizers:
            limit = tokenizer.model_max_length
            for prompt in prompts:
                tokens = tokenizer(prompt, verbose=False).input_ids
                if len(tokens) > limit:
                    cut = tokenizer.decode(tokens[limit - 1 : -1])
                    raise ValueError(
                        f"{flag}: {prompt!r} has {len(tokens) - 2} tokens and the text encoder reads {limit - 2}; "
                        f"{cut!r} would be cut"
                    )

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], height: int, width: int) -> dict[str, Any]:
        """The UNet's arguments for prompts, rows in their order; a ValueError where a prompt is too long."""
        self.check_prompts(prompts)
        hidden, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            tokens = tokenizer(
                list(prompts), padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
            ).to(encoder.device)
            mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
            output = encoder(tokens.input_ids, attention_mask=mask, output_hidden_states=self.is_xl)
            hidden.append(output.hidden_states[-2] if self.is_xl else output[0])
            pooled = output[0]
        embeddings = torch.cat(hidden, dim=-1).to(self.unet.dtype)
        if not self.is_xl:
            return {"encoder_hidden_states": embeddings}
        # Original size, top left corner of the crop, wanted size: an image that was never cropped.
        sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(prompts), device=embeddings.device)
        added = {"text_embeds": pooled.to(self.unet.dtype), "time_ids": sizes.to(self.unet.dtype)}
        return {"encoder_hidden_states": embeddings, "added_cond_kwargs": added}

    def encode_negative(self, prompt: str, rows: int, height: int, width: int) -> dict[str, Any]:
        """The UNet's arguments of the unconditional pass."""
        condition = self.encode([prompt] * rows, height, width)
        if self.empty_is_zero and not prompt:
            condition["encoder_hidden_states"].zero_()
            condition["added_cond_kwargs"]["text_embeds"].zero_()
        return condition

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, h, w] to images [N, 3, H, W], about [−1, 1]."""
        return self.autoencoder.decode(latents)

    def latents(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [−1, 1] to latents [N, C, h, w], the likeliest ones."""
        return self.autoencoder.encode(images)

    @torch.no_grad()
    def inpainting(self, picture: Tensor, mask: Tensor) -> Tensor:
        """Mask and latents of the picture without what it covers, [1, 1 + C, h, w], as the UNet takes them.

        picture: [1, 3, H, W] in [−1, 1]. mask: [1, 1, H, W], 1 where to paint.
        """
        kept = self.latents(picture * (1 - mask))
        return torch.cat([F.interpolate(mask, kept.shape[2:], mode="nearest"), kept], dim=1)


def load(
    path: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", config: str = ""
) -> StableDiffusion:
    """The model in a local folder of diffusers' format; nothing is fetched, only safetensors are read.

    Or path: one file `NAME.safetensors` of the original format, with `config`, a folder of diffusers' format that has
    the configurations, tokenizer and scheduler of such a model. dtype: of the UNet; text encoders and VAE stay in
    float32. A ValueError says what is missing or damaged.
    """
    file = Path(path) if path.endswith(".safetensors") else None
    folder = Path(config if file else path)
    if file and not file.is_file():
        raise ValueError(f"model: no such file {path!r}")
    if bool(config) != bool(file):
        raise ValueError("model, model_config: a folder of configurations goes with a single .safetensors file")
    with said_of("model"):
        if not folder.is_dir():
            what = "not a folder, nor a .safetensors file:" if folder.is_file() else "no such folder"
            raise ValueError(f"{what} {str(folder)!r}")
        for name in (*COMPONENTS, "text_encoder", "tokenizer", "scheduler"):
            part(folder, name)
    diffusers = diffusers_for("Stable Diffusion")
    if file:
        check_beside(file)
    with said_of("model"):
        return _read(folder, file, diffusers, dtype, device)


def _read(
    folder: Path, file: Path | None, diffusers: ModuleType, dtype: torch.dtype, device: torch.device | str
) -> StableDiffusion:
    import transformers

    network, encoder = (read_network, read_network) if file is None else (_part_of(file), _text_part_of(file))
    unet, vae = (network(part(folder, name), getattr(diffusers, kind)) for name, kind in COMPONENTS.items())
    encoders = [encoder(part(folder, "text_encoder"), transformers.CLIPTextModel)]
    tokenizers = [read_tokenizer(part(folder, "tokenizer"), transformers.CLIPTokenizer)]
    if unet.config.addition_embed_type == "text_time":
        encoders.append(encoder(part(folder, "text_encoder_2"), transformers.CLIPTextModelWithProjection))
        tokenizers.append(read_tokenizer(part(folder, "tokenizer_2"), transformers.CLIPTokenizer))
    if unet.config.in_channels not in (vae.config.latent_channels, INPAINTING_CHANNELS):
        raise ValueError(
            f"{folder / 'unet'}: in_channels: wanted {vae.config.latent_channels} or {INPAINTING_CHANNELS} "
            f"(inpainting), got {unet.config.in_channels}"
        )
    check_unread(folder / "unet", unet.config, UNREAD)
    check_unread(folder / "vae", vae.config, VAE_UNREAD)
    if unet.config.addition_embed_type not in (None, "text_time"):
        raise ValueError(
            f"{folder / 'unet'}: addition_embed_type: wanted none or text_time (SDXL), got "
            f"{unet.config.addition_embed_type!r}"
        )
    for network in (unet, vae, *encoders):
        network.to(device).float().eval().requires_grad_(False)
    index = read_json(folder / "model_index.json")
    zero = unet.config.addition_embed_type == "text_time" and index.get("force_zeros_for_empty_prompt", True)
    scheduler = read_scheduler(folder / "scheduler", diffusers)
    return StableDiffusion(unet.to(dtype), vae, scheduler, tokenizers, encoders, zero)


def _part_of(file: Path) -> Part:
    """How a network of diffusers is read from a single file."""

    def read(where: Path, kind: Any) -> nn.Module:
        check_class(where, kind)
        of = {"config": str(where.parent), "subfolder": where.name, "local_files_only": True}
        return loaded(lambda: kind.from_single_file(str(file), **of), file)

    return read


def _text_part_of(file: Path) -> Part:
    """How a text encoder is read from a single file."""
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
    from safetensors.torch import load_file

    def read(where: Path, kind: Any) -> nn.Module:
        check_class(where, kind)
        of = {"config": str(where.parent), "subfolder": where.name, "local_files_only": True}
        return loaded(lambda: create_diffusers_clip_model_from_ldm(kind, load_file(file), **of), file)

    return read
