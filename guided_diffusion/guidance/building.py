"""From settings to guidances, and what is said of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..diffusion.process import NoiseLevels
from ..networks.attention import Replaceable, find_block
from ..networks.building import Denoising, lost_attention
from ..networks.dit import DiT
from ..settings.guidance import GuidanceConfig, OtherGuidanceConfig
from ..settings.methods import Method, TransformConfig
from ..settings.options import numbers
from ..storage.files import open_regular, read_arrays
from .base import Guidance
from .classifier_free import ClassifierFreeGuidance, null_class
from .masked_blur import MaskedBlur, MaskGuidance
from .masks import CentredSquare, GivenMaps, HighFrequency, Masking, RandomCells, everywhere
from .methods.building import Guided, blocks_named, build_method, with_transforms
from .perturbed_attention import PerturbedAttentionGuidance
from .schedule import Schedule, changed
from .self_attention import REFERENCE_KERNEL, SelfAttentionGuidance
from .smoothed_energy import SmoothedEnergyGuidance

MAPS = (np.float32, np.float64, np.float16, np.bool_)
"""What maps may be made of."""


def _given_maps(path: str, share: float) -> GivenMaps:
    """The masks of an npz: `maps` [M, h, w], bool or floats."""
    try:
        with open_regular(path) as file:
            maps = torch.from_numpy(read_arrays(file, {"maps": (MAPS, (None, None, None))})["maps"].copy())
        return GivenMaps(maps=maps if maps.dtype is torch.bool else maps.float(), share=share)
    except FileNotFoundError:
        raise ValueError(f"sag_mask: no such file {path!r}") from None
    except OSError as error:
        raise ValueError(f"sag_mask: {path}: cannot be read ({error.strerror})") from None
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


def schedule_of(guide_interval: str, guide_every: int) -> Schedule:
    """The schedule that the flags of all guidances mean."""
    low_high = numbers("guide_interval", guide_interval, float)
    if len(low_high) != 2:
        raise ValueError(f"guide_interval: wanted lo,hi, got {guide_interval!r}")
    low, high = low_high
    return Schedule(low, high, every=guide_every)


def _channels(network: Denoising, flag: str, channels: int | None) -> int | None:
    """The channels that a guidance acts on; a ValueError where the network's input has fewer."""
    if channels is not None and not 1 <= channels <= network.in_channels:
        raise ValueError(f"{flag}: wanted 1 to {network.in_channels}, the network's channels, got {channels}")
    return channels


def _sag_block(network: Denoising, config: GuidanceConfig) -> Replaceable:
    """The block whose attention makes the mask; a ValueError names the flag, the right ones, and what is at fault."""
    try:
        return find_block(network, config.block_name)
    except ValueError as error:
        authors = (GuidanceConfig.sel_attn_block, GuidanceConfig.sel_attn_depth)
        flag, said = "sag_block", [str(error), lost_attention(network)]
        if not config.sag_block and (config.sel_attn_block, config.sel_attn_depth) != authors:
            flag = "sel_attn_block, sel_attn_depth"
        elif not config.sag_block:
            said.append(f"give --sag_block one of them, {config.block_name} is only the default")
        raise ValueError(f"{flag}: {'; '.join(filter(None, said))}") from None


def build_guidance(network: Denoising, config: GuidanceConfig) -> MaskedBlur:
    """Self-attention guidance of a configuration for a network, or the same with another mask."""
    reference = config.fidelity == "reference"
    if reference and isinstance(network, DiT):
        raise ValueError("fidelity: reference is the authors' code, which knows UNets only; a DiT has corrected")
    common: dict[str, Any] = {
        "scale": config.scale,
        "blur_sigma": config.blur_sigma,
        "blur_kernel": REFERENCE_KERNEL if reference and config.blur_kernel is None else config.blur_kernel,
        "channels": _channels(network, "sag_channels", config.sag_channels),
        "schedule": changed(
            replace(schedule_of(config.guide_interval, config.guide_every), start=config.guide_start),
            "sag_schedule",
            config.sag_schedule,
        ),
    }
    if config.sag_mask_share != GuidanceConfig.sag_mask_share and config.sag_mask in ("self-attention", "global"):
        raise ValueError(f"sag_mask_share: the mask {config.sag_mask} has no share that could be chosen")
    if config.sag_mask != "self-attention":
        if reference:
            raise ValueError(f"fidelity: reference has the self-attention mask only, got sag_mask {config.sag_mask}")
        return MaskGuidance(masking=_masking(config), **common)
    return SelfAttentionGuidance(
        block=_sag_block(network, config),
        threshold=config.sag_threshold,
        reference_heads=network.num_heads if reference else None,
        **common,
    )


def build_other_guidances(
    network: Denoising, config: OtherGuidanceConfig, when: GuidanceConfig, null_label: int | None
) -> list[Guidance]:
    """The guidances of a configuration beside self-attention guidance, but those with scale 0.

    when: has the flags of all guidances. null_label: the network's label for no class, None where it has none.
    """
    common = schedule_of(when.guide_interval, when.guide_every)
    guidances: list[Guidance] = []
    if config.cfg_scale:
        if null_label is None:
            raise ValueError("cfg_scale: needs a network with classes and a null label (class_cond, null_label)")
        channels = _channels(network, "cfg_channels", config.cfg_channels)
        null = null_class(null_label)
        schedule = changed(common, "cfg_schedule", config.cfg_schedule)
        guidances.append(
            ClassifierFreeGuidance(scale=config.cfg_scale, null=null, channels=channels, schedule=schedule)
        )
    if config.pag_scale:
        blocks = blocks_named(network, "pag_blocks", config.pag_blocks)
        schedule = changed(common, "pag_schedule", config.pag_schedule)
        guidances.append(PerturbedAttentionGuidance(scale=config.pag_scale, blocks=blocks, schedule=schedule))
    if config.seg_scale:
        blocks = blocks_named(network, "seg_blocks", config.seg_blocks)
        schedule = changed(common, "seg_schedule", config.seg_schedule)
        guidances.append(
            SmoothedEnergyGuidance(scale=config.seg_scale, blocks=blocks, sigma=config.seg_sigma, schedule=schedule)
        )
    return guidances


def _acting(methods: Sequence[Method | TransformConfig]) -> tuple[list[Method], TransformConfig]:
    """The guidances among these groups that have a strength, and the transforms, which are off where they are not."""
    transforms = [group for group in methods if isinstance(group, TransformConfig)] or [TransformConfig()]
    return [group for group in methods if not isinstance(group, TransformConfig) and group.scale], transforms[0]


def guidances_of(
    config: GuidanceConfig, others: OtherGuidanceConfig, methods: Sequence[Method | TransformConfig], guided: Guided
) -> list[Guidance]:
    """The guidances that flags ask for, self-attention guidance first, then in the order of their groups.

    That one is checked also where its scale is 0, unless its flags are at their defaults.
    """
    network, about = guided.network, guided.about
    if others.cfg_scale and guided.labels == "none":
        raise ValueError("cfg_scale: with labels none there is no class to guide to; give --labels random or classes")
    null_label = about.num_classes if about.class_cond and about.null_label else None
    guidances = build_other_guidances(network, others, config, null_label)
    off = GuidanceConfig(
        guide_start=config.guide_start, guide_interval=config.guide_interval, guide_every=config.guide_every
    )
    if config != off:
        guidances = [build_guidance(network, config), *guidances]
    on, transforms = _acting(methods)
    guidances += [build_method(method, guided, schedule_of(config.guide_interval, config.guide_every)) for method in on]
    return with_transforms(guidances, transforms)


def describe_guidance(
    config: GuidanceConfig,
    others: OtherGuidanceConfig,
    methods: Sequence[Method | TransformConfig],
    guidances: Sequence[Guidance],
    process: NoiseLevels,
) -> str:
    """For people: a line for each guidance, and how many steps it acts at."""
    acting = [guidance for guidance in guidances if guidance.scale]
    on, transforms = _acting(methods)
    first = acting[: len(acting) - len(on)]
    said = [_described(config, others, guidance) for guidance in first] + [method.said for method in on]
    lines = [f"{words}, {guidance.schedule.described(process)}" for words, guidance in zip(said, acting, strict=True)]
    if lines and config.scale:
        lines[0] += f", {config.fidelity}"
    if transforms.said:
        lines.append(f"the differences of {transforms.transformed or 'all'} go through {transforms.said}")
    return "\n".join(lines) or "self-attention guidance: off"


def _described(config: GuidanceConfig, others: OtherGuidanceConfig, guidance: Guidance) -> str:
    scale = f"{guidance.scale:g}{_on(guidance.channels)}"
    if isinstance(guidance, ClassifierFreeGuidance):
        return f"classifier-free guidance: s_c = {scale}"
    if isinstance(guidance, PerturbedAttentionGuidance):
        return f"perturbed-attention guidance: s = {scale} at {others.pag_blocks}"
    if isinstance(guidance, SmoothedEnergyGuidance):
        return f"smoothed energy guidance: s = {scale}, σ = {guidance.sigma:g} at {others.seg_blocks}"
    mask = f"ψ = {config.sag_threshold:g}, σ = {config.blur_sigma:g} at {config.block_name}"
    if config.sag_mask != "self-attention":
        share = "" if config.sag_mask == "global" else f" ({config.sag_mask_share:g})"
        mask = f"{config.sag_mask} mask{share}, σ = {config.blur_sigma:g}"
    return f"self-attention guidance: s = {scale}, {mask}"


def _on(channels: int | None) -> str:
    """For people: which channels a guidance acts on, where not on all."""
    return "" if channels is None else f" on the first {channels} channel{'s' * (channels > 1)}"
