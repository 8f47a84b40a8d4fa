"""A Stable Diffusion model from a folder of diffusers' format: loading, text to condition, latents to pictures."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..settings.shipped import how_to_install
from ..storage.hashes import check_beside

COMPONENTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
"""The parts that diffusers loads, and the one class of each that is understood."""

INPAINTING_CHANNELS = 9

UNREAD = {
    "unet": ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type"),
    "vae": ("shift_factor",),
}
"""Keys of configurations that ask for what is not done here."""


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

    @property
    def factor(self) -> int:
        """Pixels of an image along a side of one latent pixel."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image; a ValueError if its size, in pixels, cannot be made."""
        for name, size in (("height", height), ("width", width)):
            if size < 1 or size % self.factor:
                raise ValueError(f"{name}: wanted a multiple of {self.factor}, got {size}")
        return self.vae.config.latent_channels, height // self.factor, width // self.factor

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

    def _moments(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """The mean of what the VAE encodes to and its standard deviation in units of `scaling_factor`, by channel."""
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
    def latents(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [−1, 1] to latents [N, C, h, w], the likeliest ones."""
        encoded = self.vae.encode(images).latent_dist.mode()
        mean, std = self._moments(encoded)
        return (encoded - mean) * self.vae.config.scaling_factor / std

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

    Or path: one `.safetensors` file of the original format, with `config`, a folder of diffusers' format that has the
    configurations, tokenizer and scheduler of such a model. dtype: of the UNet; text encoders and VAE stay in float32.
    A ValueError says what is missing or damaged.
    """
    file = Path(path) if path.endswith(".safetensors") else None
    folder = Path(config if file else path)
    if file and not file.is_file():
        raise ValueError(f"model: no such file {path!r}")
    if bool(config) != bool(file):
        raise ValueError("model, model_config: a folder of configurations goes with a single .safetensors file")
    if not folder.is_dir():
        what = "not a folder, nor a .safetensors file:" if folder.is_file() else "no such folder"
        raise ValueError(f"model: {what} {str(folder)!r}")
    for name in (*COMPONENTS, "text_encoder", "tokenizer", "scheduler"):
        _part(folder, name)
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise ValueError(
            f"Stable Diffusion needs the extra `stable-diffusion` ({error}): {how_to_install('stable-diffusion')}"
        ) from None
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    if file:
        check_beside(file)
    network, encoder = (_from_folder, _from_folder) if file is None else (_part_of(file), _text_part_of(file))
    unet, vae = (network(folder, name, getattr(diffusers, kind)) for name, kind in COMPONENTS.items())
    encoders = [encoder(folder, "text_encoder", transformers.CLIPTextModel)]
    tokenizers = [_tokenizer(folder, "tokenizer", transformers.CLIPTokenizer)]
    if unet.config.addition_embed_type == "text_time":
        encoders.append(encoder(folder, "text_encoder_2", transformers.CLIPTextModelWithProjection))
        tokenizers.append(_tokenizer(folder, "tokenizer_2", transformers.CLIPTokenizer))
    if unet.config.in_channels not in (vae.config.latent_channels, INPAINTING_CHANNELS):
        raise ValueError(
            f"model: {folder / 'unet'}: in_channels: wanted {vae.config.latent_channels} or {INPAINTING_CHANNELS} "
            f"(inpainting), got {unet.config.in_channels}"
        )
    for name, part in (("unet", unet), ("vae", vae)):
        for key in UNREAD[name]:
            if part.config.get(key) is not None:
                raise ValueError(
                    f"model: {folder / name}: {key}: such networks are not read; wanted none, got {part.config[key]!r}"
                )
    if unet.config.addition_embed_type not in (None, "text_time"):
        raise ValueError(
            f"model: {folder / 'unet'}: addition_embed_type: wanted none or text_time (SDXL), got "
            f"{unet.config.addition_embed_type!r}"
        )
    for network in (unet, vae, *encoders):
        network.to(device).float().eval().requires_grad_(False)
    index = _json(folder / "model_index.json")
    zero = unet.config.addition_embed_type == "text_time" and index.get("force_zeros_for_empty_prompt", True)
    return StableDiffusion(unet.to(dtype), vae, _scheduler(folder, diffusers), tokenizers, encoders, zero)


def _part(folder: Path, name: str) -> Path:
    if not (folder / name).is_dir():
        raise ValueError(f"model: {folder} has no {name!r}; wanted a model folder of diffusers' format")
    return folder / name


def _network_part(folder: Path, name: str, kind: Any) -> Path:
    """The folder of a network, whose configuration is one of this class."""
    where = _part(folder, name)
    given = _json(where / "config.json")
    said = given.get("_class_name") or (given.get("architectures") or [kind.__name__])[0]
    if said != kind.__name__:
        raise ValueError(f"model: {where}: wanted a {kind.__name__}, got a {said}")
    return where


def _tokenizer(folder: Path, name: str, kind: Any) -> Any:
    where = _part(folder, name)
    return _loaded(lambda: kind.from_pretrained(where, local_files_only=True), where)


def _from_folder(folder: Path, name: str, kind: Any) -> nn.Module:
    where = _network_part(folder, name, kind)
    files = [file.name for file in where.glob("*.safetensors")]
    if not files:
        raise ValueError(f"model: {where} has no .safetensors file; other formats are not read")
    for file in files:
        check_beside(where / file)
    variant = "fp16" if all(".fp16." in file for file in files) else None
    return _loaded(
        lambda: kind.from_pretrained(where, local_files_only=True, use_safetensors=True, variant=variant), where
    )


def _part_of(file: Path) -> Callable[[Path, str, Any], nn.Module]:
    """How a network of diffusers is read from a single file."""

    def read(folder: Path, name: str, kind: Any) -> nn.Module:
        _network_part(folder, name, kind)
        return _loaded(
            lambda: kind.from_single_file(str(file), config=str(folder), subfolder=name, local_files_only=True), file
        )

    return read


def _text_part_of(file: Path) -> Callable[[Path, str, Any], nn.Module]:
    """How a text encoder is read from a single file."""
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
    from safetensors.torch import load_file

    def read(folder: Path, name: str, kind: Any) -> nn.Module:
        _network_part(folder, name, kind)
        return _loaded(
            lambda: create_diffusers_clip_model_from_ldm(
                kind, load_file(file), subfolder=name, config=str(folder), local_files_only=True
            ),
            file,
        )

    return read


def _scheduler(folder: Path, diffusers: Any) -> Any:
    where = folder / "scheduler"
    name = str(_json(where / "scheduler_config.json").get("_class_name"))
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ValueError(f"model: {where}: {name!r} is no scheduler of diffusers")
    return _loaded(lambda: kind.from_pretrained(where, local_files_only=True), where)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model: no such file {str(path)!r}; wanted a model folder of diffusers' format") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"model: {path}: cannot be read ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise ValueError(f"model: {path}: wanted an object, got {type(value).__name__}")
    return value


def _loaded(build: Callable[[], Any], where: Path) -> Any:
    """What `build` makes of files; whatever it raises is about the files."""
    try:
        return build()
    except Exception as error:
        # diffusers and transformers report damaged files by any type.
        raise ValueError(f"model: {where}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None
