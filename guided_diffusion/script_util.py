"""The door upstream's users know: defaults, flags, and builders of networks, diffusion and guidance."""

import argparse
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from guided_diffusion.attention import AttentionBlock, find_block
from guided_diffusion.config import merge, parse_value
from guided_diffusion.denoiser import ModelMeanType, ModelVarType
from guided_diffusion.files import read_arrays
from guided_diffusion.gaussian_diffusion import get_named_beta_schedule
from guided_diffusion.guidance.base import Guidance, Interval
from guided_diffusion.guidance.classifier_free import ClassifierFreeGuidance, null_class
from guided_diffusion.guidance.masked_blur import MaskedBlur, MaskGuidance
from guided_diffusion.guidance.masks import (
    CentredSquare,
    GivenMaps,
    HighFrequency,
    Masking,
    RandomCells,
    everywhere,
)
from guided_diffusion.guidance.perturbed_attention import PerturbedAttentionGuidance
from guided_diffusion.guidance.self_attention import REFERENCE_KERNEL, SelfAttentionGuidance
from guided_diffusion.guidance.smoothed_energy import SmoothedEnergyGuidance
from guided_diffusion.process import kept_timesteps
from guided_diffusion.respace import SpacedDiffusion
from guided_diffusion.settings import (
    NUM_CLASSES,
    ClassifierConfig,
    DiffusionConfig,
    GuidanceConfig,
    NetworkConfig,
    OtherGuidanceConfig,
)
from guided_diffusion.training.losses import LossType
from guided_diffusion.unet import EncoderUNetModel, SuperResModel, UNetModel

CHANNEL_MULTS = {
    512: "0.5,1,1,2,2,4,4",
    256: "1,1,2,2,4,4",
    128: "1,1,2,3,4",
    64: "1,2,3,4",
    32: "1,2,2,2",
}


def diffusion_defaults() -> dict[str, Any]:
    """Flags of the diffusion with their defaults."""
    return asdict(DiffusionConfig())


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of network and diffusion with their defaults."""
    return asdict(NetworkConfig()) | asdict(DiffusionConfig())


def classifier_defaults() -> dict[str, Any]:
    """Flags of the classifier with their defaults."""
    return {"image_size": NetworkConfig.image_size} | asdict(ClassifierConfig())


def classifier_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of classifier and diffusion with their defaults."""
    return classifier_defaults() | asdict(DiffusionConfig())


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of a super-resolution network and its diffusion with their defaults."""
    defaults = model_and_diffusion_defaults() | {"large_size": 256, "small_size": 64}
    del defaults["image_size"], defaults["channel_mult"]
    return defaults


def sag_defaults() -> dict[str, Any]:
    """Flags of self-attention guidance with their defaults."""
    return asdict(GuidanceConfig())


def _numbers(key: str, text: str, kind: type) -> list[Any]:
    return [parse_value(part, kind, key) for part in text.split(",")]


def _levels(image_size: int, channel_mult: str, key: str = "channel_mult") -> list[float]:
    if not channel_mult and image_size not in CHANNEL_MULTS:
        known = ", ".join(map(str, CHANNEL_MULTS))
        raise ValueError(f"{key}: none is known for image_size {image_size} (only for {known}); give it")
    levels = _numbers(key, channel_mult or CHANNEL_MULTS[image_size], float)
    if image_size % 2 ** (len(levels) - 1):
        raise ValueError(f"image_size: {image_size} cannot be halved {len(levels) - 1} times, as {key} asks")
    return levels


def _downsampling(image_size: int, attention_resolutions: str) -> list[int]:
    """Upstream's rule: the sides in the flag become factors by which the image is downsampled."""
    return [image_size // side for side in _numbers("attention_resolutions", attention_resolutions, int) if side > 0]


def _network_arguments(config: NetworkConfig, learn_sigma: bool) -> dict[str, Any]:
    levels = _levels(config.image_size, config.channel_mult)
    return {
        "image_size": config.image_size,
        "in_channels": 3,
        "model_channels": config.num_channels,
        "out_channels": 6 if learn_sigma else 3,
        "num_res_blocks": config.num_res_blocks,
        "attention_resolutions": _downsampling(config.image_size, config.attention_resolutions),
        "dropout": config.dropout,
        "channel_mult": levels,
        "num_classes": config.num_classes + config.null_label if config.class_cond else None,
        "use_checkpoint": config.use_checkpoint,
        "num_heads": config.num_heads,
        "num_head_channels": config.num_head_channels,
        "num_heads_upsample": config.num_heads_upsample,
        "use_scale_shift_norm": config.use_scale_shift_norm,
        "resblock_updown": config.resblock_updown,
        "use_new_attention_order": config.use_new_attention_order,
    }


def build_network(config: NetworkConfig, learn_sigma: bool) -> UNetModel:
    """The UNet of a configuration, with random weights."""
    return UNetModel(**_network_arguments(config, learn_sigma))


def create_model(
    image_size: int, num_channels: int, num_res_blocks: int, learn_sigma: bool = False, **settings: Any
) -> UNetModel:
    """The UNet for upstream's keyword arguments (`NetworkConfig`'s fields) and this function's own defaults."""
    own = {"attention_resolutions": "16", "num_heads": 1, "use_scale_shift_norm": False}
    sizes = {"image_size": image_size, "num_channels": num_channels, "num_res_blocks": num_res_blocks}
    [config] = merge((NetworkConfig,), ("create_model", own | sizes | settings))
    return build_network(config, learn_sigma)


def build_diffusion(config: DiffusionConfig) -> SpacedDiffusion:
    """The diffusion of a configuration."""
    return create_gaussian_diffusion(
        steps=config.diffusion_steps,
        learn_sigma=config.learn_sigma,
        noise_schedule=config.noise_schedule,
        use_kl=config.use_kl,
        predict_xstart=config.predict_xstart,
        rescale_timesteps=config.rescale_timesteps,
        rescale_learned_sigmas=config.rescale_learned_sigmas,
        timestep_respacing=config.timestep_respacing,
    )


def create_model_and_diffusion(**settings: Any) -> tuple[UNetModel, SpacedDiffusion]:
    """Network and diffusion for upstream's keyword arguments (`model_and_diffusion_defaults`)."""
    network, diffusion = merge((NetworkConfig, DiffusionConfig), ("create_model_and_diffusion", settings))
    return build_network(network, diffusion.learn_sigma), build_diffusion(diffusion)


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str = "",
) -> SpacedDiffusion:
    """The diffusion for upstream's keyword arguments."""
    if learn_sigma:
        var_type = ModelVarType.LEARNED_RANGE
    else:
        var_type = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    if use_kl:
        loss_type = LossType.RESCALED_KL
    else:
        loss_type = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    betas = get_named_beta_schedule(noise_schedule, steps)
    return SpacedDiffusion(
        use_timesteps=kept_timesteps(betas, timestep_respacing or [steps]),
        betas=betas,
        model_mean_type=ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON,
        model_var_type=var_type,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
    )


def build_classifier(image_size: int, config: ClassifierConfig, num_classes: int = NUM_CLASSES) -> EncoderUNetModel:
    """The noisy-image classifier of a configuration, with random weights."""
    return EncoderUNetModel(
        image_size=image_size,
        in_channels=3,
        model_channels=config.classifier_width,
        out_channels=num_classes,
        num_res_blocks=config.classifier_depth,
        attention_resolutions=_downsampling(image_size, config.classifier_attention_resolutions),
        channel_mult=_levels(image_size, config.classifier_channel_mult, "classifier_channel_mult"),
        num_head_channels=64,
        use_scale_shift_norm=config.classifier_use_scale_shift_norm,
        resblock_updown=config.classifier_resblock_updown,
        pool=config.classifier_pool,
    )


def create_classifier(image_size: int, **settings: Any) -> EncoderUNetModel:
    """The classifier for upstream's keyword arguments (`classifier_defaults`)."""
    [config] = merge((ClassifierConfig,), ("create_classifier", settings))
    return build_classifier(image_size, config)


def sr_create_model_and_diffusion(
    large_size: int, small_size: int, **settings: Any
) -> tuple[SuperResModel, SpacedDiffusion]:
    """Super-resolution network and diffusion for upstream's keyword arguments (`sr_model_and_diffusion_defaults`).

    small_size is the side of the low-resolution images; the network itself takes any.
    """
    if not 0 < small_size <= large_size:
        raise ValueError(f"small_size: wanted 1 to large_size ({large_size}), got {small_size}")
    # Upstream's 512² upsampler has the levels of its 256² one.
    settings = settings | {"image_size": large_size, "channel_mult": CHANNEL_MULTS[256] if large_size == 512 else ""}
    network, diffusion = merge((NetworkConfig, DiffusionConfig), ("sr_create_model_and_diffusion", settings))
    return SuperResModel(**_network_arguments(network, diffusion.learn_sigma)), build_diffusion(diffusion)


def _given_maps(path: str, share: float) -> GivenMaps:
    """The masks of an npz: `maps` [M, h, w], bool or float32."""
    try:
        with open(path, "rb") as file:
            try:
                arrays = read_arrays(file, {"maps": (np.dtype(np.float32), (None, None, None))})
            except ValueError as error:
                if "got bool" not in str(error):
                    raise
                arrays = read_arrays(file, {"maps": (np.dtype(bool), (None, None, None))})
        return GivenMaps(maps=torch.from_numpy(arrays["maps"].copy()), share=share)
    except FileNotFoundError:
        raise ValueError(f"sag_mask: no such file {path!r}") from None
    except ValueError as error:
        raise ValueError(f"sag_mask: {path}: {error}") from None


def _masking(config: GuidanceConfig) -> Masking:
    if config.sag_mask == "global":
        return everywhere
    if config.sag_mask.endswith(".npz"):
        return _given_maps(config.sag_mask, config.sag_mask_share)
    kinds = {"high-frequency": HighFrequency, "random": RandomCells, "square": CentredSquare}
    if config.sag_mask not in kinds:
        known = ", ".join(["self-attention", "global", *kinds])
        raise ValueError(f"sag_mask: wanted {known} or a FILE.npz, got {config.sag_mask!r}")
    return kinds[config.sag_mask](config.sag_mask_share)


def interval_of(guide_interval: str, guide_start: int | None = None) -> Interval:
    """The guided part of the process that these flags mean."""
    low_high = _numbers("guide_interval", guide_interval, float)
    if len(low_high) != 2:
        raise ValueError(f"guide_interval: wanted lo,hi, got {guide_interval!r}")
    return Interval(*low_high, start=guide_start)


def _when(config: GuidanceConfig) -> dict[str, Any]:
    """The steps at which all guidances of a configuration act."""
    return {"interval": interval_of(config.guide_interval, config.guide_start), "every": config.guide_every}


def build_guidance(network: UNetModel, config: GuidanceConfig) -> MaskedBlur:
    """Self-attention guidance of a configuration for a network, or the same with another mask."""
    reference = config.fidelity == "reference"
    common = {
        "scale": config.scale,
        "blur_sigma": config.blur_sigma,
        "blur_kernel": REFERENCE_KERNEL if reference and config.blur_kernel is None else config.blur_kernel,
        **_when(config),
    }
    if config.sag_mask_share != GuidanceConfig.sag_mask_share and config.sag_mask in ("self-attention", "global"):
        raise ValueError(f"sag_mask_share: the mask {config.sag_mask} has no share that could be chosen")
    if config.sag_mask != "self-attention":
        if reference:
            raise ValueError(f"fidelity: reference has the self-attention mask only, got sag_mask {config.sag_mask}")
        return MaskGuidance(masking=_masking(config), **common)
    return SelfAttentionGuidance(
        block=find_block(network, config.block_name),
        threshold=config.sag_threshold,
        reference_heads=network.num_heads if reference else None,
        **common,
    )


def build_other_guidances(
    network: UNetModel, config: OtherGuidanceConfig, when: GuidanceConfig, null_label: int | None
) -> list[Guidance]:
    """The guidances of a configuration beside self-attention guidance, but those with scale 0.

    when: says at which steps they act. null_label: the network's label for no class, None where it has none.
    """
    common = _when(when)
    guidances: list[Guidance] = []
    if config.cfg_scale:
        if null_label is None:
            raise ValueError("cfg_scale: needs a network with classes and a null label (class_cond, null_label)")
        guidances.append(ClassifierFreeGuidance(scale=config.cfg_scale, null=null_class(null_label), **common))
    if config.pag_scale:
        blocks = _blocks(network, "pag_blocks", config.pag_blocks)
        guidances.append(PerturbedAttentionGuidance(scale=config.pag_scale, blocks=blocks, **common))
    if config.seg_scale:
        blocks = _blocks(network, "seg_blocks", config.seg_blocks)
        guidances.append(
            SmoothedEnergyGuidance(scale=config.seg_scale, blocks=blocks, sigma=config.seg_sigma, **common)
        )
    return guidances


def _blocks(network: UNetModel, key: str, names: str) -> tuple[AttentionBlock, ...]:
    try:
        return tuple(find_block(network, name.strip()) for name in names.split(","))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def create_guidance(model: UNetModel, **settings: Any) -> Guidance:
    """Self-attention guidance for the authors' flags and ours (`sag_defaults`)."""
    [config] = merge((GuidanceConfig,), ("create_guidance", settings))
    return build_guidance(model, config)


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: dict[str, Any]) -> None:
    """A flag for every key; its type is that of the default (str for None, True or False for bool)."""
    for key, default in default_dict.items():
        kind = str if default is None else type(default)
        parser.add_argument(
            f"--{key}", default=default, type=lambda text, kind=kind, key=key: parse_value(text, kind, key)
        )


def args_to_dict(args: argparse.Namespace, keys: list[str]) -> dict[str, Any]:
    """The values of some flags."""
    return {key: getattr(args, key) for key in keys}
