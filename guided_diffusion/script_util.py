"""guided-diffusion's script_util: defaults, flags, and builders of networks, diffusion and guidance.

Upstream's parameters come first, in its order and with its defaults; ours follow by keyword. What a builder uses is
looked up here at every call, so that replacing `UNetModel`, `create_model` and the like takes effect.
"""

import argparse
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from . import gaussian_diffusion as gd
from .diffusion.diffusion import kinds
from .diffusion.process import kept_timesteps
from .guidance.base import Guidance
from .guidance.building import build_guidance
from .networks.building import classifier_arguments, network_arguments, upsampling
from .networks.unet import EncoderUNetModel, SuperResModel, UNetModel
from .respace import SpacedDiffusion, space_timesteps
from .settings.guidance import GuidanceConfig
from .settings.model import NUM_CLASSES, ClassifierConfig, DiffusionConfig, NetworkConfig, SuperResolutionConfig
from .settings.options import merge

OURS = ("num_classes", "null_label", "classifier_channel_mult")
"""Settings of networks that upstream's defaults do not have; builders take them by keyword."""

OF_MODEL = (
    "learn_sigma", "class_cond", "use_checkpoint", "attention_resolutions", "num_heads", "num_head_channels",
    "num_heads_upsample", "use_scale_shift_norm", "dropout", "resblock_updown", "use_fp16",
)  # fmt: skip
OF_DIFFUSION = tuple(field.name for field in fields(DiffusionConfig) if field.name != "diffusion_steps")


def _defaults(*groups: type) -> dict[str, Any]:
    return {field.name: field.default for group in groups for field in fields(group) if field.name not in OURS}


def _given(**settings: Any) -> dict[str, Any]:
    """Settings of ours, but for those that are not given."""
    return {name: value for name, value in settings.items() if value is not None}


def diffusion_defaults() -> dict[str, Any]:
    """Upstream's flags of the diffusion with their defaults."""
    return _defaults(DiffusionConfig)


def classifier_defaults() -> dict[str, Any]:
    """Upstream's flags of the classifier with their defaults."""
    return {"image_size": NetworkConfig.image_size} | _defaults(ClassifierConfig)


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Upstream's flags of network and diffusion with their defaults."""
    return _defaults(NetworkConfig, DiffusionConfig)


def classifier_and_diffusion_defaults() -> dict[str, Any]:
    """Upstream's flags of classifier and diffusion with their defaults."""
    return classifier_defaults() | diffusion_defaults()


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """Upstream's flags of a super-resolution network and its diffusion with their defaults."""
    defaults = model_and_diffusion_defaults() | _defaults(SuperResolutionConfig)
    return {key: defaults[key] for key in ("large_size", "small_size", "num_channels", "num_res_blocks", *OF_MODEL)} | {
        key: defaults[key] for key in ("diffusion_steps", *OF_DIFFUSION)
    }


def sag_defaults() -> dict[str, Any]:
    """The SAG authors' flags with their defaults, which are other ones than those of our commands."""
    return {
        "guide_scale": 1.5,
        "guide_start": 250,
        "sel_attn_block": "output",
        "sel_attn_depth": 2,
        "blur_sigma": 9.0,
        "classifier_guidance": False,
    }


def create_model_and_diffusion(
    image_size: int = NetworkConfig.image_size,
    class_cond: bool = NetworkConfig.class_cond,
    learn_sigma: bool = DiffusionConfig.learn_sigma,
    num_channels: int = NetworkConfig.num_channels,
    num_res_blocks: int = NetworkConfig.num_res_blocks,
    channel_mult: str = NetworkConfig.channel_mult,
    num_heads: int = NetworkConfig.num_heads,
    num_head_channels: int = NetworkConfig.num_head_channels,
    num_heads_upsample: int = NetworkConfig.num_heads_upsample,
    attention_resolutions: str = NetworkConfig.attention_resolutions,
    dropout: float = NetworkConfig.dropout,
    diffusion_steps: int = DiffusionConfig.diffusion_steps,
    noise_schedule: str = DiffusionConfig.noise_schedule,
    timestep_respacing: str | None = DiffusionConfig.timestep_respacing,
    use_kl: bool = DiffusionConfig.use_kl,
    predict_xstart: bool = DiffusionConfig.predict_xstart,
    rescale_timesteps: bool = DiffusionConfig.rescale_timesteps,
    rescale_learned_sigmas: bool = DiffusionConfig.rescale_learned_sigmas,
    use_checkpoint: bool = NetworkConfig.use_checkpoint,
    use_scale_shift_norm: bool = NetworkConfig.use_scale_shift_norm,
    resblock_updown: bool = NetworkConfig.resblock_updown,
    use_fp16: bool = NetworkConfig.use_fp16,
    use_new_attention_order: bool = NetworkConfig.use_new_attention_order,
    *,
    num_classes: int | None = None,
    null_label: bool | None = None,
    sel_attn_block: str | None = None,
    sel_attn_depth: int | None = None,
) -> tuple[UNetModel, SpacedDiffusion]:
    """Network and diffusion.

    sel_attn_block, sel_attn_depth: the block of self-attention guidance, for the loops' `guidance_kwargs`.
    """
    given = locals()
    model = create_model(
        image_size,
        num_channels,
        num_res_blocks,
        channel_mult=channel_mult,
        use_new_attention_order=use_new_attention_order,
        **{name: given[name] for name in OF_MODEL},
        **_given(num_classes=num_classes, null_label=null_label),
    )
    diffusion = create_gaussian_diffusion(steps=diffusion_steps, **{name: given[name] for name in OF_DIFFUSION})
    diffusion.guided_block = _given(sel_attn_block=sel_attn_block, sel_attn_depth=sel_attn_depth)
    if diffusion.guided_block:
        diffusion.guided_network = model
    return model, diffusion


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    use_checkpoint: bool = False,
    attention_resolutions: str = "16",
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    dropout: float = 0,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
    *,
    num_classes: int | None = None,
    null_label: bool = False,
) -> UNetModel:
    """The UNet, with random weights. num_classes: where class_cond, default NUM_CLASSES."""
    settings = locals() | {"num_classes": NUM_CLASSES if num_classes is None else num_classes}
    del settings["learn_sigma"]
    [config] = merge((NetworkConfig,), ("create_model", settings))
    return UNetModel(**network_arguments(config, learn_sigma))


def create_classifier_and_diffusion(
    image_size: int = NetworkConfig.image_size,
    classifier_use_fp16: bool = ClassifierConfig.classifier_use_fp16,
    classifier_width: int = ClassifierConfig.classifier_width,
    classifier_depth: int = ClassifierConfig.classifier_depth,
    classifier_attention_resolutions: str = ClassifierConfig.classifier_attention_resolutions,
    classifier_use_scale_shift_norm: bool = ClassifierConfig.classifier_use_scale_shift_norm,
    classifier_resblock_updown: bool = ClassifierConfig.classifier_resblock_updown,
    classifier_pool: str = ClassifierConfig.classifier_pool,
    learn_sigma: bool = DiffusionConfig.learn_sigma,
    diffusion_steps: int = DiffusionConfig.diffusion_steps,
    noise_schedule: str = DiffusionConfig.noise_schedule,
    timestep_respacing: str | None = DiffusionConfig.timestep_respacing,
    use_kl: bool = DiffusionConfig.use_kl,
    predict_xstart: bool = DiffusionConfig.predict_xstart,
    rescale_timesteps: bool = DiffusionConfig.rescale_timesteps,
    rescale_learned_sigmas: bool = DiffusionConfig.rescale_learned_sigmas,
    *,
    classifier_channel_mult: str | None = None,
    num_classes: int | None = None,
) -> tuple[EncoderUNetModel, SpacedDiffusion]:
    """Noisy-image classifier and diffusion."""
    given = locals()
    classifier = create_classifier(
        image_size,
        classifier_use_fp16,
        classifier_width,
        classifier_depth,
        classifier_attention_resolutions,
        classifier_use_scale_shift_norm,
        classifier_resblock_updown,
        classifier_pool,
        **_given(classifier_channel_mult=classifier_channel_mult, num_classes=num_classes),
    )
    diffusion = create_gaussian_diffusion(steps=diffusion_steps, **{name: given[name] for name in OF_DIFFUSION})
    return classifier, diffusion


def create_classifier(
    image_size: int = NetworkConfig.image_size,
    classifier_use_fp16: bool = ClassifierConfig.classifier_use_fp16,
    classifier_width: int = ClassifierConfig.classifier_width,
    classifier_depth: int = ClassifierConfig.classifier_depth,
    classifier_attention_resolutions: str = ClassifierConfig.classifier_attention_resolutions,
    classifier_use_scale_shift_norm: bool = ClassifierConfig.classifier_use_scale_shift_norm,
    classifier_resblock_updown: bool = ClassifierConfig.classifier_resblock_updown,
    classifier_pool: str = ClassifierConfig.classifier_pool,
    *,
    classifier_channel_mult: str = ClassifierConfig.classifier_channel_mult,
    num_classes: int | None = None,
) -> EncoderUNetModel:
    """The noisy-image classifier, with random weights. num_classes: default NUM_CLASSES."""
    settings = {name: value for name, value in locals().items() if name.startswith("classifier_")}
    [config] = merge((ClassifierConfig,), ("create_classifier", settings))
    classes = NUM_CLASSES if num_classes is None else num_classes
    return EncoderUNetModel(**classifier_arguments(image_size, config, classes))


def sr_create_model_and_diffusion(
    large_size: int = SuperResolutionConfig.large_size,
    small_size: int = SuperResolutionConfig.small_size,
    class_cond: bool = NetworkConfig.class_cond,
    learn_sigma: bool = DiffusionConfig.learn_sigma,
    num_channels: int = NetworkConfig.num_channels,
    num_res_blocks: int = NetworkConfig.num_res_blocks,
    num_heads: int = NetworkConfig.num_heads,
    num_head_channels: int = NetworkConfig.num_head_channels,
    num_heads_upsample: int = NetworkConfig.num_heads_upsample,
    attention_resolutions: str = NetworkConfig.attention_resolutions,
    dropout: float = NetworkConfig.dropout,
    diffusion_steps: int = DiffusionConfig.diffusion_steps,
    noise_schedule: str = DiffusionConfig.noise_schedule,
    timestep_respacing: str | None = DiffusionConfig.timestep_respacing,
    use_kl: bool = DiffusionConfig.use_kl,
    predict_xstart: bool = DiffusionConfig.predict_xstart,
    rescale_timesteps: bool = DiffusionConfig.rescale_timesteps,
    rescale_learned_sigmas: bool = DiffusionConfig.rescale_learned_sigmas,
    use_checkpoint: bool = NetworkConfig.use_checkpoint,
    use_scale_shift_norm: bool = NetworkConfig.use_scale_shift_norm,
    resblock_updown: bool = NetworkConfig.resblock_updown,
    use_fp16: bool = NetworkConfig.use_fp16,
    *,
    use_new_attention_order: bool | None = None,
    num_classes: int | None = None,
    null_label: bool | None = None,
) -> tuple[SuperResModel, SpacedDiffusion]:
    """Super-resolution network and diffusion."""
    given = locals()
    ours = ("use_new_attention_order", "num_classes", "null_label")
    model = sr_create_model(
        large_size,
        small_size,
        num_channels,
        num_res_blocks,
        **{name: given[name] for name in OF_MODEL},
        **_given(**{name: given[name] for name in ours}),
    )
    diffusion = create_gaussian_diffusion(steps=diffusion_steps, **{name: given[name] for name in OF_DIFFUSION})
    return model, diffusion


def sr_create_model(
    large_size: int,
    small_size: int,
    num_channels: int,
    num_res_blocks: int,
    learn_sigma: bool,
    class_cond: bool,
    use_checkpoint: bool,
    attention_resolutions: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    dropout: float,
    resblock_updown: bool,
    use_fp16: bool,
    *,
    use_new_attention_order: bool = False,
    num_classes: int | None = None,
    null_label: bool = False,
) -> SuperResModel:
    """The super-resolution network, with random weights. small_size: checked alone, the network itself takes any."""
    settings = locals() | {"num_classes": NUM_CLASSES if num_classes is None else num_classes}
    for name in ("large_size", "small_size", "learn_sigma"):
        del settings[name]
    [config] = merge((NetworkConfig,), ("sr_create_model", settings))
    return SuperResModel(**network_arguments(upsampling(config, large_size, small_size), learn_sigma))


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
    timestep_respacing: str | Iterable[int] | None = "",
) -> SpacedDiffusion:
    """The diffusion. timestep_respacing: as `space_timesteps`, or `logsnrN`; empty: all steps."""
    settings = {name: value for name, value in locals().items() if name in OF_DIFFUSION}
    del settings["timestep_respacing"]
    [config] = merge((DiffusionConfig,), ("create_gaussian_diffusion", settings | {"diffusion_steps": steps}))
    betas = gd.get_named_beta_schedule(config.noise_schedule, config.diffusion_steps)
    spacing = timestep_respacing or [len(betas)]
    by_snr = isinstance(spacing, str) and spacing.startswith("logsnr")
    return SpacedDiffusion(
        use_timesteps=kept_timesteps(betas, spacing) if by_snr else space_timesteps(len(betas), spacing),
        betas=betas,
        rescale_timesteps=config.rescale_timesteps,
        **kinds(
            learn_sigma=config.learn_sigma,
            sigma_small=sigma_small,
            use_kl=config.use_kl,
            predict_xstart=config.predict_xstart,
            rescale_learned_sigmas=config.rescale_learned_sigmas,
        ),
    )


def create_guidance(model: UNetModel, **settings: Any) -> Guidance:
    """Self-attention guidance for the authors' flags and ours (`GuidanceConfig`)."""
    [config] = merge((GuidanceConfig,), ("create_guidance", settings))
    return build_guidance(model, config)


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: dict[str, Any]) -> None:
    """A flag for every key; its type is that of the default (str for None, `str2bool` for bool)."""
    for key, default in default_dict.items():
        kind = str if default is None else str2bool if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{key}", default=default, type=kind)


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """The values of some flags."""
    return {key: getattr(args, key) for key in keys}


def str2bool(v: bool | str) -> bool:
    """Whether a flag's text means yes."""
    words = {"yes": True, "true": True, "t": True, "y": True, "1": True}
    words |= {"no": False, "false": False, "f": False, "n": False, "0": False}
    if str(v).lower() not in words:
        raise argparse.ArgumentTypeError(f"wanted True or False, got {v!r}")
    return words[str(v).lower()]
