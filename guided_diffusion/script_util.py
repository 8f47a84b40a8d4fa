"""The door upstream's users know: defaults, flags, and builders of networks, diffusion and guidance."""

import argparse
from dataclasses import asdict
from typing import Any

from .diffusion.diffusion import kinds
from .diffusion.process import kept_timesteps
from .gaussian_diffusion import get_named_beta_schedule
from .guidance.base import Guidance
from .guidance.building import build_guidance
from .networks.building import classifier_arguments, network_arguments, upsampling
from .networks.unet import EncoderUNetModel, SuperResModel, UNetModel
from .respace import SpacedDiffusion
from .settings.guidance import GuidanceConfig
from .settings.model import ClassifierConfig, DiffusionConfig, NetworkConfig
from .settings.options import merge, parse_value


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


def create_model(
    image_size: int, num_channels: int, num_res_blocks: int, learn_sigma: bool = False, **settings: Any
) -> UNetModel:
    """The UNet for upstream's keyword arguments (`NetworkConfig`'s fields) and this function's own defaults."""
    own = {"attention_resolutions": "16", "num_heads": 1, "use_scale_shift_norm": False}
    sizes = {"image_size": image_size, "num_channels": num_channels, "num_res_blocks": num_res_blocks}
    [config] = merge((NetworkConfig,), ("create_model", own | sizes | settings))
    return UNetModel(**network_arguments(config, learn_sigma))


def create_model_and_diffusion(**settings: Any) -> tuple[UNetModel, SpacedDiffusion]:
    """Network and diffusion for upstream's keyword arguments (`model_and_diffusion_defaults`)."""
    network, diffusion = merge((NetworkConfig, DiffusionConfig), ("create_model_and_diffusion", settings))
    return UNetModel(**network_arguments(network, diffusion.learn_sigma)), _diffusion(diffusion)


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
    betas = get_named_beta_schedule(noise_schedule, steps)
    return SpacedDiffusion(
        use_timesteps=kept_timesteps(betas, timestep_respacing or [steps]),
        betas=betas,
        rescale_timesteps=rescale_timesteps,
        **kinds(
            learn_sigma=learn_sigma,
            sigma_small=sigma_small,
            use_kl=use_kl,
            predict_xstart=predict_xstart,
            rescale_learned_sigmas=rescale_learned_sigmas,
        ),
    )


def _diffusion(config: DiffusionConfig) -> SpacedDiffusion:
    settings = asdict(config)
    return create_gaussian_diffusion(steps=settings.pop("diffusion_steps"), **settings)


def create_classifier(image_size: int, **settings: Any) -> EncoderUNetModel:
    """The classifier for upstream's keyword arguments (`classifier_defaults`)."""
    [config] = merge((ClassifierConfig,), ("create_classifier", settings))
    return EncoderUNetModel(**classifier_arguments(image_size, config))


def sr_create_model_and_diffusion(
    large_size: int, small_size: int, **settings: Any
) -> tuple[SuperResModel, SpacedDiffusion]:
    """Super-resolution network and diffusion for upstream's keyword arguments (`sr_model_and_diffusion_defaults`).

    small_size is the side of the low-resolution images; the network itself takes any.
    """
    network, diffusion = merge((NetworkConfig, DiffusionConfig), ("sr_create_model_and_diffusion", settings))
    network = upsampling(network, large_size, small_size)
    return SuperResModel(**network_arguments(network, diffusion.learn_sigma)), _diffusion(diffusion)


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
